"""Several methods in one setup: predictions, and speed-ups over a baseline with their reasons."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..devices import host as hosts
from ..devices.device import Device, profile_of
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods import Method
from ..prediction.predict import Model, Prediction, architecture_of, plain, predict, with_options
from ..program.part import PHASES
from ..setup import Setup
from ..shown import Shown, frame
from ..values import immutable
from . import sentences as words
from .anatomy import Anatomy, dissect
from .speedup import SpeedUp, speed_up


@immutable
class Comparison(Shown):
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
            "figures": [
                {"method": p.method, "tokens_per_s": plain(p.tokens_per_second), "mfu": plain(p.mfu)}
                for p in self.predictions
            ],
        }

    def to_frame(self) -> Any:
        """One row a method, SI units: step time by phase, counts, memory, and its speed-up over the baseline.

        Raises:
            UserError: pandas is not installed, or the predictions are grids.
        """
        if any(np.ndim(p.time.phases["total"]) for p in self.predictions):
            raise UserError("a comparison over a grid has no rows: use sweep(...).to_frame()")
        speedups = [(1.0, "same"), *((s.ratio, s.verdict) for s in self.speedups)]
        return frame({
            "method": [p.method for p in self.predictions],
            **{f"{phase}_s": [p.time.phases[phase] for p in self.predictions] for phase in (*PHASES, "total")},
            **{name: [getattr(p, name)["total"] for p in self.predictions] for name in ("flops", "bytes", "kernels")},
            "peak_bytes": [p.memory.peak for p in self.predictions],
            "fits": [bool(p.fits) for p in self.predictions],
            "trainable": [p.trainable_params for p in self.predictions],
            "speedup": [ratio for ratio, _ in speedups],
            "verdict": [verdict for _, verdict in speedups],
        })  # fmt: skip


def compare(
    model: Model,
    methods: Sequence[str | Method] = ("full", "lora"),
    setup: Setup | None = None,
    device: str | DeviceProfile | Device = "l40s",
    **options: Any,
) -> Comparison:
    """Predict several methods in one setup, the first the baseline; see `perfmodel.compare`."""
    if len(methods) < 2:
        raise UserError("compare needs at least two methods, e.g. --methods full lora:r=16")
    host = options.pop("host", "default")
    setup = with_options(setup, options)
    model, on = architecture_of(model), profile_of(device)
    by = hosts.host_of(host, on)
    predictions = [predict(model, m, setup, on, host=by) for m in methods]
    base, *others = predictions
    if any(p.step is None for p in predictions):  # a grid has no one reason
        return Comparison(predictions, [speed_up(base, p, on) for p in others])
    before = dissect(base, on, by)
    return Comparison(predictions, [with_reason(base, p, before, dissect(p, on, by), on) for p in others])


def with_reason(base: Prediction, other: Prediction, before: Anatomy, after: Anatomy, on: DeviceProfile) -> SpeedUp:
    """The speed-up of a single setup with its reason in words, from both steps taken apart."""
    found = speed_up(base, other, on)
    reason = words.why(before, after, found.verdict, base.setup.tokens)
    return replace(found, reason=reason, answer=words.answer(base, other, found, reason, on.hardware.memory_bytes))
