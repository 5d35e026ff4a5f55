"""`perfmodel compare`."""

from collections.abc import Sequence
from typing import Any

import click

from . import names
from .options import Lists, print_json, setup_of, setup_options


@click.command(cls=Lists)
@click.option(
    "--methods",
    shell_complete=names.methods,
    multiple=True,
    default=("full", "lora"),
    help="Methods, baseline first: full lora:r=16 ...",
)
@setup_options
def compare(methods: Sequence[str], as_json: bool, **options: Any) -> None:
    """Compare methods in one setup; the first is the baseline."""
    from ..compare import compare as run

    result = run(options["model"], methods, setup_of(options), options["device"], host=options["host"])
    if as_json:
        print_json(result.as_dict())
        return
    from ..report.terminal import show_comparison

    show_comparison(result)
