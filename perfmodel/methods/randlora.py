"""RandLoRA as PEFT runs it: random low-rank bases shared by all layers, summed up to full rank with trained weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..program.dims import contiguous_strides, product
from ..tape.autograd import differentiate
from ..tape.core import tape
from ..tape.linalg import bmm, linear
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.shape import permute, unsqueeze, view
from ..tape.tensor import Grads, Node, Storage, Tensor
from .parts.base import Linear, method, option
from .parts.checks import fraction, positive
from .parts.targeted import Targeted


@method(
    "randlora",
    title="RandLoRA",
    source="https://arxiv.org/abs/2502.00987; peft/tuners/randlora/layer.py",
    trains="diagonals",
    adds="thin frozen GEMMs, sums",
)
@dataclass(frozen=True)
class RandLora(Targeted):
    """y = xWᵀ + Σ B_j Λ_j A Γ_j x: as many bases of rank r as make a full-rank update; only diagonals train."""

    r: int = option(32, "rank of a basis: the lower, the more trains", positive)
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)

    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "randlora_dropout": "dropout"}

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        previous_dtype = x.dtype
        result = layer(x)
        first, second = self._scaled_bases(layer, dtype)
        x = cast(x, second.dtype)
        result = add(result, mul(linear(linear(dropout(x, self.dropout), first), second), 20.0))
        return cast(result, previous_dtype)

    def _scaled_bases(self, layer: Linear, dtype: str) -> tuple[Tensor, Tensor]:
        """`get_scaled_bases`: the factors (R, n_in) and (n_out, R), R the rank of all bases together."""
        narrow, wide = sorted((layer.n_in, layer.n_out))
        bases = -(-narrow // self.r)
        weights = layer.adapter("randlora_lambda", (self.r, bases), dtype)
        scales = layer.adapter("randlora_gamma", (bases, narrow), dtype)
        update_b = _buffer((wide, bases * self.r), dtype)
        scaled = _unique_base(_buffer((self.r, 1, narrow), dtype), weights, scales)
        update_a = view(scaled, (self.r * bases, narrow))
        if layer.n_in <= layer.n_out:
            return update_a, update_b
        return permute(update_b, (1, 0)), permute(update_a, (1, 0))


def _buffer(shape: tuple[int, ...], dtype: str) -> Tensor:
    """What a layer uses of a shared random matrix: a slice, so it takes no memory of its own."""
    return Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))


def _unique_base(base: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """`UniqueBaseGrad`: λ (r, bases, 1) ∘ A (r, 1, n) ∘ γ (1, bases, n), without keeping the product in between."""
    node = differentiate("UniqueBaseGradBackward", (base, weights, scales), _unique_base_backward)
    with tape().no_grad():
        out = mul(mul(unsqueeze(weights, 2), base), unsqueeze(scales, 0))
    if node:
        node.save(base, weights, scales)
        node.produces(out)
    return out


def _unique_base_backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    """einsum("kbj,kvj,bj->kb") and einsum("kbj,kvj,kb->bj"): a product, then a batched one."""
    (g,), (base, weights, scales) = grads, node.unpack()
    assert g is not None
    r, bases, width = g.shape
    base = unsqueeze(base, 3)
    left = view(permute(mul(unsqueeze(g, 3), base), (1, 0, 2, 3)), (bases, r, width))
    of_weights = permute(view(bmm(left, view(scales, (bases, width, 1))), (bases, r)), (1, 0))
    del left  # a local of the first einsum
    turned = permute(unsqueeze(g, 3), (1, 2, 0, 3))
    right = view(mul(turned, permute(base, (1, 2, 0, 3))), (bases, width, r))
    of_scales = view(bmm(right, unsqueeze(permute(weights, (1, 0)), 2)), (bases, width))
    return (None, of_weights, of_scales)
