"""A reward model as TRL's trainer runs it: a classifier of sequences with one output, chosen above rejected ones.

Source: trl/trainer/reward_trainer.py (1.8).
"""

from dataclasses import replace

from ..architectures.base import Architecture
from ..architectures.masks import read_scalar
from ..architectures.tasks import Classifier
from ..errors import UserError
from ..tape.core import emit, tape
from ..tape.pointwise import binary_bool, cast, neg, sub
from ..tape.scores import log_sigmoid, mean_all
from ..tape.shape import detach, split, squeeze
from ..tape.tensor import Tensor
from ..tape.transfers import of_all_ranks
from .parts.base import Objective, Passes, objective
from .parts.logps import log_mean, log_tokens


@objective("reward", title="a reward model", source="trl/trainer/reward_trainer.py (1.8)")
class Reward(Objective):
    """A reward for whole sequences, learned from pairs."""

    of = "one reward a sequence"

    def on(self, architecture: Architecture) -> Architecture:
        return with_head(self.name, architecture, Classifier("sequence", 1, padded=True, dropout=None))

    def loss(self, passes: Passes) -> Tensor:
        pairs = passes.setup.batch
        input_ids, attention_mask = passes.tensor(), passes.tensor()
        outputs = passes.logits(input_ids, attention_mask)
        tape().begin("loss", "forward")
        rewards_chosen, rewards_rejected = split(squeeze(outputs, -1), (pairs, pairs), 0)
        loss = neg(mean_all(log_sigmoid(sub(rewards_chosen, rewards_rejected))))
        log_tokens(attention_mask)
        all_rewards = of_all_ranks(detach(outputs))
        for name in ("min", "mean", "max"):
            read_scalar(emit(name, (all_rewards,), (), all_rewards.dtype))
        with tape().no_grad():
            accuracy = cast(binary_bool("gt.Tensor", rewards_chosen, rewards_rejected), "fp32")
            log_mean(mean_all(accuracy))
            log_mean(mean_all(sub(rewards_chosen, rewards_rejected)))
        return loss


def with_head(name: str, architecture: Architecture, head: Classifier) -> Architecture:
    """A model with a classifier in the place of its language model's head.

    Raises:
        UserError: the tape does not have that head for it.
    """
    kind = "sequence" if head.of == "value" else head.of
    if architecture.traits.head != "causal" or kind not in architecture.traits.heads:
        raise UserError(f"objective {name}: {architecture.name} has no classifier of {kind}s that is mirrored")
    return replace(architecture, classifier=head)
