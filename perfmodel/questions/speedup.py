"""The ratio of two mean step times, with its interval, and the verdict on it."""

from typing import Any

import numpy as np

from ..devices.profile import DeviceProfile
from ..prediction import intervals
from ..prediction.predict import Prediction
from ..values import immutable

SAME = 0.05  # a difference below 5 % counts as the same


def verdict(ratio: Any) -> Any:
    """faster, slower, or same (within 5 %); an array of words for an array of ratios."""
    named = np.select([ratio > 1 + SAME, ratio < 1 / (1 + SAME)], ["faster", "slower"], "same")
    return named if named.ndim else str(named)


@immutable
class SpeedUp:
    """Baseline's mean step time over the method's, with its interval.

    `reason` names the largest part of the difference, `answer` is the whole sentence; both are empty for a grid.
    """

    method: str
    ratio: float
    low: float
    high: float
    reason: str = ""
    answer: str = ""

    @property
    def verdict(self) -> Any:
        """faster, slower, or same (within 5 %)."""
        return verdict(self.ratio)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of one speed-up."""
        return {
            "method": self.method, "ratio": float(self.ratio), "low": float(self.low), "high": float(self.high),
            "verdict": self.verdict, "reason": self.reason, "answer": self.answer,
        }  # fmt: skip


def speed_up(base: Prediction, other: Prediction, on: DeviceProfile) -> SpeedUp:
    """The ratio of two predictions on one device, with its interval (shared errors cancel)."""
    ratio = base.mean_step / other.mean_step
    spread = intervals.ratio_sigma(base.mean_components, base.mean_step, other.mean_components, other.mean_step, on)
    return SpeedUp(other.method, ratio, *intervals.interval_bounds(ratio, spread))
