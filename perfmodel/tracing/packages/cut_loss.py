"""Cut cross entropy under transformers' causal models: its kernels as operators, and the forward pass that calls them.

The operators take, allocate and overwrite what its three Triton kernels do and compute the same in plain torch.
`sort_logit_avg` and `softcapping`, which are compiled there, are run as their parts. Source:
axolotl-ai-cloud/ml-cross-entropy 5f0c7a7, cut_cross_entropy/cce.py, utils.py, transformers/*.py.
"""

from types import MethodType
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from ...calls.products import KEPT_GRADIENTS
from ...errors import UserError
from ..picked import all_set

T = torch.Tensor
IGNORED = -100
TIMES = ("cohere", "cohere2", "cohere2_moe")  # types that scale the logits by `logit_scale`
OVER = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")  # types that divide them by `logits_scaling`


@torch.library.custom_op("cce::lse_forward", mutates_args=("lse", "means", "locks"))
def lse_forward(e: T, c: T, valids: T, lse: T, means: T | None, locks: T, softcap: float = 0.0) -> None:
    """Of the rows that have labels log-sum-exp, and of each word the mean logit."""
    logits = _capped(e[valids].float() @ c.float().t(), softcap)
    lse.copy_(logits.logsumexp(-1))
    if means is not None:
        means.copy_(logits.mean(0))


@torch.library.custom_op("cce::indexed_dot", mutates_args=("out",))
def indexed_dot(e: T, c: T, inds: T, valids: T, out: T) -> None:
    """Minus the logit of each row's next token."""
    out.copy_(-(e[valids].float() * c[inds[valids + 1]].float()).sum(-1))


@torch.library.custom_op("cce::backward", mutates_args=("de", "dc", "de_locks", "dc_locks"))
def cut_backward(
    e: T, c: T, valids: T, do: T, lse: T, ordering: T, targets: T, de: T | None, dc: T | None, de_locks: T | None,
    dc_locks: T | None, scale: float, softcap: float = 0.0,
) -> None:  # fmt: skip
    """The gradients of the logits, and of what they are made of; no tile is left out."""
    rows, words = e[valids].float(), c.float()
    logits = _capped(rows @ words.t(), softcap)
    grad = (logits - lse[:, None]).exp()
    grad[torch.arange(len(valids)), targets[valids + 1]] -= 1
    grad = grad * do * scale * ((1 - (logits / softcap) ** 2) if softcap else 1.0)
    if de is not None:
        de[valids] = (grad @ words).to(de.dtype)
    if dc is not None:
        dc.copy_(grad.t() @ rows)


def _capped(x: T, softcap: float) -> T:
    return torch.tanh(x / softcap) * softcap if softcap else x


@lse_forward.register_fake
def _(e: T, c: T, valids: T, lse: T, means: T | None, locks: T, softcap: float = 0.0) -> None:
    return None


@indexed_dot.register_fake
def _(e: T, c: T, inds: T, valids: T, out: T) -> None:
    return None


@cut_backward.register_fake
def _(*arguments: Any) -> None:
    return None


@register_flop_formula(torch.ops.cce.lse_forward)
def _logits_flops(e: Any, c: Any, valids: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * valids[0] * c[0] * c[1])


@register_flop_formula(torch.ops.cce.backward)
def _gradients_flops(
    e: Any, c: Any, valids: Any, do: Any, lse: Any, ordering: Any, targets: Any, de: Any, dc: Any, *args: Any,
    **kwargs: Any,
) -> int:  # fmt: skip
    kept = int(KEPT_GRADIENTS * c[0])
    return int(2 * valids[0] * c[1] * (c[0] + kept * ((de is not None) + (dc is not None))))


class LinearCrossEntropy(torch.autograd.Function):
    """`LinearCrossEntropyFunction` with the mean of all rows.

    Attributes:
        rows_of_a_lock: rows that share a lock, 128 there; None: all, so that memory is a polynomial of a batch's sizes.
    """

    rows_of_a_lock: int | None = None

    @classmethod
    def locks(cls, rows: int) -> int:
        """How many locks the programs of so many rows take in turn."""
        return -(-rows // (cls.rows_of_a_lock or rows))

    @staticmethod
    def forward(ctx: Any, e: T, c: T, targets: T, valids: T, softcap: float) -> T:
        """Of (rows, width) and (vocab, width), with the flat labels and the rows that have one."""
        needs = e.requires_grad or c.requires_grad
        lse = e.new_full((len(valids),), -float("inf"), dtype=torch.float32)
        locks = e.new_full((LinearCrossEntropy.locks(len(valids)),), 0, dtype=torch.uint32)
        means = e.new_full((len(c),), 0.0, dtype=torch.float32) if needs else None
        lse_forward(e, c, valids, lse, means, locks, softcap)
        del locks
        out = e.new_zeros((len(valids),), dtype=torch.float32)
        indexed_dot(e, c, targets, valids, out)
        out = _capped(out, softcap)
        nll = out.add_(lse)
        loss = nll.mean()
        ctx.save_for_backward(e, c, lse, targets, valids, means)
        ctx.softcap = softcap
        return loss

    @staticmethod
    def backward(ctx: Any, do: T) -> Any:
        """Gradients of rows and words, as they are asked for."""
        e, c, lse, targets, valids, means = ctx.saved_tensors
        ordering = torch.argsort(means).to(torch.int32)
        de = torch.zeros_like(e) if e.requires_grad else None
        dc = torch.zeros_like(c) if c.requires_grad else None
        locks = [
            None if made is None else made.new_zeros((number, -(-c.size(1) // 64)), dtype=torch.int32)
            for made, number in ((de, LinearCrossEntropy.locks(len(valids))), (dc, LinearCrossEntropy.locks(len(c))))
        ]
        cut_backward(e, c, valids, do, lse, ordering, targets, de, dc, *locks, 1 / lse.numel(), ctx.softcap)
        return de, dc, None, None, None


def flat_valids(targets: T, shift: int) -> T:
    """`_build_flat_valids`."""
    targets = targets[..., shift:]
    valids = all_set(targets != IGNORED).nonzero().to(torch.int32)
    for i in range(targets.ndim - 1):
        valids[:, i] *= targets.stride(i)
    return valids.sum(1)


def apply_lce(e: T, c: T, labels: T, softcap: float = 0.0) -> T:
    """`apply_lce`, then `cce_linear_cross_entropy`."""
    if c.dtype == torch.bfloat16 and e.dtype == torch.float32:
        e = e.to(c.dtype)
    e, targets = e.contiguous(), labels.contiguous()
    valids = flat_valids(targets, 1)
    loss: T = LinearCrossEntropy.apply(e.flatten(0, -2), c, targets.flatten(), valids, softcap)  # type: ignore[no-untyped-call]
    return loss


def with_cut_loss(model: Any) -> Any:
    """`cce_patch` of a causal model: its loss comes from the last hidden states and the head's weight.

    Raises:
        UserError: it has no such head.
    """
    if getattr(model, "lm_head", None) is None or getattr(model.lm_head, "bias", None) is not None:
        raise UserError(f"kernels cce: {type(model).__name__} has no head for cut cross entropy; leave it out")
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None) or 0.0

    def forward(self: Any, labels: T, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        hidden = (self.model if hasattr(self, "model") else self.base_model)(**inputs)[0][:, 0:, :]
        if config.model_type in TIMES:
            hidden = hidden * self.logit_scale
        if config.model_type in OVER:
            hidden = hidden / config.logits_scaling
        return CausalLMOutput(loss=apply_lce(hidden, self.lm_head.weight, labels, softcap))

    model.forward = MethodType(forward, model)
    return model
