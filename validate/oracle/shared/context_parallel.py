"""Real attention of ranks that share a sequence, on a CPU: PyTorch's own ring around the CPU's flash kernel.

`context_parallel` hands it the kernels of GPUs alone, so what it would do with `F.scaled_dot_product_attention` is done
here: the same functions that it calls, forward and backward, with a kernel that runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental import _attention as public
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from perfmodel.setup import Setup

aten: Any = torch.ops.aten
SEQ = 2


def _kernel(query: Any, key: Any, value: Any, **options: Any) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, options["is_causal"])


def _kernel_backward(query: Any, key: Any, value: Any, **options: Any) -> Any:
    of_output = (options[name] for name in ("out", "logsumexp"))
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        options["grad_out"], query, key, value, *of_output, 0.0, options["is_causal"]
    )


class RingAttention(torch.autograd.Function):
    """One differentiable call, as the dispatch of sharded tensors makes it."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: Any) -> torch.Tensor:
        """Attention over the keys and values of all ranks."""
        out, statistics = ring._templated_ring_attention(group, SEQ, _kernel, q, k, v, is_causal=True)
        ctx.group = group
        ctx.save_for_backward(q, k, v, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients of one's own."""
        q, k, v, out, statistics = ctx.saved_tensors
        made = ring._templated_ring_attention_backward(
            ctx.group, SEQ, _kernel_backward, grads[0], "grad_out", q, k, v, out, statistics, is_causal=True
        )
        return (*made, None)


def on_ring(setup: Setup) -> Any:
    """Attention of a rank as `context_parallel` patches it; nothing where no sequence is shared."""
    return _patched(setup) if setup.cp > 1 else nullcontext()


@contextmanager
def _patched(setup: Setup) -> Iterator[None]:
    here = dist.get_rank()
    group = dist.new_group(list(range(here, here + setup.cp)))
    functional: Any = torch.nn.functional
    known, attend = ring._cp_options.rotate_method, cast(Any, RingAttention).apply
    original = functional.scaled_dot_product_attention
    public.set_rotate_method(setup.cp_rotate)

    def attention(q: Any, k: Any, v: Any, *args: Any, **options: Any) -> Any:
        return attend(q, k, v, group)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, ring._cp_options.rotate_method = original, known


def own_tokens(setup: Setup, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the Trainer gives the model of a part of a sequence besides ids, labels and mask; else nothing."""
    if setup.cp == 1:
        return {}
    return {"position_ids": torch.zeros_like(ids), "shift_labels": torch.zeros_like(ids)}
