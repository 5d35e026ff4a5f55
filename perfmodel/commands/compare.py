"""`perfmodel compare`."""

from collections.abc import Sequence
from typing import Any

import click

from .given_config import answer_json
from .options import Lists, methods_of, methods_option, model_of, setup_of, setup_options


@click.command(cls=Lists)
@methods_option
@setup_options
def compare(methods: Sequence[str], as_json: bool, **options: Any) -> None:
    """Compare methods in one setup; the first is the baseline."""
    from ..questions.comparison import compare as run

    chosen = methods_of(methods, options)
    result = run(model_of(options), chosen, setup_of(options), options["device"], host=options["host"])
    if as_json:
        answer_json(result.as_dict())
        return
    from ..report.terminal import show_comparison

    show_comparison(result)
