"""HRA as PEFT runs it: the weight is reflected by a chain of Householder matrices."""

from dataclasses import dataclass
from typing import ClassVar

from ..program.dims import only
from ..tape.custom import on_base
from ..tape.elementary import eye
from ..tape.gather import quotient, vector_norm
from ..tape.linalg import linear, matmul
from ..tape.pointwise import cast, mul, sub
from ..tape.shape import detach, t, view
from ..tape.split import select
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import positive
from .parts.targeted import Targeted, base_bias, base_weight


@method(
    "hra",
    title="HRA",
    source="https://arxiv.org/abs/2405.17484; peft/tuners/hra/layer.py",
    trains="r reflections",
    adds="dense H, full GEMM",
)
@dataclass(frozen=True)
class Hra(Targeted):
    """y = x(W·H₁…H_r)ᵀ + b, Hᵢ = I - 2uᵢuᵢᵀ: r passes over an (n_in, n_in) matrix, then a weight-sized product."""

    r: int = option(8, "reflections", positive)

    takes_conv1d: ClassVar[bool] = False

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        previous_dtype = x.dtype
        new_weight = eye(layer.n_in, "fp32")
        delta_weight = self._reflection(layer, dtype)
        new_weight = matmul(cast(new_weight, delta_weight.dtype), delta_weight)
        base = base_weight(layer)
        weight = cast(detach(base), new_weight.dtype)
        new_weight = matmul(weight, new_weight)
        bias = base_bias(layer)
        if bias is not None:
            bias = cast(bias, new_weight.dtype)  # type: ignore[assignment]
        return cast(on_base(linear, cast(x, new_weight.dtype), new_weight, bias), previous_dtype)

    def _reflection(self, layer: Linear, dtype: str) -> Tensor:
        """`get_delta_weight`: the product of the reflections, one after another."""
        u = layer.adapter("hra_u", (layer.n_in, self.r), dtype)
        directions = quotient(u, vector_norm(u, 0))
        weight = eye(layer.n_in, u.dtype)
        for _ in range(only(self.r)):
            ui = view(select(directions, 1), (layer.n_in, 1))
            weight = sub(weight, matmul(matmul(mul(weight, 2.0), ui), t(ui)))
        return weight
