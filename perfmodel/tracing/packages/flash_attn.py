"""The flash-attn package where there is none: its operators on fake tensors, under transformers' own code around them.

Source: flash-attn 2.8, flash_attn/flash_attn_interface.py (`FlashAttnFunc`), of a dense batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from ...program.lengths import band

T = torch.Tensor
NO_WINDOW = -1


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=())
def flash_forward(q: T, k: T, v: T, causal: bool, window: int) -> tuple[T, T]:
    """Attention of (batch, seq, heads, head_dim), and the log-sum-exp of every row."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).float() for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k) * q.shape[-1] ** -0.5
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    scores = (
        scores.masked_fill(~allowed.triu(1 - window) if window > 0 else ~allowed, float("-inf")) if causal else scores
    )
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).to(q.dtype), scores.logsumexp(-1)


@flash_forward.register_fake
def _(q: T, k: T, v: T, causal: bool, window: int) -> tuple[T, T]:
    return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=())
def flash_backward(do: T, q: T, k: T, v: T, out: T, lse: T, causal: bool, window: int) -> tuple[T, T, T]:
    """Gradients of q, k and v."""
    raise NotImplementedError("traced only")


@flash_backward.register_fake
def _(do: T, q: T, k: T, v: T, out: T, lse: T, causal: bool, window: int) -> tuple[T, T, T]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _heads_first(shape: Any) -> Any:
    return (shape[0], shape[2], shape[1], shape[3])


def _seen(q: Any, k: Any, window: int) -> Any:
    """Keys of a query, of a window those of its band on average."""
    return Fraction(k[1]) if window == NO_WINDOW else Fraction(band(q[1], window), q[1])


@register_flop_formula(torch.ops.flash_attn._flash_attn_forward)
def _flops(q: Any, k: Any, v: Any, causal: bool, window: int, *, out_shape: Any = None, **kwargs: Any) -> int:
    whole = sdpa_flop_count(*map(_heads_first, (q, _grouped(q, k), _grouped(q, v))))  # type: ignore[no-untyped-call]
    return int(whole * _seen(q, k, window) / k[1])


@register_flop_formula(torch.ops.flash_attn._flash_attn_backward)
def _backward_flops(
    do: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, causal: bool, window: int, *, out_shape: Any = None,
    **kwargs: Any,
) -> int:  # fmt: skip
    shapes = map(_heads_first, (do, q, _grouped(q, k), _grouped(q, v)))
    return int(sdpa_backward_flop_count(*shapes) * _seen(q, k, window) / k[1])  # type: ignore[no-untyped-call]


def _grouped(q: Any, kv: Any) -> Any:
    return (*kv[:2], q[2], kv[3])


class FlashAttnFunc(torch.autograd.Function):
    """As the package's, without dropout and ALiBi."""

    @staticmethod
    def forward(ctx: Any, q: T, k: T, v: T, causal: bool, window: int) -> T:
        out, lse = torch.ops.flash_attn._flash_attn_forward(q, k, v, causal, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kind = causal, window
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, do: T) -> Any:
        grads = torch.ops.flash_attn._flash_attn_backward(do, *ctx.saved_tensors, *ctx.kind)
        return *grads, None, None


def flash_attn_func(
    q: T, k: T, v: T, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (NO_WINDOW, NO_WINDOW), softcap: float = 0.0, deterministic: bool = False,
) -> T:  # fmt: skip
    """The package's function, for what transformers passes; a window is told as the keys that a query sees."""
    window = NO_WINDOW if window_size[0] == NO_WINDOW else window_size[0] + 1
    return FlashAttnFunc.apply(q, k, v, causal, window)  # type: ignore[no-any-return, no-untyped-call]


@contextmanager
def flash_attn_in_place(
    varlen: Callable[..., T] | None = None, pad: Callable[..., T] | None = None, *, packed: bool = False
) -> Iterator[None]:
    """Let transformers take these for the package.

    Args:
        varlen, pad: its functions for documents and padding, where there are some.
        packed: what transformers finds where it asks whether a row holds several documents: fake data cannot tell.
    """
    import transformers.modeling_flash_attention_utils as utils

    functions = (flash_attn_func, varlen, None, pad, None)
    process = utils._lazy_define_process_function(varlen or flash_attn_func)
    asked = utils._is_packed_sequence

    def answered(position_ids: T, batch_size: int) -> bool:
        possible = asked(position_ids, batch_size)
        bool(possible)  # the host waits for the answer
        return packed and possible is not False

    with (
        patch.object(utils, "lazy_import_flash_attention", lambda *args, **kwargs: (functions, (process, dict))),
        patch.object(utils, "_is_packed_sequence", answered),
    ):
        yield
