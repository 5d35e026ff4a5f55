"""Calls whose result has a size, or a rule for fake tensors, that hangs on data; results that those rules lay out
otherwise than PyTorch's kernels: what reads them would copy them.
"""

from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
ALL_SET = "all_set"  # the attribute of a tensor of flags that are taken for set


def picking_all(func: Any, args: Any, kwargs: Any) -> Any:
    """The call, rows that a list of flags picks being all of them: the size of a result cannot hang on data."""
    if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
        return _products_by_group(func, args, kwargs)
    try:
        return func(*args, **kwargs)
    except DynamicOutputShapeException:
        if func is aten.nonzero.default and (args[0].dim() == 1 or hasattr(args[0], ALL_SET)):
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if func is aten.index.Tensor and any(hasattr(t, ALL_SET) for t in args[1]):
            (flags,) = args[1]
            return func(args[0], [torch.empty(flags.numel(), dtype=torch.long) for _ in flags.shape])
        if not any(_is_flags(t) for t in tree_leaves(args)):
            raise
        return func(*tree_map(lambda t: torch.empty_like(t, dtype=torch.long) if _is_flags(t) else t, args), **kwargs)


def all_set(flags: torch.Tensor) -> torch.Tensor:
    """Flags of any shape of which a trace may take all for set."""
    setattr(flags, ALL_SET, True)
    return flags


def _products_by_group(func: Any, args: Any, kwargs: Any) -> Any:
    """Products by group in any dtype: the real kernels take all, the rule for fake tensors bf16 alone."""
    *operands, dtype = (*(t.to(torch.bfloat16) for t in args[:2]), args[0].dtype)
    return func(*operands, *args[2:], **kwargs).to(dtype)


def _is_flags(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and t.dtype == torch.bool and t.dim() == 1


def as_kernels_have_them(func: Any, out: Any) -> Any:
    """The results of a call in the strides of its kernel.

    The gradients of a layer norm are contiguous whatever the gradient that comes in (`LayerNormBackwardKernel` in
    aten/src/ATen/native/layer_norm.cpp and cuda/layer_norm_kernel.cu); the rule hands on the strides of that.
    """
    if func is not aten.native_layer_norm_backward.default:
        return out
    return tuple(t if t is None or t.is_contiguous() else t.new_empty(t.shape) for t in out)
