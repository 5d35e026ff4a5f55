"""Several methods in one setup: predictions, and speed-ups over a baseline with their reasons."""

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any

import numpy as np

from ..devices import host as hosts
from ..devices.device import GivenDevice, profile_of
from ..devices.profile import DeviceProfile
from ..errors import UserError, one_or_several
from ..methods import Method
from ..prediction.given import setup_given
from ..prediction.memory import room
from ..prediction.predict import Model, Prediction, architecture_of, method_of, plain, predict
from ..program.part import PHASES
from ..setup import Setup
from ..shown import Shown, frame
from ..values import immutable
from . import sentences as words
from .anatomy import Anatomy, dissect
from .speedup import SpeedUp, speed_up


@immutable
class Comparison(Shown):
    """Predictions of several methods; the first is the baseline.

    Attributes:
        refused: methods that are not modelled in the setup, each with the reason.
    """

    predictions: list[Prediction]
    speedups: list[SpeedUp]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The method that the others are measured against."""
        return self.predictions[0].method

    @property
    def unanswered(self) -> list[str]:
        """What is said of each method that is not modelled in the setup."""
        return [f"{method} is not answered: {reason}" for method, reason in self.refused.items()]

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
            "refused": self.refused,
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
    methods: str | Method | Sequence[str | Method] = ("full", "lora"),
    setup: Setup | None = None,
    device: GivenDevice = "l40s",
    **options: Any,
) -> Comparison:
    """Predict several methods in one setup, the first the baseline; see `perfmodel.compare`.

    One that is not modelled there is left out, with the reason, if another beside the baseline is answered.

    Raises:
        UserError: what the baseline or the setup lacks, or why none of the others is modelled.
    """
    methods = one_or_several("methods", methods, (str, Method))
    if len(methods) < 2:
        raise UserError("compare needs at least two methods, e.g. --methods full lora:r=16")
    host = options.pop("host", "default")
    model, on = architecture_of(model), profile_of(device)
    setup = setup_given(setup, options, model, [on])
    by = hosts.host_of(host, on)
    first, *rest = [method_of(m) for m in methods]
    base = predict(model, first, setup, on, host=by)
    others, refused = [], {}
    for method in rest:
        try:
            others.append(predict(model, method, setup, on, host=by))
        except UserError as error:
            refused[method.spec()] = str(error)
    if not others:
        raise UserError("; ".join(dict.fromkeys(refused.values())))
    if any(p.step is None for p in (base, *others)):  # a grid has no one reason
        return Comparison([base, *others], [speed_up(base, p, on) for p in others], refused)
    before = dissect(base, on, by)
    speedups = [with_reason(base, p, before, dissect(p, on, by), on) for p in others]
    return Comparison([base, *others], speedups, refused)


def with_reason(base: Prediction, other: Prediction, before: Anatomy, after: Anatomy, on: DeviceProfile) -> SpeedUp:
    """The speed-up of a single setup with its reason in words, from both steps taken apart."""
    found = speed_up(base, other, on)
    space = room(on.capacity, on.kind, max(p.memory.buffers for p in (base, other)))
    reason = words.why(before, after, found.verdict, base.setup.tokens)
    return replace(found, reason=reason, answer=words.answer(base, other, found, reason, on.capacity, space))
