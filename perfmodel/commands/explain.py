"""`perfmodel explain`."""

from pathlib import Path
from typing import Any

import click

from ..report.plain import print_json
from . import names
from .options import setup_of, setup_options


@click.command()
@click.argument("a", shell_complete=names.methods)
@click.argument("b", shell_complete=names.methods)
@click.option(
    "--axes",
    default="batch+seq+size",
    show_default=True,
    help="Where to look for a change of the verdict: batch, seq, size (rank, k), targets, joined by +; or none.",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw waterfall and rooflines (SVG).")
@setup_options
def explain(a: str, b: str, axes: str, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Explain, part by part, why B is faster or slower than A."""
    from ..questions.explanation import explain as run

    wanted = () if axes == "none" else tuple(axes.split("+"))
    host = options["host"]
    result = run(options["model"], a, b, setup_of(options), options["device"], host=host, axes=wanted)
    if plot:
        from ..report.pictures import draw_picture

        draw_picture(result, plot)
    if as_json:
        print_json(result.as_dict())
        return
    from ..report.explained import show_explanation

    show_explanation(result)
