"""LoRA as PEFT runs it in eager mode."""

from dataclasses import dataclass
from typing import Any

from ..tape.core import Parameter, Tensor
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, dropout, mul
from .base import Linear, method, option, positive
from .targeted import DEFAULT_TARGETS, Targeted, fraction


@method(
    "lora",
    source="https://arxiv.org/abs/2106.09685; peft/tuners/lora/layer.py",
    trains="A, B",
    adds="2 thin GEMMs, casts, add",
)
@dataclass(frozen=True)
class Lora(Targeted):
    """Low-rank adapters beside frozen linear layers: y = xWᵀ + (α/r)·(xAᵀ)Bᵀ."""

    r: Any = option(8, "rank")
    alpha: float = option(8.0, "scale numerator; changes no cost")
    dropout: float = option(0.0, "dropout on the adapter's input")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "r", positive(f"method {self.name}: r", self.r))
        fraction(f"method {self.name}: dropout", self.dropout)

    def weights(self, layer: Linear, dtype: str) -> tuple[Parameter, Parameter]:
        """A (r, n_in) and B (n_out, r)."""
        self.check_rank(layer, self.r)
        a = layer.adapter("lora_A.weight", (self.r, layer.n_in), dtype)
        return a, layer.adapter("lora_B.weight", (layer.n_out, self.r), dtype)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = layer(x)
        a, b = self.weights(layer, dtype)
        result_dtype = result.dtype
        x = cast(x, dtype)
        result = add(result, mul(linear(linear(dropout(x, self.dropout), a), b), self.alpha))
        return cast(result, result_dtype)


__all__ = ["DEFAULT_TARGETS", "Lora"]
