"""LoHa as PEFT runs it: the update is a Hadamard product of two low-rank matrices."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.linalg import hadamard_weight, linear
from ..tape.pointwise import add, cast
from ..tape.shape import reshape
from ..tape.tensor import Tensor
from ..tape.transfers import coin
from .parts.base import Linear, method, option
from .parts.checks import positive
from .parts.targeted import Targeted


@method(
    "loha",
    title="LoHa",
    source="https://arxiv.org/abs/2108.06098; peft/tuners/loha/layer.py",
    trains="two low-rank pairs",
    adds="dense update, full GEMM",
)
@dataclass(frozen=True)
class Loha(Targeted):
    """y = xWᵀ + x·((A₁B₁) ∘ (A₂B₂))ᵀ: a weight-sized update is built anew in every forward."""

    breaks_graphs: ClassVar[bool] = True

    r: Any = option(8, "rank of both factors", positive)
    alpha: float = option(8.0, "scale numerator; changes no cost")

    takes_conv1d: ClassVar[bool] = False

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        out_r, r_in = (layer.n_out, self.r), (self.r, layer.n_in)
        w1a, w1b = layer.adapter("hada_w1_a", out_r, dtype), layer.adapter("hada_w1_b", r_in, dtype)
        w2a, w2b = layer.adapter("hada_w2_a", out_r, dtype), layer.adapter("hada_w2_b", r_in, dtype)
        previous_dtype = x.dtype
        result = layer(x)
        coin()  # module dropout, which is asked for at a rate of 0 too
        delta_weight = reshape(hadamard_weight(w1a, w1b, w2a, w2b), (layer.n_out, layer.n_in))
        result = add(result, linear(cast(x, delta_weight.dtype), delta_weight))
        return cast(result, previous_dtype)
