"""How a training program is launched: accelerate's own config, or DeepSpeed's (`accelerate launch --config_file`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..resources import is_file, mapping
from .fields import NOT_FP8, ONE_GPU, UNDER_ZERO_3, unscaled
from .forms import OFFLOADS, AskedForm, form_of, of_deepspeed, offloadable
from .keys import Keys
from .meanings import judge, meanings_of, refuse
from .mesh import MESH, ONE_GROUP, check_launch
from .micro_batches import KEYS, agreed, on_each_gpu
from .read import TOOLS, Imported
from .values import read_values

ZERO = "zero_optimization"
MARKS = ("distributed_type", "compute_environment", "num_processes")
# `DistributedType` of accelerate; its others are no GPUs of NVIDIA, or Megatron
TYPES = ("NO", "MULTI_GPU", "FSDP", "DEEPSPEED")
PRECISIONS = {"no": None, "bf16": "bf16", "fp16": "fp16", "fp8": "bf16"}
UNCOMPILED = "without torch.compile (dynamo_config)"  # data/configs/accelerate.toml
DEEPSPEED = "DeepSpeed"
DEFAULT_STAGE = 2  # `DeepSpeedPlugin.zero_stage` of accelerate/utils/dataclasses.py
NAMES = {"zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp1": "FSDP", "fsdp2": "FSDP"}
# Of accelerate's short form of DeepSpeed's config: what changes neither speed nor memory
WITHOUT_WEIGHT = (
    "deepspeed_multinode_launcher", "deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter",
    "zero3_init_flag", "zero3_save_16bit_model", "deepspeed_moe_layer_cls_names", "offload_optimizer_nvme_path",
    "offload_param_nvme_path",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """How a program is launched.

    Attributes:
        tool: accelerate, or DeepSpeed, whose own config says nothing of GPUs.
        gpus: of all nodes together; None where the file does not say it.
        form: what they do; its `setup` has the mixed precision, which counts where a training config names none.
    """

    tool: str
    gpus: int | None
    nodes: int | None
    form: AskedForm

    @property
    def in_words(self) -> str:
        """What it says, in a line."""
        gpus = "" if self.gpus is None else f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}, "
        shared = "".join(f", {name} {n}" for name, n in (("tp", self.form.tp), ("cp", self.form.cp)) if n > 1)
        return gpus + (self.form.parallel or "ddp") + shared

    def of(
        self, found: Imported | None, *, several: bool, parallel: str | None = None, cp: int | None = None,
        gpus: Sequence[int] = (), typed: Mapping[str, Any] | None = None,
    ) -> Imported:  # fmt: skip
        """A training config's step, launched like this; without one what the launcher says of a step alone.

        Args:
            several: whether the question is of more than one GPU.
            parallel, cp: what is typed in the place of the files' words, if anything is.
            gpus: how many there are, or each of several numbers; samples of all of them are shared by as many.
            typed: samples of a micro-batch and micro-batches, where they are typed.

        Raises:
            UserError: the files contradict each other.
        """
        found = found or Imported(self.tool, None, None, {}, [], [])
        typed = typed or {}
        own = replace(self.form, setup={k: v for k, v in self.form.setup.items() if k not in typed})
        amp, dtype = own.setup.pop("amp", None), found.setup.get("dtype")
        if self.tool == DEEPSPEED:  # the trainer compares the two (`trainer_config_process`)
            agreed({"amp": found.setup.get("amp")}, {"amp": amp})
        if amp is not None and not found.precise and found.setup.get("amp") is None:
            if dtype in (None, "fp32", amp):
                own.setup["amp"] = amp
            else:
                own = replace(own, besides=(*own.besides, f"products in {dtype}, not in {amp} under autocast"))
        if found.setup.get("checkpoint", "none") != "none":
            own.setup.pop("checkpoint", None)
        asked, compiles = found.asks(), own.setup.pop("compile", "none")
        form = asked.under(own).as_typed(parallel, cp)
        sizes = {**form.setup, **typed}
        follows = KEYS.keys() - sizes or not KEYS.keys() & typed  # what is typed wins
        if form.samples and gpus and follows and "batch" not in found.setup:
            shares, said = on_each_gpu(sizes, form.samples, gpus, form.tp * form.cp)
            form = replace(form, setup=shares, besides=(*form.besides, *said))
        asks = found.setup.get("compile", "none") != "none"
        if several and compiles != "none" and not asks and found.compiles(form, self.gpus):
            form = replace(form, setup={**form.setup, "compile": compiles})
        if asks or "compile" in form.setup:  # the Trainer's own word comes first
            form = replace(form, besides=tuple(words for words in form.besides if words != UNCOMPILED))
        if several:
            return found.on_several(form)
        if asked.parallel is not None or form.parallel in (None, "ddp"):
            return _with(found, found.under(form), own.besides)
        return self._on_one(found, form, form.parallel)

    def _on_one(self, found: Imported, form: AskedForm, parallel: str) -> Imported:
        """One GPU has nothing to exchange; DeepSpeed's ZeRO-3 runs on it all the same, and what is offloaded is."""
        setup = found.under(form)
        said = [*form.unlike, *form.besides]
        offloads = form.offload != "none"
        as_asked = setup.get("objective", "sft") == "sft" and offloadable(form, setup)
        if parallel == "zero3" and not offloads and as_asked:
            setup["engine"] = "deepspeed-zero3"
            said += [UNDER_ZERO_3] if self.gpus != 1 else []
        elif parallel.startswith("zero") and offloads and as_asked:
            setup |= {"parallel": parallel, "offload": form.offload}
            said += [f"{ONE_GPU} under {NAMES[parallel]}"] if self.gpus != 1 else []
        else:
            said = [f"{ONE_GPU}, without {NAMES[parallel]}{' with offloading' * offloads}", *form.besides]
        return _with(found, setup, said)


