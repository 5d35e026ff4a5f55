"""`perfmodel predict`."""

from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from . import names
from .options import adapter_of_config, answer_json, extra, setup_of, setup_options


@click.command()
@click.option(
    "--method",
    shell_complete=names.methods,
    default="full",
    show_default=True,
    help="name[:key=value,...]; lists are joined by +.",
)
@click.option("--traced", is_flag=True, help="Trace the real transformers + peft program (needs the validate extra).")
@click.option("--peft-config", type=click.Path(path_type=Path), help="An adapter_config.json; implies --traced.")
@setup_options
def predict(method: str, traced: bool, peft_config: Path | None, as_json: bool, **options: Any) -> None:
    """Predict a step: FLOPs, traffic, kernels, time, memory."""
    setup = setup_of(options)
    given = click.get_current_context().get_parameter_source("method")
    if peft_config and given is click.core.ParameterSource.COMMANDLINE:
        raise UserError("give --method or --peft-config, not both")
    if traced and peft_config is None and given is not click.core.ParameterSource.COMMANDLINE:
        peft_config = adapter_of_config()
    if traced or peft_config:
        try:
            from ..tracing.traced import predict_traced as trace
        except ImportError as error:
            raise extra(error) from None
        host = options["host"]
        result = trace(options["model"], setup, options["device"], method=method, peft_config=peft_config, host=host)
    else:
        from ..prediction.predict import predict as run

        result = run(options["model"], method, setup, options["device"], host=options["host"])
    if as_json:
        answer_json(result.as_dict())
        return
    from ..report.terminal import show_prediction

    show_prediction(result)
