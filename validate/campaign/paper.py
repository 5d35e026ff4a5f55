"""`perfmodel validate paper`: the claim of arXiv 2507.08833 on this machine's device.

The paper finds that LoRA makes forward and backward pass slower, not faster, and by how much depends on the
architecture. Here the ratio of LoRA to full fine-tuning is measured and predicted; on a CPU for the same architectures
in small.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.prediction.predict import Prediction, predict
from perfmodel.questions.speedup import verdict

from ..accuracy import BASELINE, DECIDED
from ..checking.check import check_records
from ..measuring import cells, run
from ..measuring.cells import GRIDS, Cell, Grid
from ..published import steps

PHASES = ("forward", "backward")
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class PaperRow:
    """LoRA beside full fine-tuning of one architecture: seconds of forward + backward, LoRA's over the full ones.

    Attributes:
        measured: the ratio here; None where nothing was measured.
        published: the paper's figure for the same model and setup, on its A100; None where it is not known.
    """

    cell: Cell
    measured: float | None
    predicted: float
    published: float | None

    @property
    def right(self) -> bool:
        """Whether faster, slower or same (within 5 %) comes out as measured, where more than 10 % decide it."""
        if self.measured is None or 1 / DECIDED <= self.measured <= DECIDED:
            return True
        return bool(verdict(1 / self.measured) == verdict(1 / self.predicted))

    def as_dict(self) -> dict[str, Any]:
        """Plain values; verdicts are LoRA's."""
        return {
            "model": self.cell.config.name, "method": self.cell.method, "setup": self.cell.setup.as_dict(),
            **{name: {"ratio": r, "verdict": verdict_of_ratio(r)} for name, r in self.ratios().items()},
        }  # fmt: skip

    def ratios(self) -> dict[str, float | None]:
        """Where a ratio is from -> the ratio."""
        return {"measured": self.measured, "predicted": self.predicted, "paper": self.published}


def verdict_of_ratio(ratio: float | None) -> str:
    """LoRA is faster, slower, or the same (within 5 %), by the ratio of its time to full fine-tuning's."""
    return "" if ratio is None else str(verdict(1 / ratio))


def grid_of(kind: str) -> Path:
    """The steps for a kind of device."""
    return GRIDS / f"{kind}-paper.toml"


def measured(
    kind: str, output: Path, *, grid: Path | None = None, device: str | None = None, host: str | None = None,
    threads: int | None = None, progress: Progress = lambda done, total, label: None,
) -> list[PaperRow]:  # fmt: skip
    """Measure the steps that `output` has no record of yet, and compare.

    Raises:
        UserError: no such device here, or no profile of it (`perfmodel calibrate` makes one).
    """
    plan = run.plan(str(grid or grid_of(kind)), kind, threads=threads)
    run.measure_cells(plan, output, progress)
    found = check_records([output], device=device, host=host)
    rows = []
    for pair in found.pairs:
        seconds = [sum(o.measured.median(phase) for phase in PHASES) for o in (pair.other, pair.full)]
        ratio = _ratio(pair.other.predicted, pair.full.predicted)
        rows.append(
            PaperRow(pair.other.measured.cell, seconds[0] / seconds[1], ratio, _published(pair.other.measured.cell))
        )
    return sorted(rows, key=lambda r: (r.cell.config.name, r.cell.setup.tokens))


def predicted_claim(device: str, host: str | None = None) -> list[PaperRow]:
    """The same on a device that need not be here.

    Raises:
        UserError: an unknown device or host.
    """
    on = profile.load(device)
    by = hosts.host_of(host or "default", on)
    grid: Grid = cells.load_grid(str(grid_of(on.kind)), on.kind)
    full = {c.group: c for c in grid.cells if c.method == BASELINE}
    rows = []
    for cell in (c for c in grid.cells if c.method != BASELINE):
        lora, base = (predict(c.config, c.method, c.setup, on, host=by) for c in (cell, full[cell.group]))
        rows.append(PaperRow(cell, None, _ratio(lora, base), _published(cell)))
    return rows


def _ratio(lora: Prediction, full: Prediction) -> float:
    seconds = [sum(float(p.time.phases[phase]) for phase in PHASES) for p in (lora, full)]
    return seconds[0] / seconds[1]


def _published(cell: Cell) -> float | None:
    """The paper's ratio for a model and a size of batch."""
    rows = [r for r in steps.published_steps() if r.family == "paper" and r.model == cell.config.name]
    same = [r for r in rows if (r.setup.batch, r.setup.seq) == (cell.setup.batch, cell.setup.seq)]
    seconds = {r.method: sum(r.seconds.values()) for r in same}
    return seconds[cell.method] / seconds[BASELINE] if {cell.method, BASELINE} <= set(seconds) else None


def claim_answer(rows: list[PaperRow]) -> str:
    """The claim in one sentence."""
    parts = []
    for name in ("measured", "predicted"):
        ratios = [r for row in rows if (r := row.ratios()[name]) is not None]
        if ratios:
            slower = sum(verdict_of_ratio(r) == "slower" for r in ratios)
            parts.append(f"{name} slower in {slower} of {len(ratios)}, {min(ratios):.2f} to {max(ratios):.2f} times")
    return f"forward + backward of LoRA against full fine-tuning: {'; '.join(parts)}"
