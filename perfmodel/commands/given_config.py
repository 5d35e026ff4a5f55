"""A training config given by `--config`: its values are the defaults of a command, its doubts the first line."""

from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..errors import UserError, escaped
from ..setup import WITHIN
from . import given_launch, traces
from .given_launch import Command

CONFIG = f"{__name__}.config"  # what a training config says, for the command that was given one
OF_SEVERAL = ("gpus", "tp", "pp", "compile", "parallel")  # on which it depends what several GPUs are modelled with


def _read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Take a training config's values as the defaults of the command; what is typed wins."""
    if path is None:
        return
    from ..imports import read

    found = read(path)
    defaults: dict[str, Any] = {name: value for name, value in found.setup.items() if value is not None} | found.job
    if found.model:
        defaults["model"] = found.model
    if found.method:
        defaults |= {"method": found.method, "methods": (found.baseline, found.method)}
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    ctx.meta[CONFIG] = found
    said = [f"{path.name} ({found.tool}): {found.method or 'no method'}"]
    said += [f"ignored, as of no weight here: {', '.join(found.ignored)}"] if found.ignored else []
    for line in [*said, *found.notes]:
        click.echo(f"note: {_one_line(line)}", err=True)


def settled(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the step of a training config is answered; how it differs is printed first.

    Raises:
        UserError: the config's method can only be traced, and neither that nor another method is asked for.
    """
    ctx = click.get_current_context()
    if CONFIG in ctx.meta and is_traced(options):
        options, said = traces.followed(options, {name for name in options if _of_config(name)})
        found = ctx.meta[CONFIG] = replace(ctx.meta[CONFIG].replaced(said), traced=True)
        differ(traces.otherwise(options["model"], found))
    if CONFIG in ctx.meta and options["images"]:
        found = ctx.meta[CONFIG]
        kept = [d for d in found.differences if not d.startswith(traces.OF_TEXT)]
        ctx.meta[CONFIG] = replace(found, differences=kept)
    _check(ctx, options, traces.traced_type(options["model"]))
    return options


def _check(ctx: click.Context, options: dict[str, Any], traced_type: str) -> None:
    """Begin the answer with how its step differs from a training config's, whose packing may have to be another, and
    what it was traced for.

    Raises:
        UserError: the config's method can only be traced, and neither that nor another method is asked for.
    """
    found = ctx.meta.get(CONFIG)
    if found is None:
        return
    typed = [ctx.get_parameter_source(name) for name in ("method", "methods", "a") if name in ctx.params]
    if found.why_traced and not ctx.params.get("traced") and ParameterSource.COMMANDLINE not in typed:
        raise UserError(found.why_traced)
    if ParameterSource.COMMANDLINE in typed:
        found = ctx.meta[CONFIG] = found.with_method()
    if ctx.get_parameter_source("seq") == ParameterSource.COMMANDLINE:
        found = ctx.meta[CONFIG] = found.with_seq()
    if options["lengths"] or ctx.get_parameter_source("packing") == ParameterSource.COMMANDLINE:
        found = ctx.meta[CONFIG] = found.with_lengths(padded=_pads(options))
    if _packs_otherwise(ctx, options):
        found = ctx.meta[CONFIG] = found.across_samples(options["packing"])
        options["packing"] = "dense"
    by_trace = f"{traces.TRACED}: {traced_type} has no built-in form" if traced_type else ""
    first_line = "; ".join(filter(None, (found.first_line, by_trace)))
    if first_line and not ctx.params.get("as_json"):
        click.echo(_one_line(first_line) + "\n")


def _one_line(said: str) -> str:
    """What is said of a file, whose keys may hold anything."""
    return escaped(said).replace("\n", r"\n")


def _pads(options: dict[str, Any]) -> bool:
    """Whether samples of different lengths share a micro-batch."""
    return bool(options["lengths"]) and options["packing"] == "none"


def _packs_otherwise(ctx: click.Context, options: dict[str, Any]) -> bool:
    """Whether a training config asks for attention within packed documents where that is not modelled."""
    if options["packing"] not in WITHIN or ctx.get_parameter_source("packing") != ParameterSource.DEFAULT_MAP:
        return False
    if is_traced(options):
        return True
    from ..prediction.predict import architecture_of

    model = architecture_of(options["model"])
    return not model.traits.packs or model.classifier is not None


def on_its_model(command: Command) -> Command:
    """The command with a training config's step in the form that it has on the model; what is typed stays."""

    @wraps(command)
    def run(**options: Any) -> Any:
        ctx = click.get_current_context()
        alone, from_config = ctx.meta.get(CONFIG), ParameterSource.DEFAULT_MAP
        found = given_launch.on_its_gpus(ctx, alone, options)
        given_launch.check_idle(ctx, options)
        if found is not None:
            ctx.meta[CONFIG] = found
            if alone is not None and found.method != alone.method:
                changed = {"method": found.method, "methods": (found.baseline, found.method)}
                options |= {n: m for n, m in changed.items() if ctx.get_parameter_source(n) is from_config}
        if found is not None and options["model"] and not is_traced(options):
            taken = []
            asked = {name: options[name] for name in OF_SEVERAL if name in options}
            for fallback in _fallbacks(replace(found, setup=found.setup | asked), options["model"]):
                for name in (fallback.option, "methods") if fallback.option == "method" else (fallback.option,):
                    if ctx.get_parameter_source(name) is from_config:
                        options[name] = (found.baseline, fallback.value) if name == "methods" else fallback.value
                        taken.append((fallback.option, fallback.said))
            ctx.meta[CONFIG] = found.replaced(taken)
        return command(**options)

    return run


def _fallbacks(found: Any, model: str) -> list[Any]:
    """None for a model that is not known: the command says so itself."""
    from ..architectures import from_config, load
    from ..imports.fallbacks import fallbacks

    try:
        return list(fallbacks(found, from_config(load(model))))
    except UserError:
        return []


def adapter_of_config() -> Path | None:
    """The adapter_config.json that --config names, or lies beside what it names: what a trace takes."""
    found = click.get_current_context().meta.get(CONFIG)
    return found.adapter if found is not None else None


def difference_from_config() -> str:
    """How the step differs from that of the training config that was given, if it does."""
    found = click.get_current_context().meta.get(CONFIG)
    return found.first_line if found is not None else ""


def answer_json(value: dict[str, Any]) -> None:
    """Print an answer as JSON, with how its step differs from a training config's."""
    from ..report.plain import print_json

    found = click.get_current_context().meta.get(CONFIG)
    print_json(value if found is None else {"differs_from_config": found.differences, **value})


config_option = click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="Take model, method and setup from a PEFT, TRL, Transformers, Axolotl or LLaMA-Factory file; "
    "what is typed beside it wins.",
)


def is_traced(options: dict[str, Any]) -> bool:
    """Whether the steps of a command come from a trace."""
    asked = options.get("traced") or options.get("peft_config") or options.get("images")
    return bool(asked or traces.traced_type(options["model"]))


def _of_config(name: str) -> bool:
    """Whether an option has its value from a training config."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.DEFAULT_MAP


def instead_of_config(said: list[tuple[str, str]]) -> None:
    """Note what is answered in the place of fields of the training config (`Imported.replaced`)."""
    ctx = click.get_current_context()
    ctx.meta[CONFIG] = ctx.meta[CONFIG].replaced(said)


def differ(said: list[str]) -> None:
    """Note how the step that is answered differs from the training config's."""
    ctx = click.get_current_context()
    found = ctx.meta[CONFIG]
    ctx.meta[CONFIG] = replace(found, differences=[*found.differences, *said])
