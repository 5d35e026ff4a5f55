"""`perfmodel validate ...`: its commands need the validate extra, `published` excepted."""

import sys
from pathlib import Path

import click

from ..errors import UserError
from .options import extra, json_option


@click.group()
def validate() -> None:
    """Check the model against real PyTorch programs and real measurements."""


@validate.command()
@click.option(
    "--grid",
    type=click.Choice(("quick", "standard", "all")),
    default="quick",
    show_default=True,
    help="quick: a part of every combination; standard: real dims too; all: every combination.",
)
@click.option(
    "--cuda-forward",
    is_flag=True,
    help="Compare the CUDA form of the forward instead (needs a CUDA build of torch, no GPU).",
)
@json_option
def counts(grid: str, cuda_forward: bool, as_json: bool) -> None:
    """Compare the tape with the real transformers + peft program, ATen call by ATen call."""
    try:
        from validate import counts as module
        from validate.show import show_counts
    except ImportError as error:
        raise extra(error) from None
    if cuda_forward and not module.has_cuda_build():
        raise UserError("--cuda-forward needs a CUDA build of torch (no GPU is needed): this one is built for the CPU")
    failed = show_counts(module, grid, cuda_forward=cuda_forward, as_json=as_json)
    sys.exit(1 if failed else 0)


@validate.command()
def speed() -> None:
    """Measure the speed promises: cold start, warm prediction, grids."""
    from validate.speed import measure

    from ..report.terminal import console, table

    rows = measure()
    console.print(table("", ("what", "measured", "limit", ""), ((*r[:3], "ok" if r[3] else "missed") for r in rows)))
    sys.exit(0 if all(r[3] for r in rows) else 1)


@validate.command()
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw predicted against measured (PNG).")
@click.option("--rows", "all_rows", is_flag=True, help="Print every row, not only those that miss by more than 25 %.")
@json_option
def published(plot: Path | None, all_rows: bool, as_json: bool) -> None:
    """Compare predictions with training steps that others measured and published."""
    from validate.show import show_published

    show_published(plot=plot, all_rows=all_rows, as_json=as_json)


@validate.command()
@click.option("--all-rows", is_flag=True, help="List every row, not only the worst.")
@json_option
def tuners(all_rows: bool, as_json: bool) -> None:
    """Compare PEFT's benchmark of its tuners (Llama-3.2-3B, L40S) with predictions from traces; takes minutes."""
    try:
        from validate import tuners as module
        from validate.show import show_tuners
    except ImportError as error:
        raise extra(error) from None
    sys.exit(0 if show_tuners(module, all_rows=all_rows, as_json=as_json) else 1)


@validate.command()
@click.option(
    "--kernels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of published kernel measurements.",
)
@click.option(
    "--leave-one-device-out", is_flag=True, help="Only report how well datasheets and other devices predict one."
)
@click.option("--dry-run", is_flag=True, help="Fit and report, but write no device file.")
@json_option
def fit(kernels: Path, leave_one_device_out: bool, dry_run: bool, as_json: bool) -> None:
    """Fit the device profiles to kernel measurements; errors are on rows left out of the fit."""
    try:
        from validate.show import show_fit
    except ImportError as error:
        raise extra(error) from None
    show_fit(kernels, leave_one_device_out=leave_one_device_out, write=not dry_run, as_json=as_json)


@validate.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("host.toml"), show_default=True)
def host(output: Path) -> None:
    """Measure this machine's host costs and write a host file for --host."""
    try:
        from validate.show import show_host
    except ImportError as error:
        raise extra(error) from None
    show_host(output)