def _with(found: Imported, setup: dict[str, Any], said: Iterable[str]) -> Imported:
    """A training config's step with another setup, and with what is said of that too."""
    told = dict.fromkeys([*found.differences, *said, *unscaled(setup)])
    return replace(found, setup=setup, differences=list(told))


def read_launch(path: Path) -> Launch:
    """Read accelerate's config or DeepSpeed's.

    Raises:
        UserError: a file that is neither, a value of the wrong type, what is not modelled.
    """
    values = read_values(path)
    if not is_launch(values):
        raise UserError(f"{path}: neither accelerate's config nor DeepSpeed's: it has none of the keys that they need")
    return launch_of(path, values)


def is_launch(values: dict[str, Any]) -> bool:
    """Whether a file's values are accelerate's or DeepSpeed's; a training config may hand `num_processes` on."""
    return ZERO in values or (any(mark in values for mark in MARKS) and not any(tool.owns(values) for tool in TOOLS))


def launch_of(path: Path, values: dict[str, Any], *, alone: bool = False) -> Launch:
    """What the values of a launcher's file say.

    Args:
        alone: whether they are only a text, beside which no other file is read.

    Raises:
        UserError: as of `read_launch`.
    """
    if ZERO in values:
        return Launch(DEEPSPEED, None, None, of_deepspeed(values, path.name))
    keys, table = Keys(values, path.name), meanings_of("accelerate")
    refuse(keys, table)
    keys.one_of("compute_environment", {"LOCAL_MACHINE": True}, True)
    kind = _word(keys, "distributed_type", "NO").upper()
    if kind not in TYPES:
        raise UserError(f"{path.name}: distributed_type {kind!r} is not modelled: {', '.join(TYPES[1:])} are")
    gpus = None if keys.get("num_processes") in (None, -1) else keys.count("num_processes", 1)
    nodes = keys.count("num_machines", 1)
    asked: dict[str, Any] = {MESH: keys.get(MESH)}
    sections = {name: _section(keys, f"{name}_config") for name in ("fsdp", "deepspeed")}
    setup: dict[str, Any] = {"amp": _precision(keys), "compile": _compiled(keys)}
    if kind == "FSDP":
        options = {"fsdp_auto_wrap_policy": "NO_WRAP", **sections["fsdp"]}
        asked["fsdp_config"] = options
        flag = "fsdp_activation_checkpointing"
        setup["checkpoint"] = "block" if Keys(options, f"{path.name}: fsdp_config").flag(flag) else None
    elif kind == "DEEPSPEED":
        section = Keys(sections["deepspeed"], f"{path.name}: deepspeed_config", alone=alone)
        asked["deepspeed"] = _deepspeed(section, path.parent)
    judge(keys, table)
    asks = Keys(asked, path.name, alone=alone)
    form = _in_nodes(form_of(asks, fsdp_version=1), gpus, nodes)
    check_launch(asks, 1 if kind == "NO" else gpus, form.parallel)
    setup = {**{name: value for name, value in setup.items() if value is not None}, **form.setup}
    besides = (*form.besides, *keys.told_differences())
    form = replace(form, parallel=form.parallel or "ddp", setup=setup, besides=besides)
    return Launch("accelerate", 1 if kind == "NO" else gpus, None if kind == "NO" else nodes, form)


