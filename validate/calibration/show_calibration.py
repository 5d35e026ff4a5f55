"""What `perfmodel calibrate` prints."""

import warnings
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from perfmodel.report.terminal import console, table

from .calibrate import calibrate


def show(device: str, name: str, *, threads: int | None, seconds: float, output: Path | None) -> None:
    """Calibrate with a progress bar, then print what came of it."""
    warnings.filterwarnings("ignore")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True,
        auto_refresh=False,
    )  # fmt: skip
    with bar:
        task = bar.add_task("loading", total=1.0)

        def tick(share: float, label: str) -> None:
            bar.update(task, completed=share, description=label[:60])
            bar.refresh()

        done = calibrate(device, name, threads=threads, seconds=seconds, output=output, progress=tick)
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
