"""`perfmodel advise`."""

import gc
from collections.abc import Sequence
from typing import Any

import click

from . import names
from .given_config import answer_json
from .options import Lists, methods_of, model_of, setup_of, setup_options
from .quantity import BYTES, NUMBER, Quantity

GARBAGE = 1_000_000  # objects between passes of the cycle collector: nearly all that a search makes is kept to its end


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
