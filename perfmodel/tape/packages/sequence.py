"""Sequence parallel: between layers that tensor-parallel ranks share, each rank has a part of every sequence.

Norms and the residual stream are (batch, seq / ranks, hidden). What a layer cut by columns reads is gathered over the
ranks before it, and what one cut by rows makes is summed and scattered, where all would be summed on every rank
without; backward it is the other way round. Rows of the embedding are cut, too: each rank looks up the words it has.

Source: torch 2.13, distributed/tensor/placement_types.py (`_to_replicate_tensor`, `_reduce_shard_tensor`: dims but the
first are laid out anew for the collective, or behind it), _ops/_embedding_ops.py, distributed/tensor/placement_types.py
(`MaskPartial`); of adapters NeMo Automodel 0.7, components/_peft/lora.py (`LinearLoRA`), components/distributed/
parallel_styles.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...program.dims import Dim, Shape, contiguous_strides, decide, product
from ...program.ranks import Ranks
from ..autograd import differentiate
from ..core import emit, tape
from ..gather import zero_where
from ..linalg import linear, mm
from ..pointwise import binary_bool, cat, sub
from ..shape import clone, contiguous, t, view
from ..tensor import Grads, Node, Parameter, Tensor
from ..transfers import Cut, functional_collective, summed_over

TOKENS = 1  # the dim of a hidden state that is shared


@dataclass(frozen=True)
class GradientPlacement:
    """A gradient that does not lie as its parameter does, and which every use of it brings there anew.

    Attributes:
        ranks: those that the parameter is cut over, or repeated on.
        partial: whether the gradients of the ranks are still to be summed.
        cut: the dim of the parameter that is cut, of which the gradient has all; None where it is whole.

    One that is not partial and of nothing that is cut lies as its parameter does, on all ranks.
    """

    ranks: Ranks
    partial: bool = True
    cut: int | None = None

    def shape(self, own: Shape) -> Shape:
        """The gradient's, of a parameter of which this rank has `own`."""
        if self.cut is None:
            return own
        return tuple(n * self.ranks.size if i == self.cut else n for i, n in enumerate(own))

    @property
    def moves(self) -> bool:
        """Whether the gradient lies elsewhere than its parameter."""
        return self.partial or self.cut is not None

    def in_shards(self) -> "GradientPlacement | None":
        """How it lies once FSDP has brought it to where its parameter is: still on all ranks, or on each its own."""
        return GradientPlacement(self.ranks, partial=False) if self.cut is None else None

    def redistributed(self, grad: Tensor, own: Shape) -> Tensor:
        """The gradient of what this rank has."""
        if not self.moves:
            return grad
        with tape().no_grad():
            if self.cut is None:
                return functional_collective("_c10d_functional::all_reduce", grad, own, self.ranks)
            if self.partial:
                return scattered_sum(grad, self.ranks, self.cut)
            return clone(_part(grad, self.ranks, self.cut))

    def summed(self, p: Parameter) -> list[Tensor]:
        """The gradients of all layers' parameters, summed over the ranks where they are not yet."""
        grad = p.grad
        if grad is None or not self.partial:
            return []
        return [
            functional_collective("_c10d_functional::all_reduce", grad, grad.shape, self.ranks) for _ in range(p.count)
        ]


class SequenceCut(Cut):
    """How a layer is cut whose input is gathered before a norm's output leaves it, and whose output is scattered."""

    __slots__ = ()

    def given(self, x: Tensor) -> Tensor:
        """The layer's input: its gradients are summed where all that read it are through (`gathered_along`)."""
        return x

    def made(self, y: Tensor) -> Tensor:
        """The layer's output."""
        return scattered_tokens(y, self.ranks) if self.by == "rows" else y


class TensorParallel(NamedTuple):
    """What tensor-parallel ranks do that share words, and if `tokens` those between layers, too.

    `redistributes`: whether the gradient of words is cut like their weight at once, because it is added to another one.
    """

    ranks: Ranks
    tokens: bool
    redistributes: bool

    def cut(self, by: str) -> Cut:
        """How they share a layer."""
        return SequenceCut(by, self.ranks) if self.tokens else Cut(by, self.ranks)

    def gathered(self, x: Tensor) -> Tensor:
        """All tokens of a hidden state."""
        return gathered_along(x, self.ranks) if self.tokens else x

    def repeated(self, p: Parameter) -> Parameter:
        """A norm's parameter, which all ranks have: of shared tokens each has a gradient of its own alone."""
        if self.tokens:
            p.placement = GradientPlacement(self.ranks)
        return p

    def rows(self, rows: Dim, width: Dim) -> Shape:
        """What one of them has of an embedding."""
        return rows // self.ranks.size, width

    def words(self, weight: Parameter, ids: Tensor) -> Tensor:
        """Words of (batch, seq) ids: (batch, seq, width), or of a rank's own tokens."""
        weight.elements = weight.numel * self.ranks.size
        weight.placement = None if self.redistributes else GradientPlacement(self.ranks, partial=False, cut=0)
        words = own_words(weight, ids, self.ranks)
        return scattered_tokens(words, self.ranks) if self.tokens else summed_over(words, self.ranks)


def gathered_along(x: Tensor, ranks: Ranks, dim: int = TOKENS) -> Tensor:
    """All of what is shared along a dim: n along it is n · ranks; gradients of all ranks are summed and scattered."""
    return _redistributed(x, gathered_parts, _scatter, ranks, dim)


def scattered_tokens(x: Tensor, ranks: Ranks) -> Tensor:
    """Own tokens of a sum whose parts lie on all ranks: n of them are n / ranks; gradients are gathered."""
    return _redistributed(x, scattered_sum, _gather, ranks, TOKENS)


