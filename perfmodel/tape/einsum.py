"""Contractions of `torch.einsum` that adapters write, as ATen does them: permute, one bmm, permute back."""

from .linalg import autocast_operand, bmm
from .shape import permute, reshape, view
from .tensor import Tensor


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """`einsum("blni,nir->blnr")`: each of n groups of features has a matrix of its own."""
    batch, seq, groups, width = x.shape
    flat = reshape(permute(x, (2, 0, 1, 3)), (groups, batch * seq, width))
    out = bmm(autocast_operand(flat), autocast_operand(w))
    return permute(view(out, (groups, batch, seq, w.shape[-1])), (1, 2, 0, 3))


def per_frequency(x: Tensor, w: Tensor) -> Tensor:
    """`einsum("blnk,mnk->blmk")`: at each of k frequencies a matrix (m, n)."""
    batch, seq, n, k = x.shape
    flat = reshape(permute(x, (3, 0, 1, 2)), (k, batch * seq, n))
    out = bmm(flat, permute(w, (2, 1, 0)))
    return permute(view(out, (k, batch, seq, w.shape[0])), (1, 2, 3, 0))


def per_frequency_transposed(g: Tensor, w: Tensor) -> Tensor:
    """`einsum("blmk,mnk->blnk")`: the input gradient of `per_frequency`."""
    return per_frequency(g, permute(w, (1, 0, 2)))


def per_frequency_outer(g: Tensor, x: Tensor) -> Tensor:
    """`einsum("blmk,blnk->mnk")`: the weight gradient of `per_frequency`."""
    batch, seq, m, k = g.shape
    rows = reshape(permute(g, (3, 2, 0, 1)), (k, m, batch * seq))
    columns = reshape(permute(x, (3, 0, 1, 2)), (k, batch * seq, x.shape[2]))
    return permute(bmm(rows, columns), (1, 2, 0))
