"""`perfmodel explain`."""

from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from . import names
from .given_config import answer_json
from .options import axes_of, methods_of, model_of, setup_of, setup_options


@click.command()
@click.argument("a", shell_complete=names.methods)
@click.argument("b", shell_complete=names.methods, required=False)
@click.option(
    "--axes",
    help="Where to look for a change of the verdict: batch, seq, size (rank, k), targets, joined by +; or none.  "
    "[default: batch+seq+size; traced, where every size is another trace, batch+seq]",
)
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw waterfall and rooflines (SVG).")
@setup_options
def explain(a: str, b: str | None, axes: str | None, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Explain, part by part, why B is faster or slower than A."""
    from ..questions.explanation import explain as run

    one, *two = methods_of([a, *([b] if b else [])], options, "a")
    if len(two) != 1:
        raise UserError(
            "explain takes two methods, the second of which may be --peft-config, e.g. explain full lora:r=8"
        )
    model, host = model_of(options), options["host"]
    wanted = axes_of(axes, model, ("batch", "seq", "size"))
    result = run(model, one, two[0], setup_of(options), options["device"], host=host, axes=wanted)
    if plot:
        from ..report.pictures import draw_picture

        draw_picture(result, plot)
    if as_json:
        answer_json(result.as_dict())
        return
    from ..report.explained import show_explanation

    show_explanation(result)
