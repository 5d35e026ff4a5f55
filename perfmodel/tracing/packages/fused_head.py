"""TRL's fused head under transformers' causal models: its kernels as operators, and the forward pass that calls them.

The operators take and overwrite what its Triton kernels do and compute the same in plain torch. Source: TRL 1.16,
trl/kernels/chunked_logprob.py, trainer/utils.py (`add_fused_lm_head`), trainer/sft_trainer.py (`compute_loss`), on a
GPU, without what is logged.
"""

from types import MethodType
from typing import Any

import torch

from ...errors import UserError
from ...setup import Setup
from ..cuda_products import add_product
from ..picked import all_set
from .cut_loss import IGNORED, with_cut_loss

T = torch.Tensor
TOKENS, WORDS = 4096, 32768  # of a tile (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)
FOLDED = ("running_max", "sum_exp", "x_sum_exp", "max_before_target", "target_logit")  # what a tile is folded into


@torch.library.custom_op("trl::fold_logits", mutates_args=FOLDED)
def fold_logits(
    tile: T, targets: T, running_max: T, sum_exp: T, x_sum_exp: T, sq_sum_exp: T, z_sum: T, max_before_target: T,
    target_logit: T, start: int,
) -> None:  # fmt: skip
    """One tile of logits joins the sums of its rows: largest, exponentials, logits weighted by these, the label's."""
    z, local = tile.float(), targets - start
    before = torch.arange(z.shape[1]) < local.unsqueeze(-1)
    max_before_target.copy_(torch.maximum(max_before_target, z.masked_fill(~before, -torch.inf).amax(-1)))
    largest = torch.maximum(running_max, z.amax(-1))
    rescale, e = torch.exp(running_max - largest), torch.exp(z - largest.unsqueeze(-1))
    sum_exp.mul_(rescale).add_(e.sum(-1))
    x_sum_exp.mul_(rescale).add_((e * z).sum(-1))
    running_max.copy_(largest)
    inside = (local >= 0) & (local < z.shape[1])
    found = z.gather(-1, local.clamp(0, z.shape[1] - 1).unsqueeze(-1)).squeeze(-1)
    target_logit.copy_(torch.where(inside, found, target_logit))


@torch.library.custom_op("trl::grad_logits", mutates_args=("tile",))
def grad_logits(tile: T, targets: T, log_z: T, entropy: T, grad_logprobs: T, start: int) -> None:
    """The gradient of a tile of logits in their place."""
    p = torch.exp(tile.float() - log_z.unsqueeze(-1))
    is_target = torch.arange(start, start + tile.shape[1]) == targets.unsqueeze(-1)
    tile.copy_(grad_logprobs.unsqueeze(-1) * (is_target.float() - p))


@fold_logits.register_fake
def _(*arguments: Any) -> None:
    return None


@grad_logits.register_fake
def _(*arguments: Any) -> None:
    return None


