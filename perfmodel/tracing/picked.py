"""Calls whose result has a size, or a rule for fake tensors, that hangs on data."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten


def picking_all(func: Any, args: Any, kwargs: Any) -> Any:
    """The call, rows that a list of flags picks being all of them: the size of a result cannot hang on data."""
    if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        return _products_by_group(func, args, kwargs)
    try:
        return func(*args, **kwargs)
    except DynamicOutputShapeException:
        if func is aten.nonzero.default and args[0].dim() == 1:
            return args[0].new_empty((args[0].numel(), 1), dtype=torch.long)
        if not any(_is_flags(t) for t in tree_leaves(args)):
            raise
        return func(*tree_map(lambda t: torch.empty_like(t, dtype=torch.long) if _is_flags(t) else t, args), **kwargs)


def _products_by_group(func: Any, args: Any, kwargs: Any) -> Any:
    """Products by group in any dtype: the real kernels take all, the rule for fake tensors bf16 alone."""
    *operands, dtype = (*(t.to(torch.bfloat16) for t in args[:2]), args[0].dtype)
    return func(*operands, *args[2:], **kwargs).to(dtype)


def _is_flags(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.dtype == torch.bool and t.dim() == 1
