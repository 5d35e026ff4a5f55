"""Several methods in one setup: speed-up over a baseline, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import intervals
from .devices import profile
from .devices.profile import DeviceProfile
from .errors import UserError
from .methods import Method
from .predict import Model, Prediction, predict, with_options
from .setup import Setup

SAME = 0.05  # a difference below 5 % counts as the same


@dataclass(frozen=True)
class SpeedUp:
    """Baseline step time over the method's, with its interval."""

    method: str
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """faster, slower, or same (within 5 %)."""
        if self.ratio > 1 + SAME:
            return "faster"
        return "slower" if self.ratio < 1 / (1 + SAME) else "same"

    def as_dict(self) -> dict[str, Any]:
        """The JSON of one speed-up."""
        return {
            "method": self.method, "ratio": float(self.ratio), "low": float(self.low), "high": float(self.high),
            "verdict": self.verdict,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Predictions of several methods; the first is the baseline."""

    predictions: list[Prediction]
    speedups: list[SpeedUp]

    @property
    def baseline(self) -> str:
        """The method that the others are measured against."""
        return self.predictions[0].method

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `compare`."""
        return {
            "baseline": self.baseline,
            "predictions": [p.as_dict() for p in self.predictions],
            "speedup": [s.as_dict() for s in self.speedups],
        }


def compare(
    model: Model,
    methods: Sequence[str | Method] = ("full", "lora"),
    setup: Setup | None = None,
    device: str | DeviceProfile = "l40s",
    **options: Any,
) -> Comparison:
    """Predict several methods in one setup; the first is the baseline.

    Raises:
        UserError: fewer than two methods, or anything that `predict` refuses.
    """
    if len(methods) < 2:
        raise UserError("compare needs at least two methods, e.g. --methods full lora:r=16")
    host = options.pop("host", "default")
    setup = with_options(setup, options)
    predictions = [predict(model, m, setup, device, host=host) for m in methods]
    on = profile.load(device) if isinstance(device, str) else device
    return Comparison(predictions, [speed_up(predictions[0], p, on) for p in predictions[1:]])


def speed_up(base: Prediction, other: Prediction, on: DeviceProfile) -> SpeedUp:
    """The ratio of two predictions on one device, with its interval (shared errors cancel)."""
    a, b = base.time, other.time
    ratio = a.phases["total"] / b.phases["total"]
    spread = intervals.ratio_sigma(a.components, a.phases["total"], b.components, b.phases["total"], on)
    return SpeedUp(other.method, ratio, *intervals.bounds(ratio, spread))
