"""CPO and SimPO as TRL's trainer runs them, without reference, with the local variables of `get_batch_loss_metrics`.

Source: https://arxiv.org/abs/2401.08417, https://arxiv.org/abs/2405.14734; trl/experimental/cpo/cpo_trainer.py (1.8),
with its default `cpo_alpha` of 1.
"""

from typing import ClassVar

from ..tape.core import tape
from ..tape.pointwise import add, mul, neg, sub
from ..tape.scores import log_sigmoid, mean_all
from ..tape.shape import clone, detach
from ..tape.tensor import Tensor
from .parts.base import Objective, Passes, objective
from .parts.logps import log_mean
from .parts.pairs import accuracies, batch_logps, concatenated, loss_of_chosen, one_half, rewards_of


@objective("cpo", title="CPO", source="trl/experimental/cpo/cpo_trainer.py (1.8)")
class Cpo(Objective):
    """Contrastive preference optimisation: DPO without a reference, and likely chosen sequences."""

    averaged: ClassVar[bool] = False  # log-probabilities over the tokens of a sequence, and a margin between them

    def loss(self, passes: Passes) -> Tensor:
        pairs = passes.setup.batch
        input_ids, attention_mask, concatenated_labels = (concatenated(passes) for _ in range(3))
        all_logits = passes.logits(input_ids, attention_mask)
        policy_nll_loss = loss_of_chosen(all_logits, clone(concatenated_labels), pairs)
        all_logps = batch_logps(all_logits, concatenated_labels, average=self.averaged, in_place=True)
        policy_chosen_logps, policy_rejected_logps = one_half(all_logps, pairs), one_half(all_logps, pairs)
        tape().begin("loss", "forward")
        logits = sub(policy_chosen_logps, policy_rejected_logps)
        if self.averaged:
            logits = sub(logits, 0.5)
        kept = mul(neg(log_sigmoid(mul(logits, 0.1))), 1.0)
        losses = sub(kept, mul(log_sigmoid(mul(logits, -0.1)), 0.0))
        chosen_rewards, rejected_rewards = rewards_of(policy_chosen_logps, policy_rejected_logps)
        loss = add(mean_all(losses), mul(policy_nll_loss, 1.0))
        reward_accuracies = accuracies(chosen_rewards, rejected_rewards)
        log_mean(chosen_rewards)
        log_mean(rejected_rewards)
        log_mean(reward_accuracies)
        log_mean(sub(chosen_rewards, rejected_rewards))
        log_mean(detach(policy_rejected_logps))
        log_mean(detach(policy_chosen_logps))
        for _ in range(2):
            log_mean(mean_all(detach(one_half(all_logits, pairs))))
        log_mean(detach(policy_nll_loss))
        return loss


@objective("simpo", title="SimPO", source="trl/experimental/cpo/cpo_trainer.py (1.8), loss_type simpo")
class Simpo(Cpo):
    """Simple preference optimisation: average log-probabilities, a margin apart."""

    averaged = True
