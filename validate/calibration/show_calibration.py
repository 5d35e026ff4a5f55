"""What `perfmodel calibrate` prints."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perfmodel.report.progress import progress
from perfmodel.report.terminal import console, table

from .calibrate import Calibration, calibrate


def show(device: str, name: str, *, threads: int | None, seconds: float, output: Path | None, as_json: bool) -> None:
    """Calibrate with a progress bar, then print what came of it."""
    warnings.filterwarnings("ignore")
    with progress(counted=False, auto_refresh=False) as bar:
        task = bar.add_task("loading", total=1.0)

        def tick(share: float, label: str) -> None:
            bar.update(task, completed=share, description=label[:60])
            bar.refresh()

        done = calibrate(device, name, threads=threads, seconds=seconds, output=output, progress=tick)
    if as_json:
        print(json.dumps(_plain(done), indent=1))
        return
    rows = [
        (block, f.rows_fitted, f.rows_left_out, *(f"{100 * e:.1f} %" for e in (f.errors.mean, f.errors.roofline_mean)))
        for block, f in done.fits.items()
    ]
    rows.append(("host", "", "", f"{100 * done.host_error:.1f} %", ""))
    console.print(table("", ("block", "fitted on", "left out", "mean error", "plain roofline"), rows, left=1))
    console.print(f"\n{done.profile.name}, in {done.seconds:.0f} s:", markup=False)
    for path in (done.device, done.host):
        console.print(f"  {path}", markup=False, soft_wrap=True)
    console.print(f"use it with --device {name}")


def _plain(done: Calibration) -> dict[str, Any]:
    """The JSON of a calibration: its files, and the errors of each fitted block on the rows left out of it."""
    return {
        "name": done.profile.name, "device": str(done.device), "host": str(done.host), "seconds": done.seconds,
        "host_error": done.host_error,
        "blocks": {
            block: {**asdict(f.errors), "rows_fitted": f.rows_fitted, "rows": f.rows_left_out}
            for block, f in done.fits.items()
        },
    }  # fmt: skip
