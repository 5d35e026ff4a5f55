"""Several GPUs as a training config, or the launcher's config given by `--accelerate`, has them; what is typed wins."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from ..imports import Imported

LAUNCH = f"{__name__}.launch"  # what a launcher's config says, for the command that was given one


def _read_launch(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Take the number of GPUs and nodes of a launcher's config as the defaults of the command."""
    if path is None:
        return
    from ..errors import escaped
    from ..imports.accelerate import read_launch

    launch = ctx.meta[LAUNCH] = read_launch(path)
    sizes = {"gpus": launch.gpus, "nodes": launch.nodes}
    ctx.default_map = {**(ctx.default_map or {}), **{name: n for name, n in sizes.items() if n is not None}}
    click.echo(f"note: {escaped(path.name)} ({launch.tool}): {launch.in_words}", err=True)


def on_its_gpus(ctx: click.Context, found: "Imported | None", options: dict[str, Any]) -> "Imported | None":
    """What a command's files say of the GPUs that it is asked for; puts it into the options that are not typed.

    Raises:
        UserError: the files contradict each other.
    """
    launch, gpus = ctx.meta.get(LAUNCH), options["gpus"]
    several = max(gpus) > 1 if isinstance(gpus, tuple) else gpus > 1
    before = dict(found.setup) if found is not None else {}

    def typed(name: str) -> bool:
        return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE

    if launch is not None and typed("gpus") and not typed("nodes"):
        options["nodes"] = None  # those of the file hold the file's GPUs
    in_place = {name: options[name] if typed(name) else None for name in ("parallel", "cp")}
    if launch is not None:
        found = launch.of(found, several=several, **in_place)
    elif found is not None and several:
        found = found.on_several(found.asks().as_typed(**in_place))
    else:
        return found
    if several:
        found = found.over(gpus if isinstance(gpus, tuple) else (gpus,))
    for name, value in found.setup.items():
        if value != before.get(name) and name in options and not typed(name):
            options[name] = value
    return found


accelerate_option = click.option(
    "--accelerate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_launch,
    help="Take GPUs, nodes and what they do from accelerate's config file, or from DeepSpeed's; beside --config, whose "
    "own words win, or without.",
)
