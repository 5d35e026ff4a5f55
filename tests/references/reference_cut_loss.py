"""Cut cross entropy in transformers' causal models, around stand-ins of its three Triton kernels.

The stand-ins take, allocate and overwrite what the kernels do and compute the same in plain torch. Written from
axolotl-ai-cloud/ml-cross-entropy 5f0c7a7, not from the tape; `sort_logit_avg`, which is compiled there into a sort and
a cast, is run as these.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor as T
from torch.utils.flop_counter import register_flop_formula
from transformers.modeling_outputs import CausalLMOutput

from perfmodel.calls.products import KEPT_GRADIENTS


@torch.library.custom_op("cce::lse_forward", mutates_args=("lse", "means", "locks"))
def lse_forward(e: T, c: T, valids: T, lse: T, means: T | None, locks: T) -> None:
    """Of the rows that have labels log-sum-exp, and of each word the mean logit."""
    logits = e[valids].float() @ c.float().t()
    lse.copy_(logits.logsumexp(-1))
    if means is not None:
        means.copy_(logits.mean(0))


@torch.library.custom_op("cce::indexed_dot", mutates_args=("out",))
def indexed_dot(e: T, c: T, inds: T, valids: T, out: T) -> None:
    """Minus the logit of each row's next token."""
    out.copy_(-(e[valids].float() * c[inds[valids + 1]].float()).sum(-1))


@torch.library.custom_op("cce::backward", mutates_args=("de", "dc", "de_locks", "dc_locks"))
def backward(
    e: T, c: T, valids: T, do: T, lse: T, ordering: T, targets: T, de: T | None, dc: T | None, de_locks: T | None,
    dc_locks: T | None, scale: float,
) -> None:  # fmt: skip
    """The gradients of the logits, and of what they are made of; no tile is left out."""
    e_rows, words = e[valids].float(), c.float()
    grad = (e_rows @ words.t() - lse[:, None]).exp()
    grad[torch.arange(len(valids)), targets[valids + 1]] -= 1
    grad = grad * do * scale
    if de is not None:
        de[valids] = (grad @ words).to(de.dtype)
    if dc is not None:
        dc.copy_(grad.t() @ e_rows)


@register_flop_formula(torch.ops.cce.lse_forward)
def _logits(e: Any, c: Any, valids: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * valids[0] * c[0] * c[1])


@register_flop_formula(torch.ops.cce.backward)
def _gradients(
    e: Any, c: Any, valids: Any, do: Any, lse: Any, ordering: Any, targets: Any, de: Any, dc: Any, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    kept = int(KEPT_GRADIENTS * c[0])
    return int(2 * valids[0] * c[1] * (c[0] + kept * ((de is not None) + (dc is not None))))


def flat_valids(targets: T, ignore_index: int, shift: int) -> T:
    """`_build_flat_valids`."""
    targets = targets[..., shift:]
    valids = (targets != ignore_index).nonzero().to(torch.int32)
    for i in range(targets.ndim - 1):
        valids[:, i] *= targets.stride(i)
    return valids.sum(1)


class LinearCrossEntropy(torch.autograd.Function):
    """`LinearCrossEntropyFunction` with the mean of all rows."""

    @staticmethod
    def forward(ctx: Any, e: T, c: T, targets: T, valids: T) -> T:
        needs = e.requires_grad or c.requires_grad
        lse = e.new_full((len(valids),), -float("inf"), dtype=torch.float32)
        locks = e.new_full((-(-len(valids) // 128),), 0, dtype=torch.uint32)
        means = e.new_full((len(c),), 0.0, dtype=torch.float32) if needs else None
        lse_forward(e, c, valids, lse, means, locks)
        del locks
        out = e.new_zeros((len(valids),), dtype=torch.float32)
        indexed_dot(e, c, targets, valids, out)
        nll = out.add_(lse)
        loss = nll.mean()
        ctx.save_for_backward(e, c, lse, targets, valids, means)
        return loss

    @staticmethod
    def backward(ctx: Any, do: T) -> Any:
        e, c, lse, targets, valids, means = ctx.saved_tensors
        ordering = torch.argsort(means).to(torch.int32)
        de = torch.zeros_like(e) if e.requires_grad else None
        dc = torch.zeros_like(c) if c.requires_grad else None
        columns = -(-c.size(1) // 64)
        de_locks = None if de is None else e.new_zeros((-(-len(valids) // 128), columns), dtype=torch.int32)
        dc_locks = None if dc is None else c.new_zeros((-(-len(c) // 128), columns), dtype=torch.int32)
        backward(e, c, valids, do, lse, ordering, targets, de, dc, de_locks, dc_locks, 1 / lse.numel())
        return de, dc, None, None


def apply_lce(e: T, c: T, labels: T) -> T:
    """`apply_lce`, then `cce_linear_cross_entropy`."""
    if c.dtype == torch.bfloat16 and e.dtype == torch.float32:
        e = e.to(c.dtype)
    e, targets = e.contiguous(), labels.contiguous()
    valids = flat_valids(targets, -100, 1)
    return LinearCrossEntropy.apply(e.flatten(0, -2), c, targets.flatten(), valids)


def patched(model: Any) -> Any:
    """`cce_patch` of a causal model whose head is like Llama's, Cohere's or Granite's."""
    config = model.config
    scales: dict[str, Callable[[T], T]] = {
        "cohere": lambda x: x * model.logit_scale, "cohere2": lambda x: x * model.logit_scale,
        "granite": lambda x: x / config.logits_scaling,
    }  # fmt: skip
    scaled = scales.get(config.model_type, lambda x: x)

    def forward(self: Any, input_ids: T, labels: T, **places: T) -> CausalLMOutput:
        hidden = self.model(input_ids=input_ids, **places)[0]
        return CausalLMOutput(loss=apply_lce(scaled(hidden[:, 0:, :]), self.lm_head.weight, labels))

    model.forward = MethodType(forward, model)
    return model
