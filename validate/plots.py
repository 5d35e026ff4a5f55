"""Pictures of validation results (matplotlib)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perfmodel.errors import UserError


def parity(outcomes: Sequence[Any], path: Path) -> None:
    """Predicted against measured step time, log-log, one colour a source; open marks were used by the fit."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 6.0), layout="constrained")
    families = sorted({o.row.family for o in outcomes})
    for color, family in zip(plt.get_cmap("tab10").colors, families, strict=False):  # type: ignore[attr-defined]
        for split, filled in (("check", True), ("fit", False)):
            members = [o for o in outcomes if o.row.family == family and o.row.split == split]
            axes.errorbar(
                [o.measured_total for o in members],
                [o.predicted_total for o in members],
                yerr=[
                    [max(0.0, o.predicted_total - o.low) for o in members],
                    [max(0.0, o.high - o.predicted_total) for o in members],
                ],
                fmt="o", color=color, mfc=color if filled else "white", ms=5, lw=0.7, alpha=0.85,
                label=family if filled else None,
            )  # fmt: skip
    figures = [f for o in outcomes for f in (o.measured_total, o.predicted_total)]
    line = [min(figures) / 1.3, max(figures) * 1.3]
    axes.plot(line, line, color="0.3", lw=1)
    for factor in (1.25, 0.8):
        axes.plot(line, [factor * x for x in line], color="0.7", lw=0.8, ls="--")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=line,
        ylim=line,
        xlabel="measured step time, s",
        ylabel="predicted step time, s",
    )
    axes.set_title("Published training steps (filled: held out, open: fit; dashed: ±25 %)", fontsize=10)
    axes.legend(frameon=False)
    axes.grid(which="major", color="0.92")
    temporary = path.with_name(path.name + ".part")
    try:
        figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
        temporary.replace(path)
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be drawn ({error})") from None
    finally:
        plt.close(figure)
