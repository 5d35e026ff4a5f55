"""BeamLoRA: LoRA whose ranks are weighed by a gate; weak ranks are replaced by copies of strong ones every so often.

Source: the authors' code (github.com/gccnlp/BeamLoRA: peft/tuners/lora, train.py `DynamicRankCallback`).
"""

from dataclasses import dataclass
from typing import ClassVar

from .. import optimizers
from ..program.dims import Dim
from ..tape.core import record
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.tensor import Tensor
from .lora import Lora
from .parts.base import Linear, Periodic, method, option
from .parts.beam import expand_ranks, share
from .parts.checks import positive
from .parts.periodic import Recorded, layers_alike, trained


@method(
    "beamlora",
    title="BeamLoRA",
    source="https://arxiv.org/abs/2502.13604",
    trains="A, B, gate over ranks",
    adds="lora + gate; rank swaps",
)
@dataclass(frozen=True)
class BeamLora(Lora):
    """y = xWᵀ + (α/r)·(xAᵀ ∘ r·softmax(g/τ))Bᵀ with a trained gate g over the ranks.

    Every `interval` steps the least important ranks of all layers take over rows of A, columns of B and moments of the
    most important ones as they were half an interval ago; the program is that of half the ranks being replaced. That
    older state is kept all along, and counts in the peak memory.
    """

    interval: int = option(3000, "steps between two replacements of ranks (the authors' script: 3000)", positive)

    implementations: ClassVar[tuple[str, ...]] = ("peft",)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = layer(x)
        a, b = self.weights(layer, dtype)
        gate = layer.adapter("lora_gate", (1, self.r), dtype)
        result_dtype = result.dtype
        x = cast(x, dtype)
        weighed = mul(mul(linear(dropout(x, self.dropout), a), share(gate)), 1.0)  # in the authors' order
        result = add(result, mul(linear(weighed, b), self.alpha))
        return cast(result, result_dtype)

    def periodic(self) -> tuple[Periodic, ...]:
        return (
            Periodic("copy of adapters and their moments", self.interval, _copy),
            Periodic("replacement of weak ranks", self.interval, expand_ranks),
        )

    def held_bytes(self, step: Recorded) -> Dim:
        return sum(p.nbytes * p.count for p in trained(step)) + step.state_bytes


def _copy(step: Recorded) -> None:
    """What the next replacement copies from: every adapter and its optimizer state."""
    for p in trained(step):
        with layers_alike("copy", p.count):
            for _ in range(1 + optimizers.moments(p, step.optimizer)):
                record("clone", (p,), (p,))
