"""Norm tuning: PEFT's LNTuning."""

from dataclasses import dataclass

from .parts.base import Method, method
from .parts.targeted import saved_whole


@method(
    "norm",
    title="norm tuning",
    source="https://arxiv.org/abs/2312.11420; peft/tuners/ln_tuning",
    trains="copies of the norms",
    adds="nothing",
)
@dataclass(frozen=True)
class NormTuning(Method):
    """Only the normalisation layers train; PEFT trains a copy and keeps the frozen original."""

    def copies(self, name: str, kind: str) -> bool:
        return kind == "norm" or saved_whole(name, (), self.architecture)
