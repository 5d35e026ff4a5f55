"""Prompt tuning as PEFT runs it."""

from dataclasses import dataclass

from ..tape.nn import embedding
from ..tape.tensor import Tensor
from .parts.base import Scope, method
from .parts.virtual import SoftPrompt


@method(
    "prompt_tuning",
    title="prompt tuning",
    source="https://arxiv.org/abs/2104.08691; peft/tuners/prompt_tuning/model.py",
    trains="prompt embeddings",
    adds="longer text",
)
@dataclass(frozen=True)
class PromptTuning(SoftPrompt):
    """Trained embeddings before the text: few parameters, a longer sequence in every block."""

    def encode(self, model: Scope, indices: Tensor) -> Tensor:
        assert self.architecture is not None
        return embedding(self.weight(model, "embedding.weight", self.tokens, self.architecture.hidden), indices)
