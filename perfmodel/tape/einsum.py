"""Contractions of `torch.einsum` that adapters write, as ATen does them: permute, one bmm, permute back.

`...` are the dims of a batch, of which there may be any number (OPT's MLP gets all tokens as one).
"""

from ..program.dims import Shape, product
from .linalg import autocast_operand, bmm
from .shape import permute, reshape, unsqueeze, view
from .tensor import Tensor


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """`einsum("...ni,nir->...nr")`: each of n groups of features has a matrix of its own."""
    *batch, groups, width = x.shape
    n = len(batch)
    flat = _operand(x, (n, *range(n), n + 1), (groups, product(batch), width))
    out = bmm(autocast_operand(flat), autocast_operand(w))
    return permute(view(out, (groups, *batch, w.shape[-1])), (*range(1, n + 1), 0, n + 1))


def per_frequency(x: Tensor, w: Tensor) -> Tensor:
    """`einsum("...nk,mnk->...mk")`: at each of k frequencies a matrix (m, n)."""
    *batch, n, k = x.shape
    dims = range(len(batch))
    flat = _operand(x, (len(batch) + 1, *dims, len(batch)), (k, product(batch), n))
    out = bmm(flat, permute(w, (2, 1, 0)))
    return permute(view(out, (k, *batch, w.shape[0])), (*range(1, len(batch) + 2), 0))


def per_frequency_transposed(g: Tensor, w: Tensor) -> Tensor:
    """`einsum("...mk,mnk->...nk")`: the input gradient of `per_frequency`."""
    return per_frequency(g, permute(w, (1, 0, 2)))


def per_frequency_outer(g: Tensor, x: Tensor) -> Tensor:
    """`einsum("...mk,...nk->mnk")`: the weight gradient of `per_frequency`."""
    *batch, m, k = g.shape
    n, tokens = len(batch), product(batch)
    rows = _operand(g, (n + 1, n, *range(n)), (k, m, tokens))
    columns = _operand(x, (n + 1, *range(n), n), (k, tokens, x.shape[n]))
    return permute(bmm(rows, columns), (1, 2, 0))


def _operand(x: Tensor, order: tuple[int, ...], shape: Shape) -> Tensor:
    """An operand of the bmm; the label that only the other one has is a dim of 1 (ATen's `sumproduct_pair`)."""
    return reshape(unsqueeze(permute(x, order), len(order)), shape)
