"""Questions at random: any model, method, setup, device and host, in any combination that the parts allow alone."""

from dataclasses import dataclass, fields, replace
from functools import cache
from math import prod
from typing import Any

from hypothesis import event, reject
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from perfmodel import methods
from perfmodel.architectures import Architecture, Config, has_form, load, model_names
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.methods import Method
from perfmodel.optimizers import optimizer_names
from perfmodel.prediction.predict import Prediction, architecture_of, predict
from perfmodel.program.dtypes import FLOATING
from perfmodel.setup import (
    ATTENTION,
    CHECKPOINT,
    COMPILE,
    DDP,
    ENGINES,
    EXPERTS,
    FP8,
    INT8,
    KERNELS,
    OBJECTIVES,
    OFFLOAD,
    PACKING,
    PARALLEL,
    REFERENCES,
    ROTATE,
    Setup,
)
from validate.oracle.cases import MIXTURES, SMALL, STACKS, with_targets

OF_MEGATRON = {**SMALL["llama"], "model_type": "megatron_gpt", "megatron": "llama"}
SMALL_MODELS = {**SMALL, **MIXTURES, **STACKS, "megatron_gpt": OF_MEGATRON}


@cache
def built_in() -> tuple[str, ...]:
    """The bundled models that are answered without a trace."""
    return tuple(name for name in model_names() if has_form(str(load(name).values.get("model_type"))))


