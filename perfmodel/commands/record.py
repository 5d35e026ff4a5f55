"""`perfmodel record`."""

from collections.abc import Sequence
from typing import Any

import click

from ..report.plain import paragraph, print_json, show
from .options import Lists, methods_of, methods_option, setup_of, setup_options


@click.command(cls=Lists)
@methods_option
@setup_options
def record(methods: Sequence[str], as_json: bool, **options: Any) -> None:
    """Trace the real programs of methods and keep them.

    Questions with --traced then need neither torch nor seconds, for any batch, length and optimizer, and on any device
    of the same kind; also on another machine that has the files. They lie in programs/ of $PERFMODEL_HOME, or else of
    the user's folder for configuration (~/.config/perfmodel).
    """
    from ..tracing.recorded import keep

    kept = keep(options["model"], methods_of(methods, options), setup_of(options), options["device"])
    if as_json:
        print_json([entry.as_dict() for entry in kept])
        return
    for entry in kept:
        size = entry.program.at
        holds = "any batch and length" if size is None else f"batch {size[0]} x {size[1]} alone"
        show(paragraph(f"{entry.method}: kept for {holds}; {'; '.join(entry.program.told)}"))
        show(f"  {entry.file}")
