"""VeRA as PEFT runs it: two random matrices shared by all layers, trained vectors around them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..program.dims import contiguous_strides, product
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.tensor import Storage, Tensor
from .parts.base import Linear, method, option
from .parts.checks import fraction, positive
from .parts.targeted import Targeted


@method(
    "vera",
    title="VeRA",
    source="https://arxiv.org/abs/2310.11454; peft/tuners/vera/layer.py",
    trains="two vectors",
    adds="2 thin frozen GEMMs",
)
@dataclass(frozen=True)
class Vera(Targeted):
    """y = xWᵀ + b ∘ ((d ∘ (xAᵀ))Bᵀ): A and B are random, frozen and shared, only the vectors b and d train."""

    r: Any = option(256, "rank of the shared matrices", positive)
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)

    family: ClassVar[str] = "vera"

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        previous_dtype = x.dtype
        lambda_b = layer.adapter("vera_lambda_b", (layer.n_out,), dtype)
        lambda_d = layer.adapter("vera_lambda_d", (self.r,), dtype)
        result = layer(x)
        orig_dtype = result.dtype
        sliced_a = _slice((self.r, layer.n_in), dtype)
        sliced_b = _slice((layer.n_out, self.r), dtype)
        x = cast(x, dtype)
        result = add(result, mul(lambda_b, linear(mul(lambda_d, linear(dropout(x, self.dropout), sliced_a)), sliced_b)))
        return cast(cast(result, orig_dtype), previous_dtype)


def _slice(shape: tuple[Any, ...], dtype: str) -> Tensor:
    """What a layer uses of a shared matrix: a slice, so it takes no memory of its own.

    PEFT keeps the matrices as buffers: they are no parameters and appear in none of its counts.
    """
    return Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))
