"""`perfmodel sweep`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from .given_config import answer_json
from .options import GridAxis, Lists, grid_options, methods_of, methods_option, model_of, setup_of_counts
from .parted import partitions_asked

PRINTED = 100_000  # rows that go to the terminal as JSON; more belong in a file
UNASKED = 50_000_000  # rows that are computed without --yes: some minutes, and some gigabytes in a file
RATE, ROW = 100_000, 100  # rows a second on one core (`validate speed`), bytes of one in CSV, about


@click.command(cls=Lists)
@methods_option
@click.option("--rank", type=GridAxis(), default=(), help="Ranks for the methods that have one.")
@click.option(
    "--k", type=GridAxis(), default=(), help="Numbers of trained blocks for the methods that have one (top_k)."
)
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False, path_type=Path), help="Write every row: .csv, .json or .parquet."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the speed-up as heat maps, or over several numbers of GPUs the rates (.png, .svg, .pdf).",
)
@click.option("--yes", is_flag=True, help=f"Compute more than {UNASKED // 10**6} million rows.")
@grid_options
def sweep(
    methods: Sequence[str],
    rank: tuple[int, ...],
    k: tuple[int, ...],
    output: Path | None,
    plot: Path | None,
    yes: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Predict grids of batch, length, rank, K, GPUs and devices.

    Axes take a number, a list 1+2+4, a range 128-8192:128 (from-to:step) or a doubling range 1-64*2.
    """
    from ..questions.sweeps import sweep as plan

    axes = {name: options.pop(name) for name in ("batch", "seq", "gpus", "device")}
    setup = setup_of_counts(options, axes["gpus"], axes["device"])
    planned = plan(
        model_of(options), methods_of(methods, options), setup, axes["device"], host=options["host"],
        batch=axes["batch"], seq=axes["seq"], rank=rank, k=k, gpus=axes["gpus"],
    )  # fmt: skip
    if as_json and not output and len(planned) > PRINTED:
        raise UserError(f"{len(planned):,} rows are too many to print: give --output FILE")
    if len(planned) > UNASKED and not yes:
        hours, gigabytes = len(planned) / RATE / 3600, len(planned) * ROW / 1e9
        raise UserError(
            f"{len(planned):,} rows would take about {hours:,.1f} hours and {gigabytes:,.0f} GB in a file: "
            f"give fewer values, or --yes"
        )
    from ..report import heatmap, scaling
    from ..report.sweeps import run_sweep, show_summary

    if plot:
        heatmap.check_drawable(planned, plot)
    with partitions_asked(options, planned.question, output) as kept:
        result = run_sweep(
            planned, output=output, keep_rows=as_json and output is None, keep_speedups=plot is not None, kept=kept
        )
    if plot and len(planned.gpus) > 1:
        scaling.draw_scaling(planned, result, plot)
    elif plot:
        heatmap.draw_heatmap(planned, result.speedups, plot)
    if as_json:
        answer_json(result.as_dict())
    else:
        show_summary(planned, result)
