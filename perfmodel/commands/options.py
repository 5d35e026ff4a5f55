"""What several commands share: options, JSON, the missing extra."""

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from ..errors import UserError
from ..setup import ATTENTION, CHECKPOINT, DTYPES, KERNELS, OPTIMIZERS

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON (SI units, bytes).")


class Lists(click.Command):
    """A command whose `--methods` takes several values in a row: `--methods full lora:r=16 top_k:k=8`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        out: list[str] = []
        values: int | None = None
        for arg in [*args, "--"]:
            if arg.startswith("-"):
                if values == 0:
                    raise click.UsageError("Option '--methods' requires one or more values.", ctx)
                values = 0 if arg == "--methods" else None
                if values is None and arg != "--":
                    out.append(arg)
            elif values is None:
                out.append(arg)
            else:
                values += 1
                out += ["--methods", arg]
        return super().parse_args(ctx, out)


def setup_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe model, device and training setup."""
    for decorate in reversed(
        (
            click.option("--model", required=True, help="Bundled name, path of a config.json or folder, or hub id."),
            click.option("--device", required=True, help="Device name (see `perfmodel devices`) or path of a TOML."),
            click.option("--host", default="default", show_default=True, help="Host name or path of a TOML."),
            click.option("--batch", type=int, default=1, show_default=True, help="Samples of a micro-batch."),
            click.option("--seq", type=int, default=512, show_default=True, help="Tokens per sample."),
            click.option("--dtype", type=click.Choice(DTYPES), default="bf16", show_default=True, help="Base weights."),
            click.option("--amp", type=click.Choice(("bf16", "fp16")), help="torch.autocast over fp32 weights."),
            click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", show_default=True),
            click.option("--grad-accum", type=int, default=1, show_default=True, help="Micro-batches per step."),
            click.option("--checkpoint", type=click.Choice(CHECKPOINT), default="none", show_default=True,
                         help="Activation checkpointing per block."),
            click.option("--attention", type=click.Choice(ATTENTION), default="sdpa", show_default=True),
            click.option("--kernels", type=click.Choice(KERNELS), default="torch", show_default=True,
                         help="liger: fused norms, rotary positions, SwiGLU and linear cross entropy."),
            click.option("--clip-grad/--no-clip-grad", default=True, show_default=True, help="Clip the gradient norm."),
            click.option("--cuda-graphs", is_flag=True, help="One launch dispatches the whole step."),
            click.option("--padded", is_flag=True, help="Some samples are padded: sdpa gets an explicit mask."),
            json_option,
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


def setup_of(options: dict[str, Any]) -> Any:
    """The `Setup` of a command's options."""
    from dataclasses import fields

    from ..setup import Setup

    return Setup(**{f.name: options[f.name] for f in fields(Setup)})


def print_json(value: Any) -> None:
    """Write a value to standard output."""
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


def extra(error: ImportError) -> UserError:
    """The one line for a package that is not installed."""
    return UserError(
        f"this command needs the validate extra ({error.name} is missing): pip install 'perfmodel[validate]'"
    )
