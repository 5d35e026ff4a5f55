"""The forms that a program takes on a GPU where the CPU's dispatch differs, for traces on fake CPU tensors.

Dropout is one fused kernel with a bool mask, an RMS norm of torch one kernel, scaled dot product attention one of
CUDA's kernels, chosen as the tape chooses (`perfmodel.calls.sdpa`), and autocast casts more (`autocast`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..calls import sdpa
from ..program.software import CURRENT, SoftwareStack
from . import fused_norm
from .autocast import autocast_operands, cuda_autocast

aten = torch.ops.aten
functional = torch.nn.functional


@contextmanager
def cuda_forms(capability: str, stack: SoftwareStack = CURRENT) -> Iterator[None]:
    """Dispatch dropout, RMS norms, attention and autocast as CUDA does on a card of that compute capability."""
    first = stack.prefers_cudnn(capability)
    with (
        cuda_autocast(),
        patch.object(functional, "dropout", _dropout(functional.dropout)),
        patch.object(functional, "rms_norm", fused_norm.instead_of(functional.rms_norm)),
        patch.object(functional, "scaled_dot_product_attention", _attention(capability, cudnn_first=first)),
    ):
        yield


def _dropout(original: Any) -> Any:
    def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if p == 0 or not training:
            return original(input, p, training, inplace)  # type: ignore[no-any-return]
        return torch.native_dropout(input, p, True)[0]

    return dropout


def _attention(capability: str, *, cudnn_first: bool) -> Any:
    original = functional.scaled_dot_product_attention

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        query, key, value, attn_mask = autocast_operands(query, key, value, attn_mask)
        kernel = _choose(query, key, value, attn_mask, capability, cudnn_first)
        if kernel == "math" and dropout_p > 0:
            return _by_parts(query, key, value, attn_mask, dropout_p, is_causal=is_causal, scale=scale)
        if kernel == "math":
            with sdpa_kernel(SDPBackend.MATH):
                return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        bias = _additive(attn_mask, query)
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
                query, key, value, bias, True, dropout_p, is_causal, False, scale=scale
            )[0]
        if kernel == "flash":
            return aten._scaled_dot_product_flash_attention(  # type: ignore[no-any-return]
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if bias is not None and bias.requires_grad:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]

    return attention


def _by_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, p: float, *, is_causal: bool,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """`_scaled_dot_product_attention_math` (transformers/attention.cpp), which calls the CPU's dropout from C++."""
    dtype, factor = q.dtype, ((1 / q.shape[-1] ** 0.5) if scale is None else scale) ** 0.5
    with torch.autocast("cpu", enabled=False):
        mask = _additive(mask, q)
        if dtype in (torch.bfloat16, torch.float16):
            q, k, v = q.float(), k.float(), v.float()
        unscaled, q = q, aten.mul.Scalar(q, factor)  # C++ holds the first to the end
        if is_causal:
            lower = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            mask = _additive(lower, q)
        if (groups := q.shape[-3] // k.shape[-3]) > 1:
            k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
        weights = q @ aten.mul.Scalar(k.transpose(-2, -1), factor)
        weights = weights if mask is None else weights + mask
        weights = functional.dropout(aten._safe_softmax(weights, -1), p)
        dropped = weights.to(dtype)  # the weights, which the caller drops
        out: torch.Tensor = (weights @ v).to(dtype)
    del unscaled, dropped
    return out


def _choose(q: Any, k: Any, v: Any, mask: Any, capability: str, cudnn_first: bool) -> sdpa.Kernel:
    """The kernel for (b, h, s, d) operands."""
    if any(t.dim() != 4 for t in (q, k, v)):
        return "math"
    return sdpa.choose(
        capability, q.shape[-1], v.shape[-1], cudnn_first=cudnn_first,
        half=q.dtype in (torch.bfloat16, torch.float16), grouped=q.shape[1] != k.shape[1], masked=mask is not None,
        mask_trained=mask is not None and mask.requires_grad,
    )  # fmt: skip


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A bool mask as 0 / -inf (`convert_boolean_attn_mask`)."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        zero, low = (torch.scalar_tensor(x, dtype=query.dtype) for x in (0.0, float("-inf")))
        mask = torch.where(mask, zero, low)
    return mask