SIZES = st.sampled_from([1, 1, 2, 3, 4, 7, 8, 16, 17, 31, 33, 64])
LENGTHS = st.sampled_from([1, 2, 3, 16, 17, 33, 60, 64, 64, 128, 210, 512, 1000, 2048, 4096])
# field of a setup -> its values; of fields that are missing here, those that the default's type has
VALUES: dict[str, tuple[Any, ...]] = {
    "dtype": FLOATING, "amp": ("bf16", "fp16"), "optimizer": optimizer_names(), "grad_accum": (2, 3, 8),
    "checkpoint": CHECKPOINT, "attention": ATTENTION, "kernels": KERNELS, "compile": COMPILE, "fp8": FP8, "int8": INT8,
    "qat": ("int8-int4:32",), "engine": ENGINES, "routing": ("zipf:0.5", "zipf:1.1"), "experts": EXPERTS,
    "objective": OBJECTIVES, "prompt": (1, 5, 30), "reference": REFERENCES, "packing": PACKING,
    "lengths": ("20:40", "400:1200"), "stack": ("torch=2.6,cuda=12.4", "transformers=4.44,peft=0.11", "torch=2.10"),
}  # fmt: skip
FORMS: tuple[dict[str, tuple[Any, ...]], ...] = (  # what several GPUs may do
    {"parallel": PARALLEL}, {"parallel": ("ddp",), "ddp": DDP}, {"parallel": PARALLEL[1:], "offload": OFFLOAD},
    {"parallel": ("fsdp2", "fsdp1"), "reshard": (False,), "offload": ("none", "params")},
    {"parallel": ("fsdp2", "fsdp1"), "reduce_dtype": ("bf16", "fp32"), "grad_accum": (1, 2, 3)},
    {"parallel": ("fsdp2",), "fsdp_units": ("blocks", "adapters"), "reshard": (True, False), "offload": OFFLOAD[::2]},
    {"parallel": PARALLEL, "sync_each_batch": (True,), "grad_accum": (2, 4)},
    {"parallel": ("fsdp2", "fsdp1"), "shard_group": (2, 4), "reshard": (True, False), "nodes": (1, 2)},
    {"parallel": PARALLEL, "tp": (2, 4)}, {"parallel": PARALLEL, "nodes": (2,)},
    {"tp": (2, 4), "sequence_parallel": (True,), "seq": (64, 2048), "amp": (None,)},
    {"parallel": ("fsdp2",), "cp": (2, 4), "cp_rotate": ROTATE, "seq": (64, 2048)},
    {"parallel": ("zero1", "zero2", "zero3"), "cp": (2, 4), "cp_rotate": ("ulysses",), "seq": (64, 2048)},
    {"parallel": ("fsdp2",), "tp": (1, 2), "cp": (1, 2), "shard_group": (2, 4), "seq": (64, 2048)},
    {"parallel": ("ddp", "zero1"), "tp": (1, 2), "overlap": (False, True), "amp": (None,), "dtype": ("bf16",)},
    {"pp": (2, 3), "pp_schedule": ("1f1b", "gpipe", "interleaved:v=2"), "grad_accum": (4, 6, 12), "amp": (None,)},
)  # fmt: skip
# drawn by themselves; images need a trace
APART = (
    "batch", "seq", "images", "image_size", "gpus", "parallel", "ddp", "reshard", "shard_group", "offload", "tp",
    "reduce_dtype", "fsdp_units", "sync_each_batch", "sequence_parallel", "nodes", "node", "cp", "cp_rotate", "pp",
    "pp_schedule", "overlap",
)  # fmt: skip
OPTIONS: dict[str, SearchStrategy[str]] = {  # of methods; sizes that are not here are small integers
    "targets": st.just("all-linear"), "dropout": st.just("0.1"), "layers": st.just("0-1"),
    "adapter_dtype": st.sampled_from(("bf16", "fp32")), "k": st.sampled_from("123"),
    "implementation": st.sampled_from(("axolotl", "unsloth", "lorafusion")),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What `predict` is asked."""

    model: str | Config
    method: str
    setup: dict[str, Any]
    device: str | DeviceProfile = "l40s"
    host: str | Host = "default"

    def answered(self, **changes: Any) -> Prediction:
        """The prediction, with other sizes, another device or another host."""
        asked = replace(self, **{k: v for k, v in changes.items() if k in ("device", "host", "method")})
        sizes = {k: v for k, v in changes.items() if k not in ("device", "host", "method")}
        return predict(asked.model, asked.method, asked.made(**sizes), asked.device, host=asked.host)

    def made(self, **changes: Any) -> Setup:
        """The setup, with some of its fields changed."""
        return Setup(**{**self.setup, **changes})

    @property
    def parsed(self) -> Method:
        """The method."""
        return methods.parse(self.method)

    @property
    def on(self) -> DeviceProfile:
        """The device's profile."""
        return profile.load(self.device) if isinstance(self.device, str) else self.device

    @property
    def by(self) -> Host:
        """The host."""
        return hosts.host_of(self.host, self.on)


def asked(question: Question) -> Prediction:
    """The answer; what is refused in one line, as combinations of options are, is no example."""
    try:
        found = question.answered()
    except UserError as error:
        event(f"refused: {str(error)[:40]}")
        reject()
    event("answered")
    return found


@st.composite
def setups(draw: DrawFn) -> dict[str, Any]:
    """Fields of a setup: its sizes, and up to four others."""
    chosen = draw(st.lists(st.sampled_from([f for f in fields(Setup) if f.name not in APART]), max_size=4))
    made: dict[str, Any] = {"batch": draw(SIZES), "seq": draw(LENGTHS)}
    for f in chosen:
        values = VALUES.get(f.name) or ((not f.default,) if isinstance(f.default, bool) else ())
        if values:
            made[f.name] = draw(st.sampled_from(values))
    if "amp" in made:
        made["dtype"] = draw(st.sampled_from(("fp32", made["amp"])))
    if made.get("in_backward"):
        made["clip_grad"] = False
    return made | draw(several()) if draw(st.booleans()) else made


@st.composite
def several(draw: DrawFn) -> dict[str, Any]:
    """What several GPUs do, some of which one GPU does as well."""
    form = {name: draw(st.sampled_from(values)) for name, values in draw(st.sampled_from(FORMS)).items()}
    together = prod(form.get(name, 1) for name in ("tp", "cp", "pp", "shard_group", "nodes"))
    return {"gpus": together * draw(st.sampled_from((1, 2, 3, 8))), **form}


@st.composite
def specs(draw: DrawFn, architecture: Architecture) -> str:
    """A method with some of its options, such as small models have too; its targets where PEFT knows none."""
    registered = methods.registered()
    name = draw(st.sampled_from([*registered, *("full", "lora", "qlora") * 5]))
    taken = methods.options(registered[name])
    known = {f.name: f.default for f in fields(registered[name]) if f.name in taken}
    options = {}
    for key in draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=2)) if known else ():
        default = known[key]
        if key in OPTIONS:
            options[key] = draw(OPTIONS[key])
        elif isinstance(default, bool):
            options[key] = str(not default).lower()
        elif isinstance(default, int):
            options[key] = str(draw(st.sampled_from((1, 2, 4, 8, 16))))
    spec = name + ":" * bool(options) + ",".join(f"{k}={v}" for k, v in options.items())
    try:
        return with_targets(spec, architecture)
    except UserError:  # an option that refuses its value
        return name


@st.composite
def questions(draw: DrawFn) -> Question:
    """Any question; half of them on small models, where shapes are odd and floors matter."""
    if draw(st.booleans()):
        model: str | Config = draw(st.sampled_from(built_in()))
    else:
        name = draw(st.sampled_from(tuple(SMALL_MODELS)))
        model = Config(SMALL_MODELS[name], name, name)
    method = draw(specs(architecture_of(model)))
    device = draw(st.sampled_from(profile.names()))
    return Question(model, method, draw(setups()), device, draw(st.sampled_from(("default", *hosts.names()))))
