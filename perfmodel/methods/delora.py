"""DeLoRA as PEFT runs it: LoRA whose columns are normalised, with a trained bound on the whole update."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.elementary import div
from ..tape.gather import clamp, quotient, vector_norm, zeros_like
from ..tape.inplace import add_in_place
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.tensor import Storage, Tensor
from .parts.base import Linear, method, option
from .parts.checks import fraction, positive
from .parts.targeted import Targeted


@method(
    "delora",
    title="DeLoRA",
    source="https://arxiv.org/abs/2503.18225; peft/tuners/delora/layer.py",
    trains="A, B, a strength",
    adds="lora + norms",
)
@dataclass(frozen=True)
class Delora(Targeted):
    """y = xWᵀ + λ/r·((x∘‖W‖)Aᵀ / (‖a‖‖b‖))Bᵀ: directions train apart from their strength λ."""

    r: Any = option(8, "rank", positive)
    dropout: float = option(0.0, "dropout on the adapter's input (module_dropout)", fraction)

    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "module_dropout": "dropout"}
    takes_conv1d: ClassVar[bool] = False

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        self.check_rank(layer, self.r)
        previous_dtype = x.dtype
        base_out = layer(x)
        add_out = zeros_like(base_out)
        a = layer.adapter("delora_A", (self.r, layer.n_in), dtype)
        b = layer.adapter("delora_B", (layer.n_out, self.r), dtype)
        strength = layer.adapter("delora_lambda", (1,), dtype)
        weight_norm = Tensor((layer.n_in,), dtype, (1,), layer.n_in, Storage(0, None))  # a buffer
        x_d = dropout(x, self.dropout)
        h = linear(mul(x_d, weight_norm), a)
        a_norm, b_norm = clamp(vector_norm(a, 1), low=True), clamp(vector_norm(b, 0), low=True)
        scaling = quotient(div(strength, self.r), mul(a_norm, b_norm))
        h = mul(h, scaling)
        h = linear(h, b)
        add_out = add_in_place(add_out, h)
        return cast(add(base_out, cast(add_out, base_out.dtype)), previous_dtype)
