"""Why one method is faster than another: a waterfall between their steps, what limits them, where the verdict turns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..devices import host as hosts
from ..devices.device import GivenDevice, profile_of
from ..devices.host import GivenHost, Host
from ..devices.profile import DeviceProfile
from ..errors import one_or_several
from ..methods import Method
from ..prediction.given import setup_given
from ..prediction.over_lengths import drawn
from ..prediction.predict import Model, Prediction, predict, resolve
from ..setup import Setup
from ..shown import Shown
from .anatomy import PARTS, Anatomy, dissect
from .comparison import with_reason
from .crossover import Crossover, MethodPair, crossovers
from .roofline import RooflineKernel, longest_kernels
from .sentences import in_words
from .speedup import SpeedUp

CHEAP_AXES = ("batch", "seq", "size")
KERNELS_IN_JSON = 20


@dataclass(frozen=True)
class Bar:
    """One part of the waterfall: its seconds in either step."""

    part: str
    before: float
    after: float

    @property
    def name(self) -> str:
        """What the part is called."""
        return PARTS[self.part]

    @property
    def difference(self) -> float:
        """Seconds that it adds; negative: saves."""
        return self.after - self.before


@dataclass(frozen=True)
class Explanation(Shown):
    """The way from a's step to b's.

    Attributes:
        a, b: the two predictions.
        speedup: of b over a, with the answer in words.
        before, after: their steps taken apart.
        crossovers: the verdict along batch, sequence length, size and targets.
        on: the device.
    """

    a: Prediction
    b: Prediction
    speedup: SpeedUp
    before: Anatomy
    after: Anatomy
    crossovers: list[Crossover]
    on: DeviceProfile = field(repr=False)

    @property
    def answer(self) -> str:
        """The verdict and its reason in a sentence."""
        return self.speedup.answer

    @property
    def labels(self) -> tuple[str, str]:
        """The two methods in words."""
        return in_words(self.a), in_words(self.b)

    @property
    def waterfall(self) -> list[Bar]:
        """The parts that either step has, the largest change first; differences sum to that of the steps."""
        bars = [Bar(part, self.before.parts[part], self.after.parts[part]) for part in PARTS]
        return sorted((bar for bar in bars if bar.before or bar.after), key=lambda bar: -abs(bar.difference))

    @property
    def of_longest(self) -> str:
        """Of which of several kinds of micro-batches the kernels are; empty where they are those of the step."""
        padded = self.a.setup.packing == "none" and len(drawn(self.a.setup)) > 1
        return ", of its longest micro-batch" if padded else ""

    def kernels(self, of: str) -> list[RooflineKernel]:
        """The kernels of step "a" or "b" for the roofline (`of_longest`)."""
        return longest_kernels(self.a if of == "a" else self.b)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `explain` (SI units, bytes)."""
        return {
            "answer": self.answer,
            "a": self.a.as_dict(),
            "b": self.b.as_dict(),
            "speedup": self.speedup.as_dict(),
            "waterfall": [
                {"part": bar.part, "name": bar.name, "a_s": bar.before, "b_s": bar.after,
                 "difference_s": bar.difference}
                for bar in self.waterfall
            ],
            "phases": {
                name: {phase: figures.as_dict() for phase, figures in apart.phases.items()}
                for name, apart in (("a", self.before), ("b", self.after))
            },
            "kernels_of": "longest micro-batch" if self.of_longest else "step",
            "kernels": {of: [k.as_dict() for k in self.kernels(of)[:KERNELS_IN_JSON]] for of in ("a", "b")},
            "crossovers": [c.as_dict() for c in self.crossovers],
        }  # fmt: skip


def explain(
    model: Model,
    a: str | Method = "full",
    b: str | Method = "lora",
    setup: Setup | None = None,
    device: GivenDevice = "l40s",
    *,
    host: GivenHost = "default",
    axes: str | Sequence[str] = CHEAP_AXES,
    **options: Any,
) -> Explanation:
    """Explain the step time of `b` against that of `a`; `perfmodel.explain` says what it takes and raises."""
    architecture, one = resolve(model, a)
    _, two = resolve(architecture, b)
    on = profile_of(device)
    setup = setup_given(setup, options, architecture, [on])
    by = hosts.host_of(host, on)
    first, second = (predict(architecture, m, setup, on, host=by) for m in (one, two))
    return of_predictions(first, second, on, by, axes)


def of_predictions(
    a: Prediction, b: Prediction, on: DeviceProfile, by: Host, axes: str | Sequence[str] = CHEAP_AXES
) -> Explanation:
    """Explain two predictions of one model, setup, device and host.

    Raises:
        UserError: one of them is a grid.
    """
    axes = one_or_several("axes", axes, str)
    before, after = dissect(a, on, by), dissect(b, on, by)
    along = crossovers(pair_of(a, b, on, by), axes)
    return Explanation(a, b, with_reason(a, b, before, after, on), before, after, along, on)


def pair_of(a: Prediction, b: Prediction, on: DeviceProfile, by: Host) -> MethodPair:
    """The methods of two predictions of a single setup, to be compared in others."""
    assert a.step is not None
    assert b.step is not None
    one, two = (step.method.bind(step.model) for step in (a.step, b.step))
    return MethodPair(a.step.model, one, two, a.setup, on, by)
