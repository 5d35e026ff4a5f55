"""Sparse tensors (COO) without data: fake ones forget how many values they hold where a call makes one of another."""

from typing import Any

import torch

aten = torch.ops.aten


def with_values(func: Any, args: Any, out: Any) -> Any:
    """The result of a call, as many values in it as in the sparse operand whose places it has."""
    if not _is_sparse(out) or out._nnz():
        return out
    places = next((t for t in reversed(args) if _is_sparse(t)), None)
    if places is None or not places._nnz():
        return out
    indices, values = places._indices().clone(), out.new_empty(places._nnz(), layout=torch.strided)
    merged = func is aten._coalesce.default or places.is_coalesced()
    return aten._sparse_coo_tensor_with_dims_and_tensors(
        out.sparse_dim(), out.dense_dim(), out.shape, indices, values,
        dtype=out.dtype, layout=out.layout, device=out.device, is_coalesced=merged,
    )  # fmt: skip


def parts(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors as memory has them: of a sparse one its indices and its values."""
    return [part for t in tensors for part in ((t._indices(), t._values()) if _is_sparse(t) else (t,))]


def _is_sparse(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.layout == torch.sparse_coo
