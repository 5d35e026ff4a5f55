"""Matrix products inside calls that are more than one plain GEMM: convolutions, products by expert, biased batches.

Only traces of real programs hold them. A convolution is an implicit GEMM (cuDNN's too): rows are output pixels of the
batch, columns output channels, and what is summed over is a filter. Of products by expert (`_grouped_mm`) every expert
gets its even share of the tokens.
"""

from math import prod
from typing import NamedTuple

from ..program.dims import same_shape
from ..program.op import Op, Spec


class Product(NamedTuple):
    """`batch` products (m, k)·(k, n); `layout` as that of a GEMM: nn, tn or nt."""

    layout: str
    m: int
    n: int
    k: int
    batch: int = 1

    @property
    def flops(self) -> int:
        """Multiply and add as two."""
        return 2 * self.m * self.n * self.k * self.batch

    @property
    def depthwise(self) -> bool:
        """Whether every channel is filtered by itself: no matrix at all, and bound by memory."""
        return self.batch > 1 and 1 in (self.m, self.n)


NAMES = ("convolution", "convolution_backward", "_grouped_mm", "baddbmm")


def products(op: Op) -> list[Product]:
    """The products of a call in `NAMES`."""
    if op.name == "baddbmm":
        a, b = (s.shape for s in op.inputs[1:3])
        return [Product("tn", a[1], b[2], a[2], a[0])]
    if op.name == "_grouped_mm":
        return [_by_expert(*op.inputs[:2])]
    if op.name == "convolution":
        x, w = op.inputs[:2]
        return [_convolution(w, x, op.outputs[0])]
    grad, x, w = op.inputs[:3]
    found = []
    for out in op.outputs:
        if same_shape(out.shape, x.shape):
            found.append(_convolution(w, x, grad)._replace(layout="nn"))
        elif same_shape(out.shape, w.shape):
            forward = _convolution(w, x, grad)
            found.append(Product("nt", forward.n, forward.k, forward.m, forward.batch))
    return found


def _pixels(x: Spec) -> int:
    """Positions of (batch, channels, …)."""
    return int(x.shape[0] * prod(x.shape[2:]))


def _convolution(w: Spec, x: Spec, out: Spec) -> Product:
    """(b, c, …) by filters (c_out, c / groups, …), one product a group; transposed filters come as (c, c_out, …)."""
    if w.shape[0] == out.shape[1]:
        groups = x.shape[1] // w.shape[1]
        return Product("tn", _pixels(out), w.shape[0] // groups, prod(w.shape[1:]), groups)
    groups = out.shape[1] // w.shape[1]
    return Product("tn", _pixels(x), prod(w.shape[1:]), w.shape[0] // groups, groups)


def _by_expert(a: Spec, b: Spec) -> Product:
    """(T, k) by (experts, k, n); or for the weights' gradient (m, T) by (T, n), T cut among as many experts."""
    if len(b.shape) == 3:
        experts, k, n = b.shape
        tokens = a.shape[-2] if len(a.shape) == 2 else a.shape[0] * a.shape[1]
        return Product("tn", max(1, tokens // experts), n, k, experts)
    return Product("nt", a.shape[0], b.shape[1], a.shape[1])
