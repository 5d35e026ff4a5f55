"""`perfmodel advise`."""

import re
from collections.abc import Sequence
from typing import Any

import click

from . import names
from .options import Lists, print_json, setup_of, setup_options

UNITS = {
    "": 1.0,
    "B": 1.0,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "GIB": 2.0**30,
    "MIB": 2.0**20,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
}


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """A positive number with a unit: `24GB`, `20M`, `80GiB`."""

    name = "quantity"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(value))
        if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a positive number with a unit such as 24GB, 80GiB or 20M", param, ctx)
        return float(match[1]) * UNITS[match[2].upper()]


@click.command(cls=Lists)
@click.option(
    "--method",
    shell_complete=names.methods,
    default="lora",
    show_default=True,
    help="Where you are; its own options are searched.",
)
@click.option("--methods", shell_complete=names.methods, multiple=True, default=(), help="Further methods to consider.")
@click.option(
    "--min-trainable", type=Quantity(), help="Consider every kind of method that trains at least so much: 20M."
)
@click.option("--memory", type=Quantity(), help="Memory limit such as 24GB; default the device's.")
@setup_options
def advise(
    method: str,
    methods: Sequence[str],
    min_trainable: float | None,
    memory: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find the fastest way to train that fits, change by change.

    The samples of an optimizer step stay as given by --batch and --grad-accum.
    """
    from ..advise import advise as run
    from ..report.advice import searching, show_advice

    with searching() as progress:
        advice = run(
            options["model"], method, setup_of(options), options["device"], methods=methods, memory_bytes=memory,
            min_trainable=min_trainable, host=options["host"], progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(advice.as_dict())
    else:
        show_advice(advice)
