"""The matrix products of a call: one GEMM, several, a convolution, products by expert.

A convolution is an implicit GEMM (cuDNN's too): rows are output pixels of the
batch, columns output channels, and what is summed over is a filter. Of products by expert (`_grouped_mm`) every expert
gets the rows that the op's routing gives it: an even share, if it says nothing.
"""

from math import prod
from typing import NamedTuple

from ..program.dims import Dim, is_one, product, same_shape
from ..program.op import Op, Spec
from ..program.routing import Routing


class Product(NamedTuple):
    """`batch` products (m, k)·(k, n); `layout` as that of a GEMM: nn, tn or nt."""

    layout: str
    m: Dim
    n: Dim
    k: Dim
    batch: Dim = 1

    @property
    def flops(self) -> Dim:
        """Multiply and add as two."""
        return 2 * self.m * self.n * self.k * self.batch

    def depthwise(self, op: Op) -> bool:
        """Whether a convolution filters every channel by itself: no matrix at all, and bound by memory."""
        return op.name.startswith("convolution") and self.batch > 1 and (is_one(self.m) or is_one(self.n))


def mm(op: Op) -> list[Product]:
    """(m, k)·(k, n)."""
    return [_plain(op, *op.inputs[:2])]


def addmm(op: Op) -> list[Product]:
    """A bias, or what the product is added to, comes before the factors."""
    return [_plain(op, *op.inputs[1:3])]


def _plain(op: Op, a: Spec, b: Spec) -> Product:
    return Product(op.attrs.layout or "tn", a.shape[0], b.shape[1], a.shape[1])


def bmm(op: Op) -> list[Product]:
    """(h, m, k)·(h, k, n)."""
    return [_batched(*op.inputs[:2])]


def baddbmm(op: Op) -> list[Product]:
    """As `bmm`, added to a tensor that comes first."""
    return [_batched(*op.inputs[1:3])]


def _batched(a: Spec, b: Spec) -> Product:
    return Product("tn", a.shape[1], b.shape[2], a.shape[2], a.shape[0])


def of_rows(op: Op) -> list[Product]:
    """(m, k) by the rows of (n, k), as bitsandbytes hands over its 8-bit operands."""
    a, b = (spec.shape for spec in op.inputs)
    return [Product("tn", a[0], b[0], a[1])]


def rides_along(op: Op) -> list[Product]:
    """LoRAFusion's kernels have the adapter's product ride along.

    r more elements to sum over, or for the gradients of both factors, one pass over dy with twice r columns.
    """
    a, b, c = (spec.shape for spec in op.inputs[:3])
    if op.name == "lorafusion::xw_sb":  # x·Wᵀ + s·Bᵀ: (T, n), (m, n), (T, r), (m, r)
        return [Product("tn", a[0], b[0], a[1] + c[1])]
    if op.name == "lorafusion::dys_dyb":  # gᵀ·s and g·B: (T, m), (m, r), (T, r)
        return [Product("nn", a[0], 2 * c[1], a[1])]
    return [Product("nn", a[0], b[1], a[1] + c[1])]  # g·W + ds·A: (T, m), (m, n), (T, r), (r, n)


def cut_logits(op: Op) -> list[Product]:
    """Cut cross entropy forward: rows (T, k) of which `labelled` (n,) are taken, by all words (m, k)."""
    rows, words, labelled = (spec.shape for spec in op.inputs[:3])
    return [Product("tn", labelled[0], words[0], rows[1])]


# What cut cross entropy does of its gradients' products: tiles whose gradients 16 bits would not show are left out. Of
# 8,192 tokens of Alpaca, Gemma 2 2B (vocabulary 256,000) on an A100: backward 89.3 ms (apple/ml-cross-entropy,
# README.md), of which the logits take 41 as priced and zeros and a sort 1; both products whole would be 80. Of random
# numbers on an H100, forward and backward of 16,384 and 4,096 tokens, vocabulary 248,320, width 2,048, take 92.6 and
# 23.2 ms (huggingface/trl, pull request 6858); 79.3 and 19.2 are predicted. Triton's products, priced as cuBLAS's, seem
# slower than those by an eighth: forward takes 46.4 ms on the A100, where 40.6 are predicted.
KEPT_GRADIENTS = 0.6


def cut_gradients(op: Op) -> list[Product]:
    """Cut cross entropy backward: the logits once more, then of rows and words what a gradient is asked for."""
    again = cut_logits(op)
    ((_, n, m, k, _),) = again
    kept = int(KEPT_GRADIENTS * m)
    wanted = [x.shape for x in op.outputs if x.dtype != "i32"]  # others are locks
    of_rows = op.inputs[0].shape
    return again + [Product(*(("nn", n, k, kept) if same_shape(x, of_rows) else ("nt", kept, k, n))) for x in wanted]


def by_expert(op: Op) -> list[Product]:
    """`_grouped_mm`: (rows, k) by (experts, k, n), or for the weights' gradient (m, rows) by (rows, n), cut by expert.

    Experts that get as many rows as others are one batch of products; those without any have none.
    """
    a, b = op.inputs[:2]
    if len(a.shape) == len(b.shape) == 3:
        return [_batched(a, b)]
    forward = len(b.shape) == 3
    rows, experts = (a.shape[0], b.shape[0]) if forward else (b.shape[0], op.outputs[0].shape[0])
    groups = (op.attrs.routing or Routing(experts)).groups(rows)
    if forward:
        return [Product(op.attrs.layout or "tn", m, b.shape[2], b.shape[1], batch) for m, batch in groups]
    return [Product("nt", a.shape[0], b.shape[1], k, batch) for k, batch in groups]


def convolution(op: Op) -> list[Product]:
    """Of an input by filters."""
    x, w = op.inputs[:2]
    return [_convolution(op, w, x, op.outputs[0])]


def convolution_backward(op: Op) -> list[Product]:
    """The gradients of input and filters, those that are asked for."""
    grad, x, w = op.inputs[:3]
    found = []
    for out in op.outputs:
        if same_shape(out.shape, x.shape):
            found.append(_convolution(op, w, x, grad)._replace(layout="nn"))
        elif same_shape(out.shape, w.shape):
            forward = _convolution(op, w, x, grad)
            found.append(Product("nt", forward.n, forward.k, forward.m, forward.batch))
    return found


def _pixels(x: Spec) -> Dim:
    """Positions of (batch, channels, …)."""
    return x.shape[0] * product(x.shape[2:])


def _convolution(op: Op, w: Spec, x: Spec, out: Spec) -> Product:
    """(b, c, …) by filters (c_out, c / groups, …), one product a group; transposed filters come as (c, c_out, …)."""
    if not op.attrs.transposed:
        groups = x.shape[1] // w.shape[1]
        return Product("tn", _pixels(out), w.shape[0] // groups, prod(w.shape[1:]), groups)
    groups = out.shape[1] // w.shape[1]
    return Product("tn", _pixels(x), prod(w.shape[1:]), w.shape[0] // groups, groups)
