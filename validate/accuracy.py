"""How predictions are held against measurements: spread of relative errors, verdicts, and when a verdict counts."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from math import copysign
from typing import Generic, Protocol, TypeVar

import numpy as np

from perfmodel.questions.speedup import verdict

BASELINE = "full"  # the method that speed-ups are over
DECIDED = 1.1  # a measured difference of more than 10 % must come out on the right side


@dataclass(frozen=True)
class Errors:
    """A set of |relative errors|; all figures are nan for an empty set."""

    number: int
    mean: float
    median: float
    p90: float
    worst: float

    @classmethod
    def of(cls, errors: Iterable[float]) -> "Errors":
        """From signed or absolute relative errors."""
        values = np.abs(list(errors))
        if not len(values):
            return cls(0, *[float("nan")] * 4)
        spread = values.mean(), np.median(values), np.quantile(values, 0.9), values.max()
        return cls(len(values), *map(float, spread))


def beyond(off: float, slack: float) -> float:
    """What is left of a signed difference where so much of it is the rounding of a figure."""
    return copysign(max(0.0, abs(off) - slack), off)


class HasTime(Protocol):
    """What was measured, beside what the model predicts of it."""

    @property
    def seconds(self) -> float:
        """Measured."""

    @property
    def predicted_seconds(self) -> float:
        """Predicted, of the same."""

    @property
    def slack(self) -> float:
        """How much of the measured seconds may be rounding, relative."""


T = TypeVar("T", bound=HasTime)


@dataclass(frozen=True)
class Pair(Generic[T]):
    """Full fine-tuning and another method in one setup; ratios are full over other, as in `perfmodel compare`."""

    full: T
    other: T

    @property
    def measured(self) -> float:
        """Measured speed-up."""
        return self.full.seconds / self.other.seconds

    @property
    def predicted(self) -> float:
        """Predicted speed-up."""
        return self.full.predicted_seconds / self.other.predicted_seconds

    @property
    def error(self) -> float:
        """Relative error of the speed-up, the rounding of both figures taken off."""
        return beyond(self.predicted / self.measured - 1, self.full.slack + self.other.slack)

    @property
    def decided(self) -> bool:
        """Whether the measured difference is so large (10 %) that the verdict must be right."""
        return not 1 / DECIDED <= self.measured <= DECIDED

    @property
    def right(self) -> bool:
        """Whether faster, slower or same (within 5 %) comes out as measured."""
        return bool(verdict(self.measured) == verdict(self.predicted))


def paired(outcomes: Sequence[T], group: Callable[[T], Hashable], method: Callable[[T], str]) -> list[Pair[T]]:
    """Every method with full fine-tuning of its group; of several full ones, with the first."""
    full: dict[Hashable, T] = {}
    for o in outcomes:
        if method(o) == BASELINE:
            full.setdefault(group(o), o)
    return [Pair(full[g], o) for o in outcomes if method(o) != BASELINE and (g := group(o)) in full]
