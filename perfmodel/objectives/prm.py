"""A process reward model as TRL's trainer runs it: a classifier of tokens, right or wrong after every step.

Source: trl/experimental/prm/prm_trainer.py (1.8): the loss is the model's own.
"""

from ..architectures.base import Architecture
from ..architectures.tasks import Classifier
from .parts.base import objective
from .reward import with_head
from .sft import Sft


@objective("prm", title="a process reward model", source="trl/experimental/prm/prm_trainer.py (1.8)")
class ProcessReward(Sft):
    """A reward for every step of a sequence: two classes of tokens."""

    of = "two labels a token"

    def on(self, architecture: Architecture) -> Architecture:
        return with_head(self.name, architecture, Classifier("token", 2, padded=True, dropout=None))