def _redistributed(
    x: Tensor, forward: Callable[[Tensor, Ranks, int], Tensor], backward: Callable[..., Any], ranks: Ranks, dim: int
) -> Tensor:
    node = differentiate("RedistributeBackward", (x,), backward, (ranks, dim))
    with tape().no_grad():
        out = forward(x, ranks, dim)
    if node is not None:
        node.produces(out)
    return out


def own_words(weight: Parameter, ids: Tensor, ranks: Ranks) -> Tensor:
    """Rows of a weight (words / ranks, width) that has every rank's own words by (batch, seq) ids, else zeros.

    Its gradient is that of all words, as if every rank had them.
    """
    width, cut = weight.shape[1], ranks if weight.placement is None else None
    node = differentiate("EmbeddingBackward0", (weight,), _words_backward, (weight.shape[0] * ranks.size, width, cut))
    if node is not None:
        node.save(ids)
    with tape().no_grad():
        below, above = emit("lt.Scalar", (ids,), ids.shape, "bool"), emit("ge.Scalar", (ids,), ids.shape, "bool")
        absent = binary_bool("__or__.Tensor", below, above)
        del below, above
        shifted = sub(clone(ids), 1.0)
        zero_where(shifted, absent)
        out = emit("embedding", (weight, shifted), (*ids.shape, width), weight.dtype)
        zero_where(out, absent)
    if node is not None:
        node.produces(out)
    return out


def gathered_parts(x: Tensor, ranks: Ranks, dim: int) -> Tensor:
    """`Shard` to `Replicate`: parts lie behind one another as they come, and are copied unless that is their order."""
    every = (x.shape[0] * ranks.size, *x.shape[1:])
    came = functional_collective("_c10d_functional::all_gather_into_tensor", x, every, ranks)
    if dim == 0 or decide(product(x.shape[:dim]) == 1):
        whole = tuple(n * ranks.size if i == dim else n for i, n in enumerate(x.shape))
        return Tensor(whole, x.dtype, contiguous_strides(whole), came.numel, came.storage)
    return cat([Tensor(x.shape, x.dtype, x.strides, x.numel, came.storage) for _ in range(int(ranks.size))], dim)


def scattered_sum(x: Tensor, ranks: Ranks, dim: int) -> Tensor:
    """`Partial` to `Shard`."""
    if dim:
        x = cat([_part(x, ranks, dim) for _ in range(int(ranks.size))], 0)
    own = (x.shape[0] // ranks.size, *x.shape[1:])
    return functional_collective("_c10d_functional::reduce_scatter_tensor", x, own, ranks)


def _part(x: Tensor, ranks: Ranks, dim: int) -> Tensor:
    """A rank's part of a tensor, a view."""
    shape = tuple(n // ranks.size if i == dim else n for i, n in enumerate(x.shape))
    return Tensor(shape, x.dtype, x.strides, product(shape), x.storage)


def _scatter(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (ranks, dim), (grad,) = node.attrs, grads
    assert grad is not None
    return (scattered_sum(grad, ranks, dim),)


def _gather(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (ranks, dim), (grad,) = node.attrs, grads
    assert grad is not None
    return (gathered_parts(grad, ranks, dim),)


def _words_backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (rows, width, cut), (grad,), (ids,) = node.attrs, grads, node.unpack()
    assert grad is not None
    whole = emit("embedding_dense_backward", (grad, ids), (rows, width), grad.dtype)
    return (whole if cut is None else clone(_part(whole, cut, 0)),)


def low_of_rows(x: Tensor, a: Parameter, ranks: Ranks) -> Tensor:
    """x·Aᵀ by what a rank has of a layer cut by rows, to be summed: (batch, seq, n / ranks) → (batch, seq, rank).

    Its gradient comes in parts of the adapter's rank, which both products of it gather.
    """
    node = differentiate("LinearBackward0", (x, a), _low_backward, (ranks,))
    if node is not None:
        node.save(x if node.needs[1] else None, a if node.needs[0] else None)
    with tape().no_grad():
        out = linear(x, a)
    if node is not None:
        node.produces(out)
    return out


def high_of_rows(low: Tensor, b: Parameter, ranks: Ranks) -> Tensor:
    """low·Bᵀ, to be summed: (batch, seq, rank) in parts that are to be summed → (batch, seq, n).

    Each rank takes a part of the adapter's rank from the sum, and keeps of `low` what it was given: so the gradient of
    B (n, rank / ranks) is that of all of B, and not summed.
    """
    b.placement = GradientPlacement(ranks, partial=True, cut=1)
    node = differentiate("LinearBackward0", (low, b), _high_backward)
    if node is not None:
        node.save(low, b)
    with tape().no_grad():
        out = view(linear(scattered_sum(_matrix(low), ranks, 1), b), (*low.shape[:-1], b.shape[0]))
    if node is not None:
        node.produces(out)
    return out


def _matrix(x: Tensor) -> Tensor:
    return view(x, (product(x.shape[:-1]), x.shape[-1]))


def _low_backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (ranks,), (grad,), (x, a) = node.attrs, grads, node.unpack()
    assert grad is not None
    of_low, grad_a = _matrix(grad), None
    if x is not None:
        grad_a = mm(gathered_parts(contiguous(t(of_low)), ranks, 0), _matrix(x))
    if a is None:
        return (None, grad_a)
    grad_x = mm(gathered_parts(of_low, ranks, 1), a)
    return (view(grad_x, (*grad.shape[:-1], a.shape[1])), grad_a)


def _high_backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (grad,), (low, b) = grads, node.unpack()
    assert grad is not None
    of_out = _matrix(grad)
    grad_b = mm(t(of_out), _matrix(low))
    return (view(mm(of_out, b), (*grad.shape[:-1], b.shape[1])), grad_b)
