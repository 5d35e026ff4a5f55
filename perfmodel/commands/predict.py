"""`perfmodel predict`."""

from typing import Any

import click

from ..errors import UserError
from . import names
from .given_config import answer_json
from .options import methods_of, model_of, setup_of, setup_options


@click.command()
@click.option(
    "--method",
    shell_complete=names.methods,
    default="full",
    show_default=True,
    help="name[:key=value,...]; lists are joined by +.",
)
@setup_options
def predict(method: str, as_json: bool, **options: Any) -> None:
    """Predict a step: FLOPs, traffic, kernels, time, memory."""
    from ..prediction.predict import predict as run

    chosen, *more = methods_of([method], options, "method", least=0)
    if more:
        raise UserError("give --method or --peft-config, not both")
    result = run(model_of(options), chosen, setup_of(options), options["device"], host=options["host"])
    if as_json:
        answer_json(result.as_dict())
        return
    from ..report.terminal import show_prediction

    show_prediction(result)
