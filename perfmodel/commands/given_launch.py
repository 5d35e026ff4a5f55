"""Several GPUs: their options, and what a training config or `--accelerate` says of them; what is typed wins."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..program.dtypes import FLOATING
from ..setup import DDP, FSDP_UNITS, OFFLOAD, PARALLEL, ROTATE, ULYSSES

if TYPE_CHECKING:
    from ..imports import Imported

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]
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
    launch, gpus, several = ctx.meta.get(LAUNCH), options["gpus"], _several(options)
    before = dict(found.setup) if found is not None else {}

    def typed(name: str) -> bool:
        return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE

    if launch is not None and typed("gpus") and not typed("nodes"):
        options["nodes"] = None  # those of the file hold the file's GPUs
    in_place = {name: options[name] if typed(name) else None for name in ("parallel", "cp")}
    numbers = gpus if isinstance(gpus, tuple) else (gpus,)
    if launch is not None:
        sizes = {name: options[name] for name in ("batch", "grad_accum") if typed(name)}
        found = launch.of(found, several=several, gpus=numbers, typed=sizes, **in_place)
    elif found is not None and several:
        found = found.on_several(found.asks().as_typed(**in_place))
    else:
        return found
    if several:
        found = found.over(numbers)
    for name, value in found.setup.items():
        if value != before.get(name) and name in options and not typed(name):
            options[name] = (value,) if isinstance(options[name], tuple) else value  # on the axes of a grid
            ctx.set_parameter_source(name, ParameterSource.DEFAULT_MAP)  # a file's, like what it says of one GPU
    return found


def _several(options: dict[str, Any]) -> bool:
    gpus = options["gpus"]
    return bool((max(gpus) if isinstance(gpus, tuple) else gpus) > 1)


def _of_megatron(options: dict[str, Any]) -> bool:
    return str(options["model"]).startswith("megatron:")


def _exchanges(options: dict[str, Any]) -> bool:
    """Also with the host alone."""
    return _several(options) or options["offload"] != "none"


def _of_form(form: str) -> Callable[[dict[str, Any]], bool]:
    return lambda options: options["parallel"].startswith(form) and _several(options)


# Options that mean something beside others alone, what those are in words, and whether they are there
BESIDE: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "parallel": ("several --gpus, or --offload (ZeRO-3 of one GPU is --engine deepspeed-zero3)", _exchanges),
    "node": ("several --gpus, or --offload", _exchanges),
    "reshard": ("--parallel fsdp2 or fsdp1 of several --gpus", _several),
    "fsdp_units": ("--parallel fsdp2 of several --gpus", _several),
    "ddp": ("--parallel ddp of several --gpus", _of_form("ddp")),
    "reduce_dtype": ("--parallel fsdp2 or fsdp1 of several --gpus", _of_form("fsdp")),
    "shard_group": ("--parallel fsdp2 or fsdp1 of several --gpus", _of_form("fsdp")),
    "sync_each_batch": ("several --gpus", _several),
    "overlap": ("--model megatron:NAME on several --gpus", lambda options: _several(options) and _of_megatron(options)),
    "pp_schedule": ("--pp 2 or more", lambda options: options["pp"] > 1),
    "cp_rotate": ("--cp 2 or more", lambda options: options["cp"] > 1),
    "image_size": ("--images", lambda options: options["images"] > 0),
    "group_by_length": ("--lengths", lambda options: bool(options["lengths"])),
}


def check_idle(ctx: click.Context, options: dict[str, Any]) -> None:
    """Raise `UserError` where something is typed that means nothing beside the rest; advice tries other forms, too."""
    from ..errors import UserError

    if ctx.info_name == "advise" and _several(options):
        return
    for parameter in ctx.command.params:
        name = str(parameter.name)
        beside, means = BESIDE.get(name, ("", bool))
        typed = ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if beside and typed and options[name] != parameter.default and not means(options):
            no = "no-" if options[name] is False else ""
            raise UserError(f"--{no}{name.replace('_', '-')} means nothing without {beside}; leave it out")


accelerate_option = click.option(
    "--accelerate",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_launch,
    help="Take GPUs, nodes and what they do from accelerate's config file, or from DeepSpeed's; beside --config, whose "
    "own words win, or without.",
)


def of_several() -> tuple[Decorator, ...]:
    """Options of a training setup: what each of several GPUs has, what they share, where they stand."""
    return (
        click.option("--parallel", type=click.Choice(PARALLEL), default="ddp", show_default=True,
                     help="What several GPUs do: ddp, each has all; fsdp2 or fsdp1, a shard of all; zero1, zero2 or "
                     "zero3, DeepSpeed's parts of states, of gradients too, of weights too."),
        click.option("--ddp", type=click.Choice(DDP), default="plain", show_default=True,
                     help="What DDP knows of the graph. find-unused: it looks for parameters without a gradient in "
                     "every step (find_unused_parameters): the Trainer's default without checkpoints or with PEFT."),
        click.option("--reshard/--no-reshard", default=True, show_default=True,
                     help="Whether FSDP frees a block's weights behind its forward pass (FULL_SHARD, "
                     "reshard_after_forward) or leaves them gathered up to its backward (SHARD_GRAD_OP)."),
        click.option("--fsdp-units", type=click.Choice(FSDP_UNITS), default="accelerate", show_default=True,
                     help="What FSDP2 gathers at once. accelerate: blocks, embedding, last norm and head; blocks: "
                     "these, and all else; adapters: each half of a LoRA, too (Axolotl, LLaMA-Factory v1)."),
        click.option("--reduce-dtype", type=click.Choice(FLOATING),
                     help="FSDP reduces gradients in it; default: as is."),
        click.option("--sync-each-batch", is_flag=True, help="Gradients are exchanged for every micro-batch."),
        click.option("--overlap", is_flag=True,
                     help="Of megatron:NAME: gradients go beside backward, weights are gathered ahead of their use."),
        click.option("--shard-group", type=click.IntRange(2),
                     help="GPUs of a group of FSDP's shards, with replicas in the others (HYBRID_SHARD); default all."),
        click.option("--offload", type=click.Choice(OFFLOAD), default="none", show_default=True,
                     help="What lives in the host's memory. optimizer: masters, states and gradients of zero1 to zero3 "
                     "(on one GPU as well), updated by its cores; params: weights too, of zero3 or FSDP."),
        click.option("--tp", type=click.IntRange(1), default=1, show_default=True,
                     help="GPUs that share every layer (tensor parallel) and work on the same samples."),
        click.option("--sequence-parallel", is_flag=True,
                     help="They share the tokens between those layers, too; adapters are NeMo Automodel's."),
        click.option("--pp", type=click.IntRange(1), default=1, show_default=True,
                     help="GPUs with some blocks each (pipeline), of --grad-accum micro-batches; with ddp or fsdp2."),
        click.option("--pp-schedule", default="1f1b", show_default=True,
                     help="Their order: 1f1b, gpipe, or interleaved:v=2 (so many runs of blocks on each GPU)."),
        click.option("--cp", type=click.IntRange(1), default=1, show_default=True,
                     help="GPUs that share every sequence (context parallel, accelerate's cp_size; ulysses: sp_size)."),
        click.option("--cp-rotate", type=click.Choice((*ROTATE, ULYSSES)), default="allgather", show_default=True,
                     help="How keys and values get to all of them (cp_comm_strategy), with fsdp2; ulysses: they "
                     "share the heads within attention, with zero1 to zero3."),
        click.option("--nodes", type=click.IntRange(1), help="Nodes that they are on; default as few as hold them."),
        click.option("--node", help="What they stand in (see `perfmodel nodes`); default by the device."),
    )  # fmt: skip
