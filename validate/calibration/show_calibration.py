"""What `perfmodel calibrate` prints."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perfmodel.report.plain import paragraph, print_json, show, table
from perfmodel.report.progress import filling, stoppable

from ..accuracy import Errors
from ..fitting.show import show_caveats
from ..quiet import without_warnings_of_packages
from .calibrate import Calibration, calibrate
from .verify import TITLES


def show_calibration(
    device: str, name: str, *, threads: int | None, seconds: float, output: Path | None, as_json: bool
) -> bool:
    """Calibrate with a progress bar, then print what came of it; returns whether the files were written."""
    without_warnings_of_packages()
    with stoppable("nothing was written"), filling() as tick:
        done = calibrate(device, name, threads=threads, seconds=seconds, output=output, progress=tick)
    if as_json:
        print_json(_plain(done))
        return not done.refusal
    rows = [
        (block, f.rows_fitted, f.rows_left_out, *(f"{100 * e:.1f} %" for e in (f.errors.mean, f.errors.roofline_mean)))
        for block, f in done.fits.items()
    ]
    show(table(("block", "fitted on", "left out", "mean error", "plain roofline"), rows))
    show_checks(done.checks)
    show_caveats({**{block: f.caveats for block, f in done.fits.items()}, "host": done.by.caveats})
    for caveat in done.caveats:
        show(paragraph(caveat), colour="yellow")
    if done.refusal:
        show(done.refusal, colour="yellow")
        return False
    show(f"\n{done.profile.name}, in {done.seconds:.0f} s:")
    for path in (done.device, done.host):
        show(f"  {path}")
    show(f"use it with --device {name}")
    return True


def show_checks(checks: Mapping[str, Errors]) -> None:
    """Print the errors of predicting what was timed, and what no fit has seen."""
    rows = [
        (TITLES[key], e.number, *(f"{100 * x:.1f} %" for x in (e.mean, e.median, e.worst))) for key, e in checks.items()
    ]
    show(table(("predicted", "number", "mean error", "median", "worst"), rows))


def _plain(done: Calibration) -> dict[str, Any]:
    """The JSON of a calibration: its files, the errors of its check and of each block on the rows left out of it."""
    return {
        "name": done.profile.name, "device": str(done.device), "host": str(done.host), "seconds": done.seconds,
        "written": not done.refusal, "refusal": done.refusal, "caveats": done.caveats,
        "checks": {key: asdict(errors) for key, errors in done.checks.items()},
        "blocks": {
            block: {**asdict(f.errors), "rows_fitted": f.rows_fitted, "rows": f.rows_left_out, **asdict(f.caveats)}
            for block, f in done.fits.items()
        },
        "host_figures": asdict(done.by.caveats),
    }  # fmt: skip
