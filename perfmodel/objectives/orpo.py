"""ORPO as TRL's trainer runs it: a loss without reference, with the local variables of `get_batch_loss_metrics`.

Source: https://arxiv.org/abs/2403.07691; trl/experimental/orpo/orpo_trainer.py (1.8).
"""

from ..architectures.masks import read_scalar
from ..tape.core import emit, tape
from ..tape.pointwise import cast, fill, mul, neg, sub, where
from ..tape.scores import either, exp_less_one, log_of_more, log_sigmoid, mean_all, natural_exp, natural_log
from ..tape.shape import clone, detach
from ..tape.tensor import Tensor
from ..tape.transfers import of_all_ranks
from .parts.base import Objective, Passes, objective
from .parts.logps import without_last
from .parts.pairs import accuracies, batch_logps, concatenated, loss_of_chosen, one_half, rewards_of


@objective("orpo", title="ORPO", source="trl/experimental/orpo/orpo_trainer.py (1.8)")
class Orpo(Objective):
    """Odds ratio preference optimisation: likely chosen sequences, more so than rejected ones."""

    def loss(self, passes: Passes) -> Tensor:
        pairs = passes.setup.batch
        input_ids, attention_mask, concatenated_labels = (concatenated(passes) for _ in range(3))
        all_logits = passes.logits(input_ids, attention_mask)
        labels = clone(input_ids)
        real = emit("eq.Scalar", (attention_mask,), attention_mask.shape, "bool")
        labels = where(real, labels, fill("scalar_tensor", (), "i64"))
        policy_nll_loss = loss_of_chosen(all_logits, labels, pairs)
        all_logps = batch_logps(all_logits, concatenated_labels, average=True, in_place=False)
        policy_chosen_logps, policy_rejected_logps = one_half(all_logps, pairs), one_half(all_logps, pairs)
        tape().begin("loss", "forward")
        chosen, rejected = cast(policy_chosen_logps, "fp32"), cast(policy_rejected_logps, "fp32")
        log_odds = sub(sub(chosen, rejected), sub(log1mexp(chosen), log1mexp(rejected)))
        ratio = log_sigmoid(log_odds)
        losses = mul(ratio, 0.1)
        chosen_rewards, rejected_rewards = rewards_of(chosen, rejected)
        means = [mean_all(ratio), mean_all(log_odds)]
        loss = sub(policy_nll_loss, mean_all(losses))
        reward_accuracies = accuracies(chosen_rewards, rejected_rewards)
        rest = (chosen_rewards, rejected_rewards, reward_accuracies, sub(chosen_rewards, rejected_rewards))
        metrics = [
            mean_all(of_all_ranks(x)) for x in (*rest, detach(policy_rejected_logps), detach(policy_chosen_logps))
        ]
        for _ in range(2):
            logits = without_last(one_half(all_logits, pairs))
            metrics.append(mean_all(of_all_ranks(mean_all(detach(logits)))))
        metrics += [mean_all(of_all_ranks(detach(x))) for x in (policy_nll_loss, *means)]
        for metric in metrics:
            read_scalar(metric)
        return loss


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - eˣ), each of two forms where it is the exact one."""
    small = emit("lt.Scalar", (x,), x.shape, "bool")
    return either(small, log_of_more(neg(natural_exp(x))), natural_log(neg(exp_less_one(x))))
