"""`perfmodel estimate`."""

from typing import Any

import click

from .options import estimate_options, setup_of
from .traces import traced_type


@click.command()
@estimate_options
def estimate(model: str, as_json: bool, **options: Any) -> None:
    """Memory and time of training MODEL, by precision and method.

    Full fine-tuning, LoRA and QLoRA on one GPU; `compare` and `predict` answer of other methods and setups.

    MODEL is a bundled name, the path of a config.json or folder, or a hub id: perfmodel estimate Qwen/Qwen2.5-7B.
    """
    from ..questions.precisions import estimated

    setup = setup_of({"model": model, **options})
    result = estimated(_traced(model), setup, options["device"], host=options["host"])
    if as_json:
        from ..report.plain import print_json

        print_json(result.as_dict())
        return
    from ..report.terminal import show_estimate

    show_estimate(result)


def _traced(model: str) -> Any:
    """The model, traced where only that answers."""
    if not traced_type(model):
        return model
    from ..tracing.recorded import traced

    return traced(model)
