"""DPO as TRL's trainer runs it, with the local variables of its `_compute_loss`.

Chosen and rejected sequences of a pair go through the model as one batch. What TRL logs of every step (entropy,
accuracy, mean logits) is part of it.

Source: https://arxiv.org/abs/2305.18290; trl/trainer/dpo_trainer.py (1.8), loss_type sigmoid, reverse KL.
"""

from ..architectures.masks import read_scalar
from ..program.dims import Dim
from ..program.op import Attrs
from ..tape.core import emit, tape
from ..tape.elementary import sum_dim
from ..tape.inplace import zero_in_view
from ..tape.pointwise import add, binary_bool, cast, mul, neg, sub
from ..tape.scores import log_sigmoid, mean_all, sum_all
from ..tape.shape import detach, narrow, split
from ..tape.tensor import Tensor
from ..tape.transfers import of_all_ranks
from .parts.base import Objective, Passes, objective
from .parts.logps import (
    log_entropy,
    log_mean,
    log_ratio,
    log_sum,
    log_tokens,
    selective_log_softmax,
    without_first,
    without_last,
)


@objective("dpo", title="DPO", source="trl/trainer/dpo_trainer.py (1.8)")
class Dpo(Objective):
    """Direct preference optimisation: chosen above rejected sequences, as against a reference."""

    compares = "always"

    def loss(self, passes: Passes) -> Tensor:
        input_ids, attention_mask, completion_mask = (passes.tensor() for _ in range(3))
        pairs = passes.setup.batch
        logits = passes.logits(input_ids, attention_mask)
        shift_logits, shift_labels = without_last(logits), without_first(input_ids)
        shift_completion_mask = without_first(completion_mask)
        logps = logps_of(shift_logits, shift_labels, shift_completion_mask)
        chosen_logps, rejected_logps = split(logps, (pairs, pairs), 0)
        if passes.precomputed:
            ref_chosen_logps, ref_rejected_logps = (passes.tensor(pairs, dtype="fp32") for _ in range(2))
        else:
            ref_logits = passes.reference_logits(input_ids, attention_mask)
            ref_shift_logits = without_last(ref_logits)
            ref_logps = logps_of(ref_shift_logits, shift_labels, shift_completion_mask)
            ref_chosen_logps, ref_rejected_logps = split(ref_logps, (pairs, pairs), 0)
        tape().begin("loss", "forward")
        chosen_logratios, rejected_logratios = (
            sub(chosen_logps, ref_chosen_logps),
            sub(rejected_logps, ref_rejected_logps),
        )
        delta_score = sub(chosen_logratios, rejected_logratios)
        per_sequence_loss = neg(log_sigmoid(mul(delta_score, 0.1)))
        loss = add(mul(mean_all(per_sequence_loss), 1.0), 0.0)
        log_entropy(shift_logits, shift_completion_mask)
        log_tokens(attention_mask)
        _log_logits(detach(shift_logits), shift_completion_mask, pairs)
        _log_accuracy(detach(shift_logits), shift_completion_mask, shift_labels, pairs)
        chosen_rewards, rejected_rewards = (mul(detach(x), 0.1) for x in (chosen_logratios, rejected_logratios))
        for rewards in [of_all_ranks(x) for x in (chosen_rewards, rejected_rewards)]:
            read_scalar(mean_all(rewards))
        log_mean(cast(binary_bool("gt.Tensor", chosen_rewards, rejected_rewards), "fp32"))
        log_mean(sub(chosen_rewards, rejected_rewards))
        log_mean(chosen_logps)
        log_mean(rejected_logps)
        return loss


def logps_of(shift_logits: Tensor, shift_labels: Tensor, shift_completion_mask: Tensor) -> Tensor:
    """Log-probabilities of completions, (sequences,)."""
    per_token_logps = selective_log_softmax(shift_logits, shift_labels)
    outside = emit("eq.Scalar", (shift_completion_mask,), shift_completion_mask.shape, "bool")
    per_token_logps = zero_in_view(per_token_logps, outside)
    return sum_dim(per_token_logps, 1)


def _log_logits(shift_logits: Tensor, shift_completion_mask: Tensor, pairs: Dim) -> None:
    """The mean logits of chosen and rejected completions."""
    totals, halves = [], (split(x, (pairs, pairs), 0) for x in (shift_logits, shift_completion_mask))
    for logits, mask in zip(*halves, strict=True):
        picked = emit("index.Tensor", (logits, cast(mask, "bool")), (mask.numel, logits.shape[-1]), logits.dtype)
        means = emit("mean.dim", (picked,), picked.shape[:1], picked.dtype, attrs=Attrs(dims=(1,)))
        del picked
        totals += [sum_all(means), sum_all(mask)]
    for number in totals:
        log_sum(number)


def _log_accuracy(shift_logits: Tensor, shift_completion_mask: Tensor, shift_labels: Tensor, pairs: Dim) -> None:
    """How often the chosen token was the likeliest."""
    chosen_logits = split(shift_logits, (pairs, pairs), 0)[0]
    predictions = emit("argmax", (chosen_logits,), chosen_logits.shape[:2], "i64", attrs=Attrs(dims=(2,)))
    chosen_mask = cast(narrow(shift_completion_mask, 0, pairs), "bool")
    hits = binary_bool("eq.Tensor", predictions, narrow(shift_labels, 0, pairs))
    correct_predictions = binary_bool("bitwise_and.Tensor", hits, chosen_mask)
    total_tokens, correct_tokens = sum_all(chosen_mask), sum_all(correct_predictions)
    correct_tokens, total_tokens = of_all_ranks(correct_tokens), of_all_ranks(total_tokens)
    total_sum = sum_all(total_tokens)
    log_ratio(sum_all(correct_tokens), total_sum)
