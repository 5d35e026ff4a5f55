"""Predicted against measured: what a window of a training run says, and what explains the gap."""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import units
from ..devices import profile
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..prediction.predict import Prediction, predict
from ..report.figures import headline
from ..report.plain import table
from .program import TrainingRun
from .watch import DATA, IN_STEP, OTHER, Watch

SMALL = 0.01  # of the step: causes below it are not told
DIFFERS = "not the run's step as it is: "
HOST_BOUND = 0.2  # share of the step that waits for the host, above which that is told


@dataclass(frozen=True)
class Cause:
    """A part of the gap, s: measured minus predicted."""

    seconds: float
    what: str


@dataclass(frozen=True)
class Findings:
    """What one window showed.

    Attributes:
        planned: prediction of the step as configured.
        seen: predicted seconds of the steps with the batches that were seen.
        step: measured seconds from one step to the next, everything in.
        causes: parts of `step` minus the planned time; they sum to it.
        peak: measured peak memory, B; None where the device keeps no record.
        notes: what a reader should know.
    """

    planned: Prediction
    seen: float
    step: float
    causes: list[Cause]
    peak: int | None
    steps: int
    notes: list[str]

    @property
    def predicted(self) -> float:
        """Planned seconds of a step."""
        return float(self.planned.time.phases["total"])

    def metrics(self) -> dict[str, float]:
        """What the callback logs: seconds and bytes; the measured peak only where the device keeps a record."""
        step, memory = self.planned.time, self.planned.memory
        found = {
            "step_predicted_s": self.predicted, "step_predicted_low_s": step.low, "step_predicted_high_s": step.high,
            "step_measured_s": self.step, "peak_memory_predicted_bytes": memory.peak,
            "peak_memory_predicted_low_bytes": memory.low, "peak_memory_predicted_high_bytes": memory.high,
        }  # fmt: skip
        if self.peak is not None:
            found["peak_memory_measured_bytes"] = self.peak
        return {f"perfmodel/{name}": float(value) for name, value in found.items()}

    def text(self) -> str:
        """What the callback prints."""
        p, m = self.planned, self.planned.memory
        rows = [["step", units.seconds(self.predicted), *_bounds(p.time, units.seconds), units.seconds(self.step),
                 _off(self.step, self.predicted)]]  # fmt: skip
        memory = [units.nbytes(m.peak), *_bounds(m, units.nbytes)]
        rows.append(
            [
                "peak memory",
                *memory,
                *(["", ""] if self.peak is None else [units.nbytes(self.peak), _off(self.peak, m.peak)]),
            ]
        )
        lines = [
            f"perfmodel, {self.steps} steps of {p.method}: {headline(p)}",
            table(("", "predicted", "from", "to", "measured", ""), rows),
        ]
        told = [c for c in self.causes if abs(c.seconds) >= SMALL * self.predicted]
        if told:
            lines += ["what makes the difference:", *(f"  {units.signed(c.seconds)}  {c.what}" for c in told)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def findings(
    program: TrainingRun, watch: Watch, on: DeviceProfile, by: Host, *, peak: int | None, grown: int, named: str | None
) -> Findings:
    """Compare a window with what was planned, and with the batches that came.

    Args:
        peak: peak memory that the device reports, B; None on a CPU.
        grown: bytes by which the process grew since the training began (CPU).
        named: the maker's name of the GPU; None on a CPU.

    Raises:
        UserError: a setup that cannot be predicted.
    """
    shapes = watch.shapes()
    longest = max(seq for _, seq, _ in shapes)
    padded = any(padding > 0 for *_, padding in shapes)
    plan = as_configured(program, longest, on, by)
    micro = round(len(shapes) / watch.steps)
    setup = replace(program.setup, grad_accum=max(1, micro), padded=padded and program.setup.attention != "flash2")
    seen = _mean_step(program, setup, shapes, on, by)
    seconds = {what: total / watch.steps for what, total in watch.seconds().items()}
    step = sum(seconds.values())
    notes = [*_unlike(program, plan), *_notes(plan, on, named, grown if peak is None else None)]
    causes = [
        Cause(seen - float(plan.time.phases["total"]), _batches(program, plan.setup.seq, shapes, micro)),
        Cause(seconds.get(DATA, 0.0), "waiting for data: more dataloader_num_workers, or a cheaper collator"),
        Cause(seconds.get(OTHER, 0.0), "logging, evaluation and saving between the steps"),
        _rest(seconds[IN_STEP] - seen, seen, plan),
    ]
    return Findings(plan, seen, step, causes, peak, watch.steps, notes)


def as_configured(program: TrainingRun, longest: int, on: DeviceProfile, by: Host) -> Prediction:
    """The step as configured; of the longest batch that was seen where the configuration names no length.

    Raises:
        UserError: a setup that cannot be predicted.
    """
    return _predict(program, replace(program.setup, seq=program.length or longest), on, by)


def too_large(p: Prediction, on: DeviceProfile) -> str:
    """That a step will not fit, in a line; empty if it fits."""
    if p.fits:
        return ""
    return (
        f"this will not fit: {p.method} with {headline(p)} takes {units.nbytes(p.memory.peak)} at its peak, "
        f"{on.slug} has {units.nbytes(on.capacity)} (perfmodel advise finds what fits)"
    )


def _predict(program: TrainingRun, setup: Any, on: DeviceProfile, by: Host) -> Prediction:
    return predict(program.architecture, replace(program.method, architecture=None), setup, on, host=by)


def _mean_step(
    program: TrainingRun, setup: Any, shapes: list[tuple[int, int, float]], on: DeviceProfile, by: Host
) -> float:
    """The predicted mean step over the micro-batches that came."""
    counts = Counter((batch, seq) for batch, seq, _ in shapes)
    batch, seq = (np.array(values) for values in zip(*counts, strict=True))
    p = _predict(program, replace(setup, batch=batch, seq=seq), on, by)
    return float(np.average(p.time.phases["total"], weights=list(counts.values())))


def _batches(program: TrainingRun, planned_seq: int, shapes: list[tuple[int, int, float]], micro: int) -> str:
    """How the batches differ from those planned."""
    planned = program.setup.batch * planned_seq * program.setup.grad_accum
    real = micro * float(np.mean([batch * seq for batch, seq, _ in shapes]))
    padding = float(np.average([p for *_, p in shapes], weights=[b * s for b, s, _ in shapes]))
    text = f"batches: {real:,.0f} tokens a step, {planned:,} were planned"
    if micro != program.setup.grad_accum:
        text += f"; {micro} micro-batches a step, not {program.setup.grad_accum}"
    return text + (f"; {units.percent(padding)} of them are padding" if padding else "")


def _rest(seconds: float, seen: float, planned: Prediction) -> Cause:
    """What is left inside the step: the model's own error, a slower host, another device."""
    t = planned.time
    scale = seen / float(t.phases["total"])
    inside = float(t.low) * scale <= seen + seconds <= float(t.high) * scale
    share = float(t.launch_bound_share)
    if inside:
        what = "inside the step, within the prediction's interval"
    elif seconds > 0 and share > HOST_BOUND:
        what = (
            f"inside the step: the device waits for the host {units.percent(share)} of it, and this host is slower "
            "than the one predicted with (perfmodel validate host)"
        )
    else:
        what = "inside the step, beyond the prediction's interval: other clocks, a shared machine, or code of your own"
    return Cause(seconds, what)


def _unlike(program: TrainingRun, planned: Prediction) -> list[str]:
    """How the step that is predicted is another one than the run's."""
    said = [DIFFERS + "; ".join(program.differences)] if program.differences else []
    if program.trained not in (None, planned.trainable_params):
        said.append(f"{program.trained:,} parameters of the model train, {planned.trainable_params:,} are predicted to")
    return said


def _notes(planned: Prediction, on: DeviceProfile, named: str | None, grown: int | None) -> list[str]:
    notes = list(planned.notes)
    other = profile.by_makers_name(named) if named else None
    if other and on.slug in profile.names() and other.slug != on.slug:
        notes.append(f"predicted for {on.name}, the training runs on {named}")
    if float(planned.time.launch_bound_share) > HOST_BOUND:
        share = units.percent(planned.time.launch_bound_share)
        notes.append(f"host-bound: {share} of the predicted step waits for the host; larger batches cost little")
    if grown:
        most = units.nbytes(planned.memory.peak - planned.memory.weights)
        notes.append(f"the process grew by {units.nbytes(grown)} in training; {most} beside the weights are predicted")
    return notes


def _bounds(of: Any, show: Any) -> list[str]:
    return [show(float(of.low)), show(float(of.high))]


def _off(measured: float, predicted: float) -> str:
    return f"{100 * (measured / predicted - 1):+.0f} %"
