"""`perfmodel report`."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..report.plain import print_json
from .given_config import difference_from_config
from .options import (
    Lists,
    axes_of,
    methods_of,
    methods_option,
    model_of,
    setup_of,
    setup_options,
)


@click.command(cls=Lists)
@methods_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page to write.",
)
@click.option(
    "--axes",
    help="Where to look for a change of the verdict, joined by +; or none.  "
    "[default: batch+seq+size+targets; traced, where others are further traces, batch+seq]",
)
@setup_options
def report(methods: Sequence[str], output: Path, axes: str | None, as_json: bool, **options: Any) -> None:
    """Write a comparison as one self-contained HTML page.

    Answer, pictures, assumptions, accuracy, and the sources of the device's figures.
    """
    from ..report.page import report as page
    from ..resources import write_text

    model = model_of(options)
    again = shlex.join(["perfmodel", *sys.argv[1:]])
    html = page(
        model,
        methods_of(methods, options),
        setup_of(options),
        options["device"],
        host=options["host"],
        axes=axes_of(axes, model, ("batch", "seq", "size", "targets")),
        command=again,
        differs=difference_from_config(),
    )
    write_text(output, html)
    if as_json:
        print_json({"file": str(output)})
    else:
        click.echo(f"{output} written ({len(html.encode()) / 1000:.0f} kB)")
