"""Pictures of validation results (matplotlib)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perfmodel.errors import UserError
from perfmodel.resources import written

NAMED = 10  # series with a colour of their own


@dataclass(frozen=True)
class Point:
    """A measured time and its prediction with its interval, seconds; open marks were used by a fit."""

    series: str
    measured: float
    predicted: float
    low: float
    high: float
    filled: bool = True


def plot_parity(points: Sequence[Point], path: Path, title: str) -> None:
    """Predicted against measured step time, log-log, one colour a series.

    Raises:
        UserError: the file cannot be drawn, or matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("plots need the report extra (matplotlib): pip install 'perfmodel[report]'") from None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 6.0), layout="constrained")
    series = sorted({p.series for p in points})
    for i, name in enumerate(series):
        for filled in (True, False):
            members = [p for p in points if p.series == name and p.filled == filled]
            color = f"C{i % NAMED}"
            axes.errorbar(
                [p.measured for p in members],
                [p.predicted for p in members],
                yerr=[
                    [max(0.0, p.predicted - p.low) for p in members], [max(0.0, p.high - p.predicted) for p in members],
                ],
                fmt="o", color=color, mfc=color if filled else "white", ms=5, lw=0.7, alpha=0.85,
                label=name if filled else None,
            )  # fmt: skip
    figures = [f for p in points for f in (p.measured, p.predicted)]
    line = [min(figures) / 1.3, max(figures) * 1.3]
    axes.plot(line, line, color="0.3", lw=1)
    for factor in (1.25, 0.8):
        axes.plot(line, [factor * x for x in line], color="0.7", lw=0.8, ls="--")
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line)
    axes.set(xlabel="measured step time, s", ylabel="predicted step time, s")
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False)
    axes.grid(which="major", color="0.92")
    try:
        with written(path, "drawn") as place:
            figure.savefig(place, dpi=150, format=path.suffix.lstrip(".") or "png")
    except ValueError as error:  # of a format that is unknown
        raise UserError(f"{path}: cannot be drawn ({error})") from None
    finally:
        plt.close(figure)
