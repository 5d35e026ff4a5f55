"""ResLoRA's three shortcuts: what an adapter adds to a layer's result, with help of the layer in earlier blocks."""

from dataclasses import dataclass

from ...architectures.masks import read_scalar
from ...tape.core import emit
from ...tape.inplace import add_in_place, add_to_output
from ...tape.linalg import matmul
from ...tape.pointwise import add, dropout, fill, mul
from ...tape.shape import transpose
from ...tape.tensor import Tensor
from .base import Linear

Pair = tuple[Tensor, Tensor]  # A (r, n_in) and B (n_out, r)


@dataclass(frozen=True)
class Adapter:
    """The adapter of a layer. It keeps what later blocks ask for, as the authors' modules do in attributes."""

    layer: Linear
    weights: Pair
    dropout: float
    reach: int
    merge_flag: int

    def down(self, x: Tensor, weights: Pair) -> Tensor:
        """xAᵀ."""
        return matmul(dropout(x, self.dropout), transpose(weights[0], 0, 1))

    def add(self, result: Tensor, middle: Tensor, weights: Pair) -> Tensor:
        """`result += (α/r)·middle·Bᵀ`; a layer with a bias returns a view of its product."""
        delta = mul(matmul(middle, transpose(weights[1], 0, 1)), 1.0)
        return add_to_output(result, delta, viewed=self.layer.has_bias)

    def keep(self, what: str, value: Tensor) -> None:
        """`self.what = value`."""
        self.layer.scope.build.keep((self.layer.name, what, self.layer.scope.layer), value)

    def earlier(self, what: str) -> list[Tensor]:
        """What the same layer kept in earlier blocks, the nearest first, as far as the shortcut reaches."""
        kept, index = self.layer.scope.build.kept, self.layer.scope.layer
        found = {k[2]: t for k, (t, _) in kept.items() if k[:2] == (self.layer.name, what) and k[2] < index}
        return [found[i] for i in sorted(found, reverse=True)[: self.reach]]


def of_input(adapter: Adapter, result: Tensor, x: Tensor) -> Tensor:
    """The adapter reads x + x₋₁, in the first block x + x."""
    if adapter.merge_flag == 4:
        _read_norm(x)
    adapter.keep("input", x)
    before = adapter.earlier("input")
    middle = adapter.down(add(x, before[0] if before else x), adapter.weights)
    return adapter.add(result, middle, adapter.weights)


def of_block(adapter: Adapter, result: Tensor, x: Tensor) -> Tensor:
    """The adapters of earlier blocks run on x too, one after another."""
    for name, weight in zip("AB", adapter.weights, strict=True):
        adapter.keep(name, weight)
    before = zip(adapter.earlier("A"), adapter.earlier("B"), strict=True)
    for weights in (adapter.weights, *before):
        result = adapter.add(result, adapter.down(x, weights), weights)
    return result


def of_middle(adapter: Adapter, result: Tensor, x: Tensor) -> Tensor:
    """B reads xAᵀ + Σ of what it was in earlier blocks."""
    before = adapter.earlier("middle")
    total = fill("zeros_like", before[0].shape, before[0].dtype, like=before[0]) if before else None
    for earlier in before:
        assert total is not None
        total = add_in_place(total, earlier)
    middle = adapter.down(x, adapter.weights)
    adapter.keep("middle", middle)
    result = adapter.add(result, middle if total is None else add(middle, total), adapter.weights)
    if adapter.merge_flag:
        _read_norm(middle if adapter.merge_flag == 4 else x)
    return result


SHORTCUTS = {"is": of_input, "bs": of_block, "ms": of_middle}


def _read_norm(x: Tensor) -> None:
    """`torch.norm(x).item()`: the host waits for the device."""
    read_scalar(emit("linalg_vector_norm", (x,), (), x.dtype))
