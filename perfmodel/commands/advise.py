"""`perfmodel advise`."""

import gc
import re
from collections.abc import Sequence
from typing import Any

import click

from . import names
from .given_config import answer_json
from .options import Lists, methods_of, model_of, setup_of, setup_options

GARBAGE = 1_000_000  # objects between passes of the cycle collector: nearly all that a search makes is kept to its end
PREFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "KI": 2.0**10, "MI": 2.0**20, "GI": 2.0**30}
BYTES = {"B": 1.0, **PREFIXES, **{f"{prefix}B": factor for prefix, factor in PREFIXES.items()}}
NUMBER = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}


class Quantity(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """A positive number with a unit: `24GB`, `20M`, `80GiB`.

    Args:
        units: what each unit stands for, by its name in capitals.
        example: for those who write none of them.
    """

    name = "quantity"

    def __init__(self, units: dict[str, float], example: str) -> None:
        self.units = units
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-zA-Z]*)\s*", str(value))
        if not match or match[2].upper() not in self.units or float(match[1]) <= 0:
            self.fail(f"{value!r} is not a positive number with a unit such as {self.example}", param, ctx)
        return float(match[1]) * self.units[match[2].upper()]


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
    "--min-trainable",
    type=Quantity(NUMBER, "20M or 1.5B"),
    help="Consider every kind of method that trains at least so many parameters: 20M.",
)
@click.option(
    "--memory", type=Quantity(BYTES, "24GB or 80GiB"), help="Memory limit such as 24GB; default the device's."
)
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
    gc.set_threshold(GARBAGE)
    from ..questions.advice import advise as run
    from ..report.advice import searching, show_advice

    chosen, *more = methods_of([method], options, "method", least=0)
    with searching() as progress:
        advice = run(
            model_of(options), chosen, setup_of(options), options["device"], methods=[*more, *methods],
            memory_bytes=memory, min_trainable=min_trainable, host=options["host"], progress=progress,
        )  # fmt: skip
    if as_json:
        answer_json(advice.as_dict())
    else:
        show_advice(advice)
