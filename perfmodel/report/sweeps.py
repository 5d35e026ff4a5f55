"""Running a sweep with a progress bar, and what the terminal shows of it."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from click import style

from .. import units
from ..devices.profile import DeviceProfile
from ..prediction.notes import notes_before
from ..prediction.placed import placed
from ..questions.sentences import named_notes
from ..questions.speedup import verdict
from ..questions.sweeps import Columns, Sweep
from .figures import job_of
from .files import records, rows_to
from .plain import notes, paragraph, show, table
from .progress import progress

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..partitions import Partitions

Key = tuple[str, str]  # device, method as one gives it to predict
WORTH = 1.5  # times the rate that a second node has to give
MATRIX = (16, 7)  # batches and lengths that fit a terminal of 80 columns
COLUMNS_EXPLAINED = (
    "faster, slower, fits: share of the setups; speed-up: lowest to highest; tok/s: the most of those that fit, "
    "and its batch x seq"
)
COLORS = {"faster": "green", "slower": "red", "same": None}


@dataclass
class SweepSummary:
    """What one method does on one device over the whole grid."""

    rows: int = 0
    fitting: int = 0
    verdicts: dict[str, int] = field(default_factory=lambda: {"faster": 0, "same": 0, "slower": 0})
    lowest: float = float("inf")
    highest: float = 0.0
    best: dict[str, Any] | None = None

    def add(self, c: Columns) -> None:
        """Take some rows into account."""
        self.rows += len(c["batch"])
        self.fitting += int(c["fits"].sum())
        for word in self.verdicts:
            self.verdicts[word] += int((c["verdict"] == word).sum())
        self.lowest, self.highest = min(self.lowest, c["speedup"].min()), max(self.highest, c["speedup"].max())
        rate = np.where(c["fits"], c["tokens_per_s"], 0.0)
        i = int(rate.argmax())
        if rate[i] > (self.best["tokens_per_s"] if self.best else 0.0):
            self.best = {name: c[name][i].item() for name in ("batch", "seq", "tokens_per_s", "step_s", "peak_bytes")}

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rows": self.rows, "fits": self.fitting, **self.verdicts, "lowest_speedup": float(self.lowest),
            "highest_speedup": float(self.highest), "best": self.best,
        }  # fmt: skip


@dataclass
class FinishedSweep:
    """A sweep that ran.

    Attributes:
        summaries: of each device and method.
        speedups, kept: what was kept of its rows.
        output: the file that they went to.
        left_out: numbers of GPUs that the job cannot have, and why.
    """

    baseline: str
    summaries: dict[Key, SweepSummary] = field(default_factory=dict)
    speedups: dict[Key, list[Columns]] = field(default_factory=dict)
    kept: list[Columns] = field(default_factory=list)
    output: Path | None = None
    left_out: dict[int, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `sweep`: the rows, unless they went to a file."""
        summary = [{"device": d, "method": m, **s.as_dict()} for (d, m), s in self.summaries.items()]
        left_out = [{"gpus": gpus, "why": why} for gpus, why in self.left_out.items()]
        told = {"baseline": self.baseline, "summary": summary, "left_out": left_out}
        if self.output:
            return {**told, "output": str(self.output)}
        return {**told, "rows": [row for columns in self.kept for row in records(columns)]}


def run_sweep(
    planned: Sweep, *, output: Path | None, keep_rows: bool, keep_speedups: bool, kept: "Partitions | None" = None
) -> FinishedSweep:
    """Predict every block: rows to a file, figures to the summary.

    Args:
        keep_rows: keep every column in the outcome.
        keep_speedups: keep the speed-ups of a large grid too, for a picture.
        kept: partitions of the sweep, to be predicted first where they are not there yet.

    Raises:
        UserError: a file that cannot be written, or a setup that is refused.
    """
    left_out = {gpus: str(why) for gpus, why in planned.refused.items()}
    outcome = FinishedSweep(planned.methods[0].spec(), output=output, left_out=left_out)
    keep_speedups = keep_speedups or _fits_terminal(planned)
    with ExitStack() as stack:
        write = stack.enter_context(rows_to(output)) if output else None
        bar = stack.enter_context(progress())
        for columns in _blocks(planned, bar) if kept is None else _from_partitions(planned, kept, bar):
            _summarise(outcome, columns, keep_speedups=keep_speedups)
            if write:
                write(columns)
            if keep_rows:
                outcome.kept.append(columns)
    return outcome