class ChunkedLogProb(torch.autograd.Function):
    """`ChunkedLogProbFunction` with entropies and likeliest labels; caps and scales of logits are in its kernels."""

    @staticmethod
    def forward(ctx: Any, hidden: T, weight: T, targets: T) -> tuple[T, T, T]:
        """Of (tokens, width) and (vocab, width)."""
        ctx.set_materialize_grads(False)
        n, vocab = hidden.shape[0], weight.shape[0]
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        fp32: dict[str, Any] = {"device": hidden.device, "dtype": torch.float32}
        running_max = torch.full((n,), float("-inf"), **fp32)
        sum_exp, x_sum_exp, sq_sum_exp, z_sum = (torch.zeros((n,), **fp32) for _ in range(4))
        max_before_target, target_logit = torch.full((n,), float("-inf"), **fp32), torch.zeros((n,), **fp32)
        room = torch.empty((min(n, TOKENS), WORDS), device=hidden.device, dtype=dtype)
        for first in range(0, n, TOKENS):
            last = min(first + TOKENS, n)
            part = hidden[first:last].to(dtype)
            for start in range(0, vocab, WORDS):
                end = min(start + WORDS, vocab)
                tile = room[: last - first, : end - start]
                torch.mm(part, weight[start:end].to(dtype).t(), out=tile)
                sums = (running_max, sum_exp, x_sum_exp, sq_sum_exp, z_sum, max_before_target, target_logit)
                fold_logits(tile, targets[first:last], *(x[first:last] for x in sums), start)
        log_z = running_max + torch.log(sum_exp)
        logprobs = target_logit - log_z
        entropy = log_z - x_sum_exp / sum_exp
        is_top1 = (target_logit >= running_max) & (target_logit > max_before_target)
        ctx.save_for_backward(hidden, weight, targets, log_z, entropy)
        ctx.dtype = dtype
        ctx.mark_non_differentiable(is_top1)
        return logprobs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, grad_logprobs: T, *_: Any) -> Any:
        """Each tile is made again, and becomes its gradient; sums are in fp32."""
        hidden, weight, targets, log_z, entropy = ctx.saved_tensors
        n, vocab = hidden.shape[0], weight.shape[0]
        fp32: dict[str, Any] = {"device": hidden.device, "dtype": torch.float32}
        wanted = ctx.needs_input_grad
        grad_hidden = torch.zeros(hidden.shape, **fp32) if wanted[0] else None
        grad_weight = torch.zeros(weight.shape, **fp32) if wanted[1] else None
        room = torch.empty((min(n, TOKENS), WORDS), device=hidden.device, dtype=ctx.dtype)
        grad_logprobs = grad_logprobs.float().contiguous()
        for first in range(0, n, TOKENS):
            last = min(first + TOKENS, n)
            part = hidden[first:last].to(ctx.dtype)
            for start in range(0, vocab, WORDS):
                end = min(start + WORDS, vocab)
                words, tile = weight[start:end].to(ctx.dtype), room[: last - first, : end - start]
                torch.mm(part, words.t(), out=tile)
                rows = (x[first:last] for x in (targets, log_z, entropy, grad_logprobs))
                grad_logits(tile, *rows, start)
                if grad_hidden is not None:
                    _add(grad_hidden[first:last], tile, words)
                if grad_weight is not None:
                    _add(grad_weight[start:end], tile.t(), part)
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
        )


def _add(total: T, a: T, b: T) -> None:
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        add_product(total, a, b)


def with_fused_head(model: Any) -> Any:
    """`add_fused_lm_head` of a causal model, and SFTTrainer's loss of what it gives.

    Raises:
        UserError: it has no head of one matrix.
    """
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None or not hasattr(model, "lm_head"):
        raise UserError(f"kernels trl: TRL's fused head on {type(model).__name__} is not modelled; leave it out")

    def forward(self: Any, labels: T, **inputs: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        hidden = self.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = all_set(labels != IGNORED)
        weight = self.lm_head.weight
        if hasattr(weight, "full_tensor"):  # a shard under FSDP2, which nothing has gathered
            weight = weight.full_tensor()
        found = ChunkedLogProb.apply(hidden[mask], weight, labels[mask])  # type: ignore[no-untyped-call]
        log_probs, _, _ = [x.new_zeros(mask.shape).masked_scatter(mask, x) for x in found]
        -log_probs.sum() / mask.sum().clamp(min=1)  # the model's own loss, which the trainer makes again
        each = -log_probs
        return CausalLMOutput(loss=each.sum() / torch.as_tensor(mask.sum()).clamp(min=1))

    model.forward = MethodType(forward, model)
    return model


def with_own_loss(model: Any, setup: Setup) -> Any:
    """A causal model with the head and loss of a setup's kernels, cut cross entropy or TRL's; any other as it is."""
    return with_cut_loss(model) if setup.uses("cce") else with_fused_head(model) if setup.uses("trl") else model