def _in_nodes(form: AskedForm, gpus: int | None, nodes: int) -> AskedForm:
    """The form with groups of shards that are nodes, as FSDP1's HYBRID_SHARD makes them, where a file says how many.

    Source: torch/distributed/fsdp/_init_utils.py (2.13, `_init_intra_and_inter_node_groups`).
    """
    if form.parallel != "fsdp1" or ONE_GROUP not in form.unlike or not gpus or gpus % nodes or gpus == nodes:
        return form
    unlike = tuple(words for words in form.unlike if words != ONE_GROUP)
    return replace(form, shard_group=gpus // nodes, unlike=unlike)


def _word(keys: Keys, key: str, default: str) -> str:
    """A word that YAML reads as false where it is NO without quotes."""
    return default if keys.get(key) is False else keys.text(key, default) or default


def _precision(keys: Keys) -> str | None:
    """The dtype of autocast, or of DeepSpeed's weights."""
    word = _word(keys, "mixed_precision", "no").lower()
    if word not in PRECISIONS:
        raise keys.wrong("mixed_precision", "no, bf16, fp16 or fp8")
    if word == "fp8":
        keys.differ(NOT_FP8, "mixed_precision")
    return PRECISIONS[word]


def _compiled(keys: Keys) -> str | None:
    """What of `dynamo_config` is modelled: the whole model compiled by Inductor, not blocks or with tuned kernels."""
    dynamo = keys.values.get("dynamo_config")
    given = dynamo if isinstance(dynamo, dict) else {}
    said = {str(key).removeprefix("dynamo_"): str(value).lower() for key, value in given.items()}
    if said.get("backend", "no") == "no":
        keys.used.add("dynamo_config")
    plain = said.get("backend") == "inductor" and said.get("mode", "default") == "default"
    return "default" if plain and said.get("use_regional_compilation", "false") == "false" else None


def _section(keys: Keys, key: str) -> dict[str, Any]:
    return mapping(keys.get(key) or {}, f"{keys.origin}: {key}")


def _deepspeed(keys: Keys, folder: Path) -> dict[str, Any] | str:
    """DeepSpeed's config as accelerate makes it of its short form, or the path of one, from here or beside the file."""
    path = keys.text("deepspeed_config_file")
    if path is not None:
        beside = str(folder / path)
        return beside if not keys.alone and is_file(beside) and not is_file(path) else path
    zero: dict[str, Any] = {"stage": keys.values.get("zero_stage", DEFAULT_STAGE)}
    for section in OFFLOADS:
        zero[section] = {"device": keys.text(f"{section}_device", "none")}
    read = ("zero_stage", "gradient_clipping", *(f"{section}_device" for section in OFFLOADS), *WITHOUT_WEIGHT)
    rest = {key: value for key, value in keys.values.items() if key not in read}
    return {**rest, ZERO: zero, "gradient_clipping": keys.values.get("gradient_clipping", "auto")}