def _blocks(planned: Sweep, bar: "Progress") -> Iterator[Columns]:
    task = bar.add_task("setups", total=len(planned))
    for columns in planned.blocks():
        yield columns
        bar.advance(task, len(columns["batch"]))


def _from_partitions(planned: Sweep, kept: "Partitions", bar: "Progress") -> Iterator[Columns]:
    places = list(planned.order())
    task = bar.add_task("partitions", total=places[-1][0] + 1)
    kept.fill(planned.parts(), lambda _: bar.advance(task))
    for part, block in places:
        yield kept.columns(part, block)


def _fits_terminal(planned: Sweep) -> bool:
    return len(planned.batch) <= MATRIX[0] and len(planned.seq) <= MATRIX[1] and len(planned.gpus) == 1


def _summarise(outcome: FinishedSweep, columns: Columns, *, keep_speedups: bool) -> None:
    device = job_of(int(columns["gpus"][0]), columns["device"][0].item())
    for method in dict.fromkeys(columns["method"].tolist()):
        chosen = columns["method"] == method
        part = {name: values[chosen] for name, values in columns.items()}
        outcome.summaries.setdefault((device, method), SweepSummary()).add(part)
        if keep_speedups:
            kept = {name: part[name] for name in ("batch", "seq", "speedup", "fits")}
            outcome.speedups.setdefault((device, method), []).append(kept)


def plane(planned: Sweep, blocks: list[Columns], name: str) -> np.ndarray:
    """A column of one device and method as an array (batch, seq)."""
    return np.concatenate([b[name] for b in blocks]).reshape(len(planned.batch), len(planned.seq))


def show_summary(planned: Sweep, outcome: FinishedSweep) -> None:
    """Where each method pays, the best setup of each, and the speed-ups themselves where the grid is small."""
    grid = f"{len(planned):,} setups, {_span('batch', planned.batch)}, {_span('seq', planned.seq)}"
    show(paragraph(f"{style(planned.model, bold=True)}: {grid}; speed-up over {outcome.baseline}") + "\n")
    columns = ("", "faster", "slower", "speed-up", "fits", "tok/s", "at best")
    for device in dict.fromkeys(device for device, _ in outcome.summaries):
        rows = [_row(m, s, outcome) for (d, m), s in outcome.summaries.items() if d == device]
        show(f"on {style(device, bold=True)}\n{table(columns, rows)}\n")
    if len(planned.gpus) > 1:
        for on in planned.devices:
            show(f"tokens/s on {style(on.slug, bold=True)} at best, and its share of as many times the first\n")
            show(f"{_scaling(planned, on.slug, outcome)}\n")
            for method in (m.spec() for m in planned.methods):
                show(paragraph(_worth_it(planned, on, method, outcome)))
            show("")
    show(paragraph(COLUMNS_EXPLAINED) + "\n", dim=True)
    if _fits_terminal(planned):
        for (device, method), blocks in outcome.speedups.items():
            if method != outcome.baseline:
                where = f"{style(method, bold=True)} on {style(device, bold=True)}"
                shown = _matrix(planned, blocks)
                show(f"{where}: speed-up{' (* does not fit)' * ('*' in shown)}\n{shown}\n")
    if outcome.output:
        show(f"{len(planned):,} rows in {outcome.output}")
    setup = replace(planned.setup, gpus=int(planned.gpus.max()))
    known = [(m.spec(), notes_before(planned.architecture, m, setup)) for m in planned.methods]
    left_out = [f"left out: {n} GPU{'s' * (n > 1)}: {why}" for n, why in outcome.left_out.items()]
    notes([*left_out, *named_notes(known)])


