"""What only a trace can answer: models whose type the tape does not know, in the setups that a trace can follow."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..tracing.setups import OBJECTIVES

if TYPE_CHECKING:
    from ..imports import Imported

TRACED = "by a trace of the real program"  # what the first line of such an answer says

# A setup that a training config asks for and no trace can follow: field, value, what is answered, and how it is said.
INSTEAD = (
    ("attention", "flash2", "sdpa", "PyTorch's attention, not flash-attn"),
    ("kernels", "liger", "torch", "without Liger's kernels"),
    ("compile", "default", "none", "without torch.compile"),
    ("compile", "reduce-overhead", "none", "without torch.compile"),
    ("engine", "deepspeed-zero3", "torch", "one GPU, without ZeRO-3"),
)
FULL = ("full", "galore", "apollo", "badam")  # methods that train every weight
TOWER = "vision tower"
FUSED = re.compile(r"implementation=\w+,?")


def traced_type(model: str) -> str:
    """The type of a model that only a trace can answer for, empty if the tape knows it.

    Raises:
        UserError: no such model.
    """
    from ..architectures import has_form, load

    kind = load(model).values.get("model_type")
    return "" if not isinstance(kind, str) or has_form(kind) else kind


def otherwise(model: str, found: "Imported") -> list[str]:
    """How the traced program of a model differs from that of a training config's tool, all packages installed."""
    from ..architectures import load
    from ..tracing.kernels import without_kernels

    frozen = found.frozen if "vision_config" in load(model).values else ()
    return [words for words in (without_kernels(traced_type(model)), _thawed(found, frozen)) if words]


def _thawed(found: "Imported", frozen: Sequence[str]) -> str:
    """What a trace does to the parts of a model that a tool leaves frozen."""
    method = found.method or ""
    if method.partition(":")[0] in FULL and frozen:
        return f"the {' and the '.join(frozen)} trained too, in {found.setup['dtype']}"
    # LLaMA-Factory leaves the frozen tower out of `all` (model_utils/misc.py, `find_all_linear_modules`)
    return "adapters on the vision tower too" if "all-linear" in method and TOWER in frozen else ""


def followed(options: dict[str, Any], of_config: set[str]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The options as a trace can follow them, and how those of a training config do that differ.

    Args:
        of_config: those that the config gave; what is typed stays, and is refused.
    """
    made, said = dict(options), []
    for name, asked, instead, words in INSTEAD:
        if name in of_config and made.get(name) == asked:
            made[name] = instead
            said.append((name, words))
    if "objective" in of_config and made.get("objective") in OBJECTIVES[1:]:
        said.append(("objective", "without what its trainer logs"))
    return made, said


def peft_alone(method: str) -> tuple[str, list[str]]:
    """A training config's method as PEFT runs it, and how it differs."""
    plain = FUSED.sub("", method).rstrip(",:")
    return plain, [] if plain == method else ["without fused kernels for adapters"]
