"""Stand-ins for the flash-attn package under transformers' own code: its operators for documents and padding.

Source: flash-attn 2.8, flash_attn/flash_attn_interface.py (`FlashAttnVarlenFunc`), bert_padding.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import register_flop_formula

from perfmodel.tracing.packages import flash_attn

T = torch.Tensor
FORWARD, BACKWARD = 2, 5  # products of the size of the attention
DOCUMENT = {"tokens": 1}  # of each, for FLOPs


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def varlen_forward(q: T, k: T, v: T, ends_q: T, ends_k: T, longest_q: int, longest_k: int, window: int) -> tuple[T, T]:
    """Attention of (tokens, heads, head_dim) within documents, and the log-sum-exp of every row."""
    raise NotImplementedError("traced only")


@varlen_forward.register_fake
def _(q: T, k: T, v: T, ends_q: T, ends_k: T, longest_q: int, longest_k: int, window: int) -> tuple[T, T]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=())
def varlen_backward(
    do: T, q: T, k: T, v: T, out: T, lse: T, ends_q: T, ends_k: T, longest_q: int, longest_k: int, window: int
) -> tuple[T, T, T]:
    """Gradients of q, k and v."""
    raise NotImplementedError("traced only")


@varlen_backward.register_fake
def _(
    do: T, q: T, k: T, v: T, out: T, lse: T, ends_q: T, ends_k: T, longest_q: int, longest_k: int, window: int
) -> tuple[T, T, T]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _within_documents(products: int, q: Any, window: int) -> int:
    """A causal mask is not deducted, nor is a window as wide as a document: all less than one apart."""
    (tokens, heads, head_dim), longest = q, DOCUMENT["tokens"]
    apart = longest if window < 0 else window
    pairs = sum(min(longest, i + apart) - max(0, i + 1 - apart) for i in range(longest)) * tokens // longest
    return int(products * 2 * heads * pairs * head_dim)


@register_flop_formula(torch.ops.flash_attn._flash_attn_varlen_forward)
def _flops(q: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _within_documents(FORWARD, q, args[-1])


@register_flop_formula(torch.ops.flash_attn._flash_attn_varlen_backward)
def _backward_flops(do: Any, q: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _within_documents(BACKWARD, q, args[-1])


class FlashAttnVarlenFunc(torch.autograd.Function):
    """As the package's, without dropout and ALiBi."""

    @staticmethod
    def forward(ctx: Any, q: T, k: T, v: T, ends_q: T, ends_k: T, longest_q: Any, longest_k: Any, window: int) -> T:
        forward = torch.ops.flash_attn._flash_attn_varlen_forward
        out, lse = forward(q, k, v, ends_q, ends_k, longest_q, longest_k, window)
        ctx.save_for_backward(q, k, v, out, lse, ends_q, ends_k)
        ctx.others = longest_q, longest_k, window
        return out

    @staticmethod
    def backward(ctx: Any, do: T) -> Any:
        backward = torch.ops.flash_attn._flash_attn_varlen_backward
        return (*backward(do, *ctx.saved_tensors, *ctx.others), None, None, None, None, None)


def flash_attn_varlen_func(
    q: T, k: T, v: T, cu_seqlens_q: T, cu_seqlens_k: T, max_seqlen_q: Any, max_seqlen_k: Any, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, deterministic: bool = False,
) -> T:  # fmt: skip
    """The package's function, for what transformers passes."""
    window = -1 if window_size[0] < 0 else window_size[0] + 1
    return FlashAttnVarlenFunc.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window)


class IndexPutFirstAxis(torch.autograd.Function):
    """Rows at their places among zeros."""

    @staticmethod
    def forward(ctx: Any, values: T, indices: T, first: int) -> T:
        ctx.save_for_backward(indices)
        output = torch.zeros(first, *values.shape[1:], device=values.device, dtype=values.dtype)
        output[indices] = values
        return output

    @staticmethod
    def backward(ctx: Any, grad: T) -> Any:
        (indices,) = ctx.saved_tensors
        return grad[indices], None, None


def pad_input(hidden_states: T, indices: T, batch: int, seqlen: int) -> T:
    """The package's function."""
    output = IndexPutFirstAxis.apply(hidden_states, indices, batch * seqlen)
    return output.view(batch, seqlen, *hidden_states.shape[1:])


@contextmanager
def installed(tokens: int, *, packed: bool) -> Iterator[None]:
    """Let transformers take these for the package; every document has so many tokens."""
    with (
        patch.dict(DOCUMENT, tokens=tokens),
        flash_attn.flash_attn_in_place(flash_attn_varlen_func, pad_input, packed=packed),
    ):
        yield