def _row(method: str, s: SweepSummary, outcome: FinishedSweep) -> list[str]:
    cells = ["", "", ""]
    if method != outcome.baseline:
        cells = [units.percent(s.verdicts[v] / s.rows) for v in ("faster", "slower")]
        cells.append("-".join(dict.fromkeys((f"{s.lowest:.2f}", f"{s.highest:.2f}"))))
    best = ["none", ""]
    if s.best:
        best = [units.count(s.best["tokens_per_s"]), f"{s.best['batch']} x {s.best['seq']}"]
    return [method, *cells, units.percent(s.fitting / s.rows), *best]


def best_rates(planned: Sweep, device: str, method: str, outcome: FinishedSweep) -> list[float]:
    """The most tokens a second of a method that fits, for each number of GPUs of a device; NaN where nothing fits."""
    found = [outcome.summaries[job_of(gpus, device), method].best for gpus in planned.gpus.tolist()]
    return [best["tokens_per_s"] if best else float("nan") for best in found]


def efficiencies(gpus: Sequence[int], rates: Sequence[float]) -> list[float]:
    """Each rate over that of the first that fits, as many GPUs as it has more: the scaling efficiency."""
    first = next(((n, rate) for n, rate in zip(gpus, rates, strict=True) if rate > 0), (1, float("nan")))
    return [rate / n * first[0] / first[1] for n, rate in zip(gpus, rates, strict=True)]


def _scaling(planned: Sweep, device: str, outcome: FinishedSweep) -> str:
    gpus = planned.gpus.tolist()
    names = list(dict.fromkeys(method for _, method in outcome.summaries))
    cells = []
    for name in names:
        rates = best_rates(planned, device, name, outcome)
        shares = efficiencies(gpus, rates)
        cells.append([f"{r:,.0f} {units.percent(e):>6}" if r > 0 else "" for r, e in zip(rates, shares, strict=True)])
    rows = [[str(n), *line] for n, line in zip(gpus, zip(*cells, strict=True), strict=True)]
    return table(("GPUs", *names), rows)


def _worth_it(planned: Sweep, on: DeviceProfile, method: str, outcome: FinishedSweep) -> str:
    """On how many GPUs a method fits, and what a second node gives."""
    gpus, rates = planned.gpus.tolist(), best_rates(planned, on.slug, method, outcome)
    fitting = {n: rate for n, rate in zip(gpus, rates, strict=True) if rate > 0}
    if not fitting:
        return f"{method} fits on none of these numbers of GPUs."
    if len(fitting) == len(gpus):
        said = f"{method} fits on all of these"
    elif list(fitting) == gpus[-len(fitting) :]:
        said = f"{method} fits from {min(fitting)} GPUs on"
    else:  # buckets of gradients are there on several GPUs alone
        said = f"{method} fits on {', '.join(map(str, fitting))} of these"
    node = placed(replace(planned.setup, gpus=gpus[-1]), on).node.gpus if gpus[-1] > 1 else 0
    if node in fitting and 2 * node in fitting:
        gain = fitting[2 * node] / fitting[node]
        worth = "worth it" if gain > WORTH else "hardly worth it" if gain > 1 else "not worth it"
        said += f"; a second node, {2 * node} GPUs for {node}: {gain:.2f} x the rate, {worth}"
    return said + "."


def _span(name: str, values: np.ndarray) -> str:
    return f"{name} {values[0]}" + (f"-{values[-1]}" if len(values) > 1 else "")


def _matrix(planned: Sweep, blocks: list[Columns]) -> str:
    ratios, fits = plane(planned, blocks, "speedup"), plane(planned, blocks, "fits")
    rows = []
    for i, batch in enumerate(planned.batch):
        cells = []
        for ratio, fit in zip(ratios[i], fits[i], strict=True):
            cells.append(style(f"{ratio:.2f}", fg=COLORS[verdict(ratio)]) + (" " if fit else "*"))
        rows.append([str(batch), *cells])
    return table(("batch \\ seq", *map(str, planned.seq)), rows)
