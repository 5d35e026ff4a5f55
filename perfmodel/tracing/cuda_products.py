"""CUDA's `addmm` of 16-bit factors into a sum in fp32 (`out_dtype`), which torch has for no CPU: of the same name.

On real tensors it is computed, so that what is traced on them can be compared.
"""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .fused_norm import library

T = torch.Tensor
library.define(
    "addmm.dtype_out(Tensor self, Tensor mat1, Tensor mat2, ScalarType out_dtype, *, Tensor(a!) out) -> Tensor(a!)"
)


def add_product(total: T, a: T, b: T) -> None:
    """total += a·b, by one product."""
    torch.ops.cuda_forms.addmm.dtype_out(total, a, b, torch.float32, out=total)


@torch.library.impl(library, "addmm.dtype_out", "CPU")
def _added(self: T, mat1: T, mat2: T, out_dtype: torch.dtype, *, out: T) -> T:
    return out.copy_(self + mat1.to(out_dtype) @ mat2.to(out_dtype))


@torch.library.impl(library, "addmm.dtype_out", "Meta")
def _added_to(self: T, mat1: T, mat2: T, out_dtype: torch.dtype, *, out: T) -> T:
    return out


@register_flop_formula(torch.ops.cuda_forms.addmm)
def _flops(total: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])
