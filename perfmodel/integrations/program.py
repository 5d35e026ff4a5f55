"""What a `transformers.Trainer` is about to run, as model, method, setup and device of a prediction.

Nothing here imports torch or transformers: the objects of the run are asked for what they know.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from ..architectures import Architecture, Config, from_config
from ..devices import profile
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..imports import Imported, adapter
from ..imports.fields import DECAYED
from ..imports.keys import Keys
from ..imports.meanings import meanings_of
from ..imports.read import read_arguments
from ..methods import Method, parse
from ..methods.parts.peft_adapter import AUTOCAST, PeftAdapter
from ..prediction.predict import method_of
from ..program.software import SoftwareStack
from ..setup import Setup
from ..tracing.recorded import traced
from .processes import REPLICATED, keys_of_launcher, on_its_processes

HALF = {"torch.bfloat16": "bf16", "torch.float16": "fp16"}
CPU = "cpu-epyc-genoa-2c"  # the bundled CPU profile
OF_DEVICES = ("use_cpu", "no_cuda")  # arguments that say where the model is
ALONE = "one process alone of {}, without what they exchange or share ({})"
QUANTISED = "base weights in {}, not quantised (quantization_config)"


@dataclass(frozen=True)
class TrainingRun:
    """A training run as `predict` takes it.

    Attributes:
        method: bound to the architecture.
        length: tokens of a sample that the run's configuration names (TRL's max_length), None if it names none.
        differences: how the step that is predicted differs from the run's.
        trained: parameters of the model that train, None where several processes may share them.
    """

    architecture: Architecture
    method: Method
    setup: Setup
    length: int | None
    differences: tuple[str, ...]
    trained: int | None


def trainer_program(
    model: Any, arguments: Any, method: str | None = None, *, from_trace: bool = False, alone: str | None = None
) -> TrainingRun:
    """Read a model (a PEFT model too) and the TrainingArguments of its Trainer.

    Args:
        method: as `predict` takes it; read from the model if None.
        from_trace: whether steps come from traces of the real program (`perfmodel.traced`).
        alone: why one of several processes is answered as if it were alone; None where it is not.

    Raises:
        UserError: an architecture, adapter or option that is not modelled, or weights of which only some train.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # adapters may be put into it, too
    values = base.config.to_dict()
    config = Config(values, type(base).__name__, type(base).__name__)
    architecture = traced(config) if from_trace else from_config(config)
    weights = _dtype(p for p in base.parameters() if not p.requires_grad or base is model)
    found = _asked(arguments, weights, getattr(base.config, "_attn_implementation", None))
    if (objective := found.setup.get("objective", "sft")) != "sft":  # its trainer runs more forward passes than batches
        raise UserError(f"runs of {objective} are not compared step by step; ask predict --objective {objective}")
    chosen = method_of(method) if method else _method(model, weights, from_trace=from_trace)
    several = arguments.world_size > 1
    if several and alone is None:
        found = on_its_processes(found, arguments, model, chosen.spec())
    asked = {**found.setup, "kernels": _kernels(found.setup["kernels"], architecture)}
    length = asked.pop("seq", None)  # a default, where the run cuts no sample
    cuts = any(getattr(arguments, name, None) for name in ("max_length", "max_seq_length"))
    setup = replace(Setup(), **asked, experts=_experts(base), stack=_stack())
    differences = [words for words in found.differences if chosen.name == "full" or not words.startswith(DECAYED)]
    if method is None and values.get("quantization_config"):
        differences.append(QUANTISED.format(weights))
    if several and alone is not None:
        differences.append(ALONE.format(arguments.world_size, alone))
    if arguments.n_gpu > 1:
        differences.append(REPLICATED.format(arguments.n_gpu))
    whole = not several or (alone is None and setup.parallel in ("ddp", "zero1", "zero2") and setup.tp == 1)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad) if whole else None
    bound = chosen.bind(architecture)
    return TrainingRun(architecture, bound, setup, length if cuts else None, tuple(differences), trained)


def _asked(arguments: Any, weights: str, attention: str | None) -> Imported:
    """What the arguments ask of a step, wherever it runs; nothing is said of those that have their defaults."""
    values = arguments.to_dict()
    usual = [field.name for field in fields(arguments) if values.get(field.name) == field.default]
    given = {name: value for name, value in values.items() if name not in OF_DEVICES}
    of_model = {"dtype": f"torch.{weights}", "attn_implementation": attention}
    return read_arguments(given | keys_of_launcher(arguments) | of_model, "TrainingArguments", usual).with_seq()


def _kernels(asked: str, architecture: Architecture) -> str:
    """Without TRL's fused head where this process has a TRL before 1.16, or where it is not modelled."""
    release = re.match(r"(\d+)\.(\d+)", str(getattr(sys.modules.get("trl"), "__version__", "")))
    fused = release is not None and tuple(map(int, release.groups())) >= (1, 16)
    if not architecture.recorded:
        fused = fused and architecture.traits.cut_loss and architecture.classifier is None
    return asked if fused else "+".join(name for name in asked.split("+") if name != "trl") or "torch"


def _stack() -> SoftwareStack:
    """The versions of this process."""
    modules = {name: sys.modules.get(name) for name in ("torch", "transformers", "peft")}
    return SoftwareStack.installed({name: getattr(module, "__version__", None) for name, module in modules.items()})


def _experts(base: Any) -> str:
    """How a mixture runs its experts; of a model without any, transformers says eager."""
    able = getattr(base, "_can_set_experts_implementation", None)
    return str(base.config._experts_implementation) if able is not None and able() else Setup().experts


def _dtype(parameters: Iterator[Any]) -> str:
    """The dtype of the first matrix among parameters; of the first one where all are shards, float32 of none."""
    known = list(parameters)
    matrices = [p for p in known if len(getattr(p, "ds_shape", p.shape)) > 1]
    return next((str(p.dtype).removeprefix("torch.") for p in (*matrices, *known)), "float32")


def _method(model: Any, weights: str, *, from_trace: bool) -> Method:
    """What the model trains."""
    if not hasattr(model, "peft_config"):
        frozen = sum(not p.requires_grad for p in model.parameters())
        if frozen:
            raise UserError(f"{frozen} parameters are frozen and peft does not say why: give method=, e.g. 'top_k:k=4'")
        return parse("full")
    active = getattr(model, "active_adapter", None)  # of transformers' own models a method
    known = model.peft_config
    values = known[active if active in known else next(iter(known))].to_dict()
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
    plain["peft_type"] = getattr(values["peft_type"], "value", values["peft_type"])
    adapters = _dtype(p for p in model.parameters() if p.requires_grad)
    if from_trace:
        return PeftAdapter.of({**plain, AUTOCAST: adapters != weights})
    try:
        _, spec, *_ = adapter.read_whole(Keys(plain, "peft_config"), meanings_of("peft"))
    except adapter.NoBuiltIn as error:
        raise UserError(error.but("give traced=True")) from None
    if adapters == weights and f"torch.{weights}" in HALF:  # peft keeps adapters in fp32 unless told otherwise
        spec += f"{',' if ':' in spec else ':'}adapter_dtype={HALF[f'torch.{weights}']}"
    return parse(spec)


def device_here(name: str | None) -> DeviceProfile:
    """The profile of a GPU by its maker's name; of a CPU (None) the bundled one.

    Raises:
        UserError: no such profile.
    """
    found = profile.load(CPU) if name is None else profile.by_makers_name(name)
    if found is None:
        raise UserError(f"no profile of {name!r}: give device=, a name or the path of a TOML (perfmodel devices)")
    return found
