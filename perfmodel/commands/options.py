"""What several commands share: options, JSON."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..optimizers import is_optimizer, optimizer_names
from ..program.dtypes import FLOATING
from ..setup import (
    ATTENTION,
    CHECKPOINT,
    COMPILE,
    ENGINES,
    EXPERTS,
    FP8,
    INT8,
    KERNELS,
    OBJECTIVES,
    PACKING,
    REFERENCES,
)
from . import names, traces
from .given_config import adapter_of_config, config_option, instead_of_config, is_traced, on_its_model, settled
from .given_launch import Command, Decorator, accelerate_option, of_several
from .parted import PARTED

WHERE_LEFT_OUT = ("dtype", "amp", "attention")  # of a setup: then they go by the model and the GPU

methods_option = click.option(
    "--methods",
    shell_complete=names.methods,
    multiple=True,
    default=("full", "lora"),
    help="Methods, baseline first: full lora:r=16 ...  [default: full lora]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON (SI units, bytes).")

OPEN = f"{__name__}.open"  # the repeatable option that the last word of a command line belongs to
MOST_VALUES = 1_000_000  # of an axis of a grid: memory is to stay small whatever is typed


class Lists(click.Command):
    """A command whose repeatable options take several values in a row: `--methods full lora:r=16 top_k:k=8`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        lists = {name for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        out: list[str] = []
        current, values = "", 0
        for arg in [*args, "--"]:
            if arg.startswith("-"):
                if current and not values and not ctx.resilient_parsing:
                    raise click.UsageError(f"Option '{current}' requires one or more values.", ctx)
                if arg == "--" and ctx.resilient_parsing:
                    break  # a shell asks what may follow: the list is still open
                current, values = (arg if arg in lists else ""), 0
                if not current and arg != "--":
                    out.append(arg)
            elif current:
                values += 1
                out += [current, arg]
            else:
                out.append(arg)
        ctx.meta[OPEN] = current
        return super().parse_args(ctx, out)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> names.Items:
        """A further value of a list, or what any command offers."""
        found = [p for p in self.params if ctx.meta.get(OPEN) in p.opts]
        if found and not incomplete.startswith("-"):
            return found[0].shell_complete(ctx, incomplete)
        return super().shell_complete(ctx, incomplete)


class GridAxis(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """Values of a grid's axis: `4`, `1+2+4`, `128-8192:128` (from - to : step) or `1-64*2` (doubling)."""

    name = "values"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, int):  # from a training config
            return (value,)
        if not isinstance(value, str):
            return tuple(value)
        found: list[int] = []
        for item in value.split("+"):
            low, dash, rest = item.partition("-")
            geometric = "*" in rest
            high, _, step = rest.partition("*" if geometric else ":")
            try:
                first, last, by = int(low), int(high) if dash else int(low), int(step) if step else 1
            except ValueError:
                self.fail(f"{item!r} is not a number or a range such as 128-8192:128 or 1-64*2", param, ctx)
            if by < (2 if geometric else 1) or first < 1 or last < first:
                self.fail(f"the range {item!r} runs nowhere: write FROM-TO, FROM-TO:STEP or FROM-TO*FACTOR", param, ctx)
            if not geometric and (last - first) // by >= MOST_VALUES - len(found):
                self.fail(
                    f"{value!r} holds more than {MOST_VALUES:,} values: give a step, as in 1-64000:64", param, ctx
                )
            while first <= last:
                found.append(first)
                first = first * by if geometric else first + by
        return tuple(found)


class ImageSize(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """Height and width in pixels: `448x672`."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        sides = value if isinstance(value, tuple) else tuple(value.lower().split("x"))
        if len(sides) != 2 or not all(str(side).isdecimal() and 0 < int(side) <= 2**14 for side in sides):
            self.fail(f"{value!r} is no size in pixels, such as 448x672", param, ctx)
        return int(sides[0]), int(sides[1])


class OptimizerName(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """One of the optimizers, as `click.Choice`; the files of all of them are loaded only to list them."""

    name = "optimizer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_optimizer(value) else click.Choice(optimizer_names()).convert(value, param, ctx)

    def get_metavar(self, *words: Any, **more: Any) -> str | None:
        return click.Choice(optimizer_names()).get_metavar(*words, **more)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> names.Items:
        return click.Choice(optimizer_names()).shell_complete(ctx, param, incomplete)


class Finite(click.FloatRange):
    """A number within bounds; neither nan, which no bound keeps out, nor infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return found


def _where(*, grid: bool, all_devices: bool = False) -> tuple[Decorator, ...]:
    """Model, device, host and the size of a batch; on a grid several devices, and axes for the sizes.

    Args:
        all_devices: whether several devices are taken, and none for all that there are; the command then says itself
            whether it needs a model.
    """
    size = GridAxis() if grid else int
    return (
        config_option,
        accelerate_option,
        click.option(
            "--model",
            required=not all_devices,
            shell_complete=names.models,
            help="Bundled name (see `perfmodel models`), path of a config.json or folder, or hub id. megatron: before "
            "any of them: its program in Megatron-Core.",
        ),
        click.option(
            "--device",
            required=not all_devices,
            multiple=grid or all_devices,
            shell_complete=names.devices,
            help="Device (see `perfmodel devices`) or path of a TOML."
            + " Default: every GPU of the catalogue." * all_devices,
        ),
        *_sizes(size),
        click.option(
            "--gpus",
            type=GridAxis() if all_devices else size,
            default="1",
            show_default=True,
            help="GPUs of the job (on a CPU: processes), all nodes together; each works on --batch samples."
            + " A range (1-8*2) tries each number." * all_devices,
        ),
    )


def _sizes(size: Any) -> tuple[Decorator, ...]:
    """Host and the sizes of a batch, of a click type."""
    return (
        click.option(
            "--host",
            default="default",
            show_default=True,
            shell_complete=names.hosts,
            help="What dispatches: name of a host or path of a TOML; default is what goes with the device.",
        ),
        click.option("--batch", type=size, default="1", show_default=True, help="Samples of a micro-batch."),
        click.option("--seq", type=size, default="512", show_default=True, help="Tokens per sequence."),
    )


def _precision() -> tuple[Decorator, ...]:
    """What weights and products are in."""
    return (
        click.option("--dtype", type=click.Choice(FLOATING), default="bf16", show_default=True,
                     help="Base weights; where none is given, fp16 on a GPU without units for bf16."),
        click.option("--amp", type=click.Choice(("bf16", "fp16")), help="torch.autocast over fp32 weights."),
    )  # fmt: skip


def _usual() -> tuple[Decorator, ...]:
    """What of a setup any precision takes."""
    return (
        click.option("--optimizer", type=OptimizerName(), default="adamw", show_default=True,
                     help="adamw is PyTorch's default, which is foreach on a GPU."),
        click.option("--grad-accum", type=int, default=1, show_default=True, help="Micro-batches per step."),
        click.option("--checkpoint", type=click.Choice(CHECKPOINT), default="none", show_default=True,
                     help="Activation checkpointing per block."),
        click.option("--attention", type=click.Choice(ATTENTION), default="sdpa", show_default=True,
                     help="sdpa: PyTorch's fused kernels; flash2: the flash-attn package. Where none is given, eager "
                     "of a model whose program lacks sdpa."),
    )  # fmt: skip


def _rest() -> tuple[Decorator, ...]:
    """The rest of the training setup."""
    return (
        click.option("--kernels", type=click.Choice(KERNELS), default="torch", show_default=True,
                     help="liger: fused norms, rotary positions, SwiGLU and linear cross entropy; cce: cut cross "
                     "entropy, head and loss in one kernel without logits; trl: TRL's fused head, as SFTTrainer "
                     "runs by default; liger+cce, liger+trl: these instead of Liger's loss."),
        click.option("--compile", type=click.Choice(COMPILE), default="none", show_default=True,
                     help="torch.compile of the model; reduce-overhead adds CUDA graphs."),
        click.option("--fp8", type=click.Choice(FP8), default="none", show_default=True,
                     help="Linear layers in 8-bit floats, as accelerate and torchao train them; padded: "
                     "accelerate's own recipe, tensorwise with dims that are summed over padded to multiples of 16."),
        click.option("--int8", type=click.Choice(INT8), default="none", show_default=True,
                     help="mixed: products of linear layers in 8-bit integers, weights as they are, by torchao."),
        click.option("--qat", default="none", show_default=True,
                     help="torchao's fake quantisation of linear layers: int8-int4:32 rounds inputs to 8 bits and "
                     "weights to 4, in groups of 32; with --method full."),
        click.option("--routing", default="balanced", show_default=True,
                     help="Load of a mixture's experts: balanced, or zipf:1.1 (a share falls with its rank)."),
        click.option("--experts", type=click.Choice(EXPERTS), default="grouped_mm", show_default=True,
                     help="How a mixture runs its experts (experts_implementation of transformers): grouped products, "
                     "or eager, a loop over those that are hit."),
        click.option("--objective", type=click.Choice(OBJECTIVES), default="sft", show_default=True,
                     help="What is trained for. Of dpo, orpo, cpo, simpo and reward a sample is a pair of sequences."),
        click.option("--prompt", type=int,
                     help="Tokens of a sequence that are its prompt, where the rest was generated (grpo, ppo, ebft); "
                     "default half."),
        click.option("--reference", type=click.Choice(REFERENCES), default="auto", show_default=True,
                     help="What dpo, kto, grpo, ppo, asft and ebft compare with: auto is the model without its "
                     "adapters, where it has some, else a second, frozen model; for grpo nothing."),
        click.option("--stack", default="current", show_default=True,
                     help="Versions of torch, cuda, transformers and peft, such as torch=2.6,cuda=12.4,peft=0.11: they "
                     "decide which attention kernel sdpa gets, the adapters' dtype, how casts to 16 bit run, what one "
                     "kernel of an optimizer over lists takes."),
        *of_several(),
        click.option("--engine", type=click.Choice(ENGINES), default="torch", show_default=True,
                     help="What runs the step; `METHOD:engine=NAME` for one method alone."),
        click.option("--clip-grad/--no-clip-grad", default=True, show_default=True, help="Clip the gradient norm."),
        click.option("--in-backward", is_flag=True, help="Weights are updated inside backward; with --no-clip-grad."),
        click.option("--cuda-graphs", is_flag=True, help="One launch dispatches the whole step."),
        click.option("--padded", is_flag=True, help="Some samples are padded: sdpa gets an explicit mask."),
        click.option("--packing", type=click.Choice(PACKING), default="none", show_default=True,
                     help="Documents in a row of --seq tokens. dense: under one causal mask; varlen: attention within "
                     "each (flash2 finds them by position ids, sdpa and eager take a mask of all the row); flat: the "
                     "samples of a micro-batch in one row, without padding."),
        click.option("--lengths",
                     help="How long documents are, cut to --seq: MEAN:P95 in tokens (log-normal, such as 400:1200), or "
                     "a file: a length a line, JSON lines, or a CSV with a column `length`. Without packing a "
                     "micro-batch is padded to its longest, and the answer is the mean over micro-batches. That the "
                     "loss may count completions only changes labels, neither time nor memory."),
        click.option("--group-by-length/--no-group-by-length", default=False, show_default=True,
                     help="Samples of similar length share a micro-batch."),
        click.option("--images", type=click.IntRange(0, 1000), default=0, show_default=True,
                     help="Images of a sample, for models of images and text; traced."),
        click.option("--image-size", type=ImageSize(), default="448x448", show_default=True,
                     help="Height and width of an image, pixels."),
        click.option("--traced", is_flag=True,
                     help="Take the steps from the real transformers + peft program: any model, any tuner. A first "
                     "trace needs the validate extra; it is kept for the next question."),
        click.option("--peft-config", type=click.Path(path_type=Path),
                     help="An adapter_config.json in the place of a method (the last of several); implies --traced."),
        json_option,
    )  # fmt: skip


def setup_options(command: Command) -> Command:
    """The options that describe model, device and training setup."""
    return _decorated(command, _where(grid=False))


def grid_options(command: Command) -> Command:
    """The same for a grid: several devices, and values or ranges of batch and sequence."""
    return _decorated(command, (*_where(grid=True), *PARTED))


def plan_options(command: Command) -> Command:
    """The same for a job: several devices, or all."""
    return _decorated(command, (*_where(grid=False, all_devices=True), *PARTED))


def estimate_options(command: Command) -> Command:
    """The model as an argument, a device by default, and what any precision takes."""
    model = click.argument("model", shell_complete=names.models)
    device = click.option(
        "--device", default="l40s", show_default=True, shell_complete=names.devices,
        help="Device (see `perfmodel devices`) or path of a TOML.",
    )  # fmt: skip
    return _under(command, model, device, *_sizes(int), *_usual(), json_option)


def _decorated(command: Command, where: tuple[Decorator, ...]) -> Command:
    return _under(on_its_model(command), *where, *_precision(), *_usual(), *_rest())


def _under(command: Command, *decorators: Decorator) -> Command:
    for decorate in reversed(decorators):
        command = decorate(command)
    return command


def setup_of(options: dict[str, Any], devices: Sequence[str] | None = None) -> Any:
    """The `Setup` of a command's options; of a training config's, as a trace can follow it where only that answers.

    Args:
        devices: those that are asked for, where they are not the options' one.
    """
    from dataclasses import fields

    from ..devices.device import profile_of
    from ..prediction.given import setup_given
    from ..prediction.predict import architecture_of
    from ..setup import Setup

    options = settled(options)
    given = {f.name: options[f.name] for f in fields(Setup) if f.name in options}
    source = click.get_current_context().get_parameter_source
    for name in WHERE_LEFT_OUT:
        if source(name) is ParameterSource.DEFAULT:
            given.pop(name, None)
    by_tape = options["model"] is not None and not is_traced(options)
    architecture = architecture_of(options["model"]) if by_tape else None
    return setup_given(
        None, given, architecture, [profile_of(d) for d in ([options["device"]] if devices is None else devices)]
    )


def setup_of_counts(options: dict[str, Any], counts: Sequence[int], devices: Sequence[str] = ()) -> Any:
    """The same of the first number of GPUs that can have it, of several."""
    from ..questions.counts import possible

    setups, _ = possible(lambda count: setup_of({**options, "gpus": int(count)}, devices), counts)
    return next(iter(setups.values()))


def model_of(options: dict[str, Any]) -> Any:
    """The model of a command's options: by its name, or traced, where that is asked for or nothing else can answer."""
    if not is_traced(options):
        return options["model"]
    from ..tracing.recorded import traced

    return traced(options["model"])


def methods_of(methods: Sequence[str], options: dict[str, Any], name: str = "methods", least: int = 1) -> list[Any]:
    """The methods of a command's options, that of `--peft-config` after what was typed, or as the last default.

    Args:
        name: of the command's option.
        least: methods that stay where none was typed.
    """
    source = click.get_current_context().get_parameter_source(name)
    if source is ParameterSource.DEFAULT_MAP and is_traced(options):
        plain = [traces.of_peft_alone(method, options["model"]) for method in methods]
        methods = [method for method, _ in plain]
        instead_of_config([("method", words) for words in dict.fromkeys(words for _, said in plain for words in said)])
    path = options["peft_config"]
    if not path and options["traced"] and source is not click.core.ParameterSource.COMMANDLINE:
        path = adapter_of_config()
    if not path:
        return list(methods)
    from ..methods.parts.peft_adapter import PeftAdapter

    typed = source is not click.core.ParameterSource.DEFAULT
    return [*(methods if typed else methods[:least]), PeftAdapter.read(path)]


def axes_of(axes: str | None, model: Any, default: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of `--axes`; by default those of a traced model along which nothing has to be traced."""
    if axes is None:
        return default if isinstance(model, str) else tuple(axis for axis in default if axis in ("batch", "seq"))
    return () if axes == "none" else tuple(axes.split("+"))
