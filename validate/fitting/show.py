"""What `perfmodel validate fit --kernels` prints."""

from collections.abc import Mapping
from typing import Any

from perfmodel import units
from perfmodel.partitions import Workers
from perfmodel.report.plain import paragraph, print_json, show, table
from perfmodel.report.progress import counting

from . import fit
from .judging import FitCaveats

PARTS = {"grouped": fit.fit_grouped, "residual": fit.fit_residuals, "early": fit.fit_early}


def show_fit(
    folder: Any, *, leave_one_device_out: bool, part: str = "", write: bool, as_json: bool,
    workers: Workers = fit.ALONE,
) -> None:  # fmt: skip
    """Fit device profiles and print the errors on left-out rows, a plain roofline beside them.

    Args:
        part: what is fitted alone, one of `PARTS`; all if empty.
        workers: who fits products, where all is fitted.
    """
    with counting("reading") as tick:
        if leave_one_device_out:
            rows = fit.leave_one_device_out(folder, tick, workers=workers)
        elif part:
            rows = PARTS[part](folder, tick, write=write)
        else:
            rows = fit.fit_kernels(folder, progress=tick, write=write, workers=workers)
    if as_json:
        print_json(rows)
        return
    cells = (
        [r["block"], r["device"], r["slice"], r["rows"],
         *(units.percent(_number(r.get(k)), 1) for k in ("mean", "median", "p90", "roofline_mean"))]
        for r in rows
    )  # fmt: skip
    columns = ("block", "device", "rows of", "rows", "mean", "median", "p90", "plain roofline")
    show(table(columns, cells, left=(0, 1, 2), title="|relative error| on rows that the fit did not see"))
    show_caveats({f"{r['block']} {r['device']}": FitCaveats(r["kept"], r["at_bound"]) for r in rows if "kept" in r})


def show_caveats(caveats: Mapping[str, FitCaveats]) -> None:
    """Print, fit by fit, which figures were not measured and which went as far as they may."""
    for what, found in caveats.items():
        for title, names in (("not measured, so the default's", found.kept), ("at a bound", found.at_bound)):
            if names:
                show(paragraph(f"{what}, {title}: {', '.join(names)}"))


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)
