"""What only a trace can answer: models whose type the tape does not know, in the setups that a trace can follow."""

import re
from typing import Any

TRACED = "by a trace of the real program"  # what the first line of such an answer says

# A setup that a training config asks for and no trace can follow: field, value, what is answered, and how it is said.
INSTEAD = (
    ("attention", "flash2", "sdpa", "PyTorch's attention, not flash-attn"),
    ("kernels", "liger", "torch", "without Liger's kernels"),
    ("compile", "default", "none", "without torch.compile"),
    ("compile", "reduce-overhead", "none", "without torch.compile"),
    ("engine", "deepspeed-zero3", "torch", "one GPU, without ZeRO-3"),
)
FUSED = re.compile(r"implementation=\w+,?")


def traced_type(model: str) -> str:
    """The type of a model that only a trace can answer for, empty if the tape knows it.

    Raises:
        UserError: no such model.
    """
    from ..architectures import has_form, load

    kind = load(model).values.get("model_type")
    return "" if not isinstance(kind, str) or has_form(kind) else kind


def slower(model: str) -> list[str]:
    """How the traced program of a model differs from the one that trains where all its packages are installed."""
    from ..tracing.kernels import without_kernels

    return [words for words in [without_kernels(traced_type(model))] if words]


def followed(options: dict[str, Any], of_config: set[str]) -> tuple[dict[str, Any], list[str]]:
    """The options as a trace can follow them, and how they differ from those of a training config.

    Args:
        of_config: those that the config gave; what is typed stays, and is refused.
    """
    made, said = dict(options), []
    for name, asked, instead, words in INSTEAD:
        if name in of_config and made.get(name) == asked:
            made[name] = instead
            said.append(words)
    return made, said


def peft_alone(method: str) -> tuple[str, list[str]]:
    """A training config's method as PEFT runs it, and how it differs."""
    plain = FUSED.sub("", method).rstrip(",:")
    return plain, [] if plain == method else ["without fused kernels for adapters"]
