"""LoKr as PEFT runs it: the update is a Kronecker product."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import decide
from ..tape.linalg import kron, linear, matmul
from ..tape.pointwise import add, cast, mul
from ..tape.tensor import Tensor
from ..tape.transfers import coin
from .parts.base import Linear, method, option
from .parts.checks import positive
from .parts.targeted import Targeted


@method(
    "lokr",
    title="LoKr",
    source="https://arxiv.org/abs/2309.14859; peft/tuners/lokr/layer.py",
    trains="Kronecker factors",
    adds="dense update, full GEMM",
)
@dataclass(frozen=True)
class Lokr(Targeted):
    """y = xWᵀ + x·(W₁ ⊗ W₂)ᵀ, W₂ of low rank: a weight-sized update is built anew in every forward."""

    breaks_graphs: ClassVar[bool] = True

    r: Any = option(8, "rank of the factors that are decomposed", positive)
    alpha: float = option(8.0, "scale numerator; changes no cost")
    factor: int = option(-1, "size of W₁, where it divides the width; -1: near the square root")
    decompose_both: bool = option(False, "whether W₁ is of low rank too")

    takes_conv1d: ClassVar[bool] = False
    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "decompose_factor": "factor"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            raise UserError(f"method {self.name}: factor must be -1 or at least 1, got {self.factor}")

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        out_l, out_k = factorization(layer.n_out, self.factor)
        in_m, in_n = factorization(layer.n_in, self.factor)
        previous_dtype = x.dtype
        result = layer(x)
        coin()  # module dropout, which is asked for at a rate of 0 too
        result = add(result, self._delta(layer, x, (out_l, in_m), (out_k, in_n), dtype))
        return cast(result, previous_dtype)

    def _delta(self, layer: Linear, x: Tensor, outer: tuple[int, int], inner: tuple[int, int], dtype: str) -> Tensor:
        w1 = self._factor(layer, "lokr_w1", outer, dtype, low_rank=self.decompose_both)
        w2 = self._factor(layer, "lokr_w2", inner, dtype, low_rank=True)
        delta_weight = mul(kron(w1, w2), self.alpha)
        return linear(cast(x, delta_weight.dtype), delta_weight)

    def _factor(self, layer: Linear, name: str, shape: tuple[int, int], dtype: str, *, low_rank: bool) -> Tensor:
        """One side of the Kronecker product: decomposed where that is asked for and the rank is below half its size."""
        if not (low_rank and decide(self.r < max(shape) / 2)):
            return layer.adapter(name, shape, dtype)
        a = layer.adapter(f"{name}_a", (shape[0], self.r), dtype)
        return matmul(a, layer.adapter(f"{name}_b", (self.r, shape[1]), dtype))


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two numbers with that product, the smaller first and at most `factor`, as near to each other as can be.

    >>> factorization(128), factorization(127), factorization(128, 4)
    ((8, 16), (1, 127), (4, 32))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    m, n = 1, dimension
    length = m + n
    while m < n:
        new_m = next(k for k in range(m + 1, dimension + 1) if dimension % k == 0)
        new_n = dimension // new_m
        if new_m + new_n > length or new_m > limit:
            break
        m, n = new_m, new_n
    return min(m, n), max(m, n)
