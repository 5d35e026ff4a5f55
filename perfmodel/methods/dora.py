"""DoRA as PEFT runs it: LoRA for the direction of a weight, a trained vector for the length of its rows."""

from dataclasses import dataclass
from typing import ClassVar

from ..tape.core import tape
from ..tape.elementary import div, eye, row_norms
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, dropout, mul, sub
from ..tape.shape import detach, t, transposed_parameter, view
from ..tape.tensor import Parameter, Tensor
from .lora import Lora
from .parts.base import Linear, method
from .parts.targeted import base_bias, base_weight


@method(
    "dora",
    title="DoRA",
    source="https://arxiv.org/abs/2402.09353; peft/tuners/lora/dora.py",
    trains="A, B, row lengths",
    adds="lora + dense BA, norms",
)
@dataclass(frozen=True)
class Dora(Lora):
    """LoRA that rescales every row of W + (α/r)·BA to a trained length; the norm is taken anew in every forward."""

    breaks_graphs: ClassVar[bool] = True

    implementations: ClassVar[tuple[str, ...]] = ("peft",)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = layer(x)
        a, b = self.weights(layer, dtype)
        magnitude = layer.adapter("lora_magnitude_vector.weight", (layer.n_out,), dtype)
        result_dtype = result.dtype
        x = cast(x, dtype)
        if self.dropout:  # the base layer's result is of no use: it is computed again from the dropped-out input
            dropped = dropout(x, self.dropout)  # x lives on: the caller's frame holds it
            result = add(result, self._extra(layer, dropped, a, b, magnitude, None))
        else:
            result = add(result, self._extra(layer, x, a, b, magnitude, result))
        return cast(result, result_dtype)

    def _extra(
        self, layer: Linear, x: Tensor, a: Parameter, b: Parameter, magnitude: Parameter, base_result: Tensor | None
    ) -> Tensor:
        """`DoraLinearLayer.forward`: what DoRA adds to the base layer's result."""
        lora_weight = _lora_weight(a, b)
        lora_weight = cast(lora_weight, x.dtype)
        weight = cast(base_weight(layer), x.dtype)
        weight_norm = _weight_norm(layer, weight, detach(lora_weight), self.alpha)
        scale = view(div(magnitude, weight_norm), (1, layer.n_out))
        lora_result = _called_again(_called_again(x, a), b)
        bias = base_bias(layer)
        if base_result is None:
            base_result = linear(x, _oriented(layer, weight))
        elif bias is not None:
            base_result = sub(base_result, bias)
        return add(mul(sub(scale, 1.0), base_result), mul(mul(scale, lora_result), self.alpha))


def _lora_weight(a: Parameter, b: Parameter) -> Tensor:
    """B·A, as two linear layers applied to the identity."""
    x_eye = eye(a.shape[1], a.dtype)
    return t(linear(linear(x_eye, a), b))


def _called_again(x: Tensor, half: Parameter) -> Tensor:
    """A or B, whose module has been called before: under FSDP1, to which it is a unit, it is gathered once more."""
    if (wrapping := tape().wrapping) is not None:
        wrapping.weight(half)
    return linear(x, half)


def _weight_norm(layer: Linear, weight: Tensor, lora_weight: Tensor, scaling: float) -> Tensor:
    weight = _oriented(layer, weight)
    weight = add(weight, mul(lora_weight, scaling))
    return row_norms(weight)


def _oriented(layer: Linear, weight: Tensor) -> Tensor:
    """The weight as (n_out, n_in). PEFT's `transpose` makes a new parameter of a Conv1D's weight that was not cast:
    where autograd reaches it, it computes a weight gradient that nobody uses."""
    if not layer.conv1d:
        return weight
    return transposed_parameter(weight, layer.scope.part) if isinstance(weight, Parameter) else t(weight)
