"""How predictions are held against measurements: spread of relative errors, verdicts, and when a verdict counts."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from perfmodel.compare import verdict

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


def decided(ratio: float) -> bool:
    """Whether a measured ratio is so far from 1 that the verdict must be right."""
    return not 1 / DECIDED <= ratio <= DECIDED


def verdict_right(measured: float, predicted: float) -> bool:
    """Whether faster, slower or same (within 5 %) comes out as measured."""
    return bool(verdict(measured) == verdict(predicted))
