"""The command line. Heavy imports happen inside the commands that need them."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from .errors import UserError
from .setup import ATTENTION, CHECKPOINT, DTYPES, OPTIMIZERS

Formats = dict[str, Callable[[Any], str]]


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


class Main(click.Group):
    """Turns a user's mistake into one line and exit code 2."""

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, prog_name, standalone_mode=False, **extra)
        try:
            result = super().main(args, prog_name, standalone_mode=False, **extra)
        except (UserError, click.ClickException) as error:
            message = error.format_message() if isinstance(error, click.ClickException) else str(error)
            click.echo(f"perfmodel: {' '.join(message.split())}", err=True)
            sys.exit(2)
        except click.Abort:
            sys.exit(130)
        sys.exit(result if isinstance(result, int) else 0)


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="perfmodel")
def main() -> None:
    """Will LoRA make my training step faster, by how much, why, and what should I run instead?"""


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
            click.option("--clip-grad/--no-clip-grad", default=True, show_default=True, help="Clip the gradient norm."),
            click.option("--cuda-graphs", is_flag=True, help="One launch dispatches the whole step."),
            click.option("--padded", is_flag=True, help="Some samples are padded: sdpa gets an explicit mask."),
            json_option,
        )
    ):  # fmt: skip
        command = decorate(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON (SI units, bytes).")


def _setup(options: dict[str, Any]) -> Any:
    from dataclasses import fields

    from .setup import Setup

    return Setup(**{f.name: options[f.name] for f in fields(Setup)})


@main.command()
@click.option("--method", default="full", show_default=True, help="name[:key=value,...]; lists are joined by +.")
@click.option("--traced", is_flag=True, help="Trace the real transformers + peft program (needs the validate extra).")
@click.option("--peft-config", type=click.Path(path_type=Path), help="An adapter_config.json; implies --traced.")
@setup_options
def predict(method: str, traced: bool, peft_config: Path | None, as_json: bool, **options: Any) -> None:
    """Predict one training step: FLOPs, traffic, kernels, time by phase, peak memory."""
    setup = _setup(options)
    given = click.get_current_context().get_parameter_source("method")
    if peft_config and given is not click.core.ParameterSource.DEFAULT:
        raise UserError("give --method or --peft-config, not both")
    if traced or peft_config:
        try:
            from validate.traced import predict as trace
        except ImportError as error:
            raise _extra(error) from None
        host = options["host"]
        result = trace(options["model"], setup, options["device"], method=method, peft_config=peft_config, host=host)
    else:
        from .predict import predict as run

        result = run(options["model"], method, setup, options["device"], host=options["host"])
    if as_json:
        _print_json(result.as_dict())
        return
    from .report.terminal import show_prediction

    show_prediction(result)


@main.command(cls=Lists)
@click.option("--methods", multiple=True, default=("full", "lora"), help="Methods, baseline first: full lora:r=16 ...")
@setup_options
def compare(methods: Sequence[str], as_json: bool, **options: Any) -> None:
    """Compare methods in one setup; the first is the baseline."""
    from .compare import compare as run

    result = run(options["model"], methods, _setup(options), options["device"], host=options["host"])
    if as_json:
        _print_json(result.as_dict())
        return
    from .report.terminal import show_comparison

    show_comparison(result)


@main.command()
@json_option
def models(as_json: bool) -> None:
    """List the bundled models."""
    from . import listing
    from .report import units

    columns = ("model", "model_type", "layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "tied")
    formats: Formats = {"tied": lambda v: "yes" if v else "no", "vocab": units.count}
    _list(listing.models(), columns, as_json, formats, left=2)


@main.command()
@json_option
def methods(as_json: bool) -> None:
    """List the fine-tuning methods and their options."""
    from . import listing

    rows = listing.methods()
    if as_json:
        _print_json(rows)
        return
    from .report.terminal import console

    for row in rows:
        console.print(f"[bold]{row['method']}[/]  {row['what']}  [dim]{row['source']}[/]")
        for name, help_text in row["options"].items():
            console.print(f"    {name:20} {help_text}")


@main.command()
@json_option
def devices(as_json: bool) -> None:
    """List the devices with their datasheet figures and what was measured on them."""
    from . import listing
    from .report import units

    formats: Formats = {
        "memory_bytes": lambda v: f"{v / 2**30:.0f} GiB", "memory_bandwidth": lambda v: units.count(v, "B/s"),
        "bf16_flops": units.count, "fp32_flops": units.count,
        "measured": lambda v: ", ".join(b for b, origin in v.items() if origin != "class") or "class defaults",
    }  # fmt: skip
    columns = ("device", "memory_bytes", "memory_bandwidth", "bf16_flops", "fp32_flops", "measured")
    _list(listing.devices(), columns, as_json, formats, left=1)


def _list(
    rows: list[dict[str, Any]],
    columns: Sequence[str],
    as_json: bool,
    formats: Formats,
    *,
    left: int,
) -> None:
    if as_json:
        _print_json(rows)
        return
    from .report.terminal import console, table

    cells = ([formats.get(c, str)(row[c]) for c in columns] for row in rows)
    console.print(table("", [c.replace("_", " ") for c in columns], cells, left=left))


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


def _extra(error: ImportError) -> UserError:
    return UserError(
        f"this command needs the validate extra ({error.name} is missing): pip install 'perfmodel[validate]'"
    )


@main.group()
def validate() -> None:
    """Check the model against real PyTorch programs and real measurements."""


@validate.command()
@click.option(
    "--grid",
    type=click.Choice(("quick", "standard", "all")),
    default="quick",
    show_default=True,
    help="quick: a part of every combination; standard: real dims too; all: every combination.",
)
@click.option(
    "--cuda-forward",
    is_flag=True,
    help="Compare the CUDA form of the forward instead (needs a CUDA build of torch, no GPU).",
)
@json_option
def counts(grid: str, cuda_forward: bool, as_json: bool) -> None:
    """Compare the tape with the real transformers + peft program, ATen call by ATen call."""
    try:
        from validate import counts as module
        from validate.show import show_counts
    except ImportError as error:
        raise _extra(error) from None
    if cuda_forward and not module.has_cuda_build():
        raise UserError("--cuda-forward needs a CUDA build of torch (no GPU is needed): this one is built for the CPU")
    failed = show_counts(module, grid, cuda_forward=cuda_forward, as_json=as_json)
    sys.exit(1 if failed else 0)


@validate.command()
def speed() -> None:
    """Measure the speed promises: cold start, warm prediction, grids."""
    from validate.speed import measure

    from .report.terminal import console, table

    rows = measure()
    console.print(table("", ("what", "measured", "limit", ""), ((*r[:3], "ok" if r[3] else "missed") for r in rows)))
    sys.exit(0 if all(r[3] for r in rows) else 1)


@validate.command()
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw predicted against measured (PNG).")
@click.option("--rows", "all_rows", is_flag=True, help="Print every row, not only those that miss by more than 25 %.")
@json_option
def published(plot: Path | None, all_rows: bool, as_json: bool) -> None:
    """Compare predictions with training steps that others measured and published."""
    from validate.show import show_published

    show_published(plot=plot, all_rows=all_rows, as_json=as_json)


@validate.command()
@click.option(
    "--kernels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    help="Folder of published kernel measurements.",
)
@click.option(
    "--leave-one-device-out", is_flag=True, help="Only report how well datasheets and other devices predict one."
)
@click.option("--dry-run", is_flag=True, help="Fit and report, but write no device file.")
@json_option
def fit(kernels: Path, leave_one_device_out: bool, dry_run: bool, as_json: bool) -> None:
    """Fit the device profiles to kernel measurements; errors are on rows left out of the fit."""
    try:
        from validate.show import show_fit
    except ImportError as error:
        raise _extra(error) from None
    show_fit(kernels, leave_one_device_out=leave_one_device_out, write=not dry_run, as_json=as_json)


@validate.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("host.toml"), show_default=True)
def host(output: Path) -> None:
    """Measure this machine's host costs and write a host file for --host."""
    try:
        from validate.show import show_host
    except ImportError as error:
        raise _extra(error) from None
    show_host(output)


if __name__ == "__main__":
    main()
