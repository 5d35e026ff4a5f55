"""Variants of LoRA that compute something else at the cost of LoRA: a training step has the very same calls."""

from dataclasses import dataclass

from ..program.dims import decide
from .lora import Lora
from .parts.base import Periodic, method, option
from .parts.checks import not_negative
from .parts.pissa_init import decompose


@method(
    "rslora",
    title="rsLoRA",
    source="https://arxiv.org/abs/2312.03732; peft/tuners/lora/layer.py (use_rslora)",
    trains="A, B",
    adds="as lora",
)
@dataclass(frozen=True)
class RsLora(Lora):
    """LoRA scaled by α/√r instead of α/r: another number, the cost of LoRA."""

    def scales(self) -> bool:
        return decide(self.r != self.alpha**2)


@method(
    "pissa",
    title="PiSSA",
    source="https://arxiv.org/abs/2404.02948; peft/tuners/lora/layer.py (pissa_init)",
    trains="A, B",
    adds="as lora; SVD at start",
)
@dataclass(frozen=True)
class Pissa(Lora):
    """LoRA that starts from the principal singular vectors of W: another start, the cost of LoRA.

    The decomposition of every target comes once per run.
    """

    niter: int = option(0, "power iterations of a randomised SVD (peft's pissa_niter_N); 0: a whole SVD", not_negative)

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("SVD of the targets", None, lambda step: decompose(step, self.niter)),)
