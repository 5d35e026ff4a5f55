"""`perfmodel validate ...`: its commands need the validate extra, `published` excepted."""

import sys
from pathlib import Path

import click

from ..errors import UserError
from ..program.installed import hush, needed
from ..report.plain import print_json
from .campaign import campaign, paper
from .options import json_option
from .parted import dask_option, workers_option

RECORDS = Path("records.jsonl")  # what `measure` writes and `check` reads unless told otherwise


@click.group()
def validate() -> None:
    """Check the model against real programs and measurements."""
    hush()


validate.add_command(campaign)
validate.add_command(paper)


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
@click.option(
    "--parallel",
    is_flag=True,
    help="Compare ranks of programs of several GPUs: also collectives in their order, and memory.",
)
@json_option
def counts(grid: str, cuda_forward: bool, parallel: bool, as_json: bool) -> None:
    """Compare the tape with real programs, ATen call by ATen call."""
    with needed():
        from validate.oracle.counts import has_cuda_build
        from validate.oracle.show_counts import show_counts
    if cuda_forward and not has_cuda_build():
        raise UserError("--cuda-forward needs a CUDA build of torch (no GPU is needed): this one is built for the CPU")
    failed = show_counts(grid, cuda_forward=cuda_forward, several=parallel, as_json=as_json)
    sys.exit(1 if failed else 0)


@validate.command()
@json_option
def speed(as_json: bool) -> None:
    """Measure the speed promises: cold, warm, grids, traced programs.

    Those of traced programs need the validate extra. The exit code is 1 if one is missed.
    """
    from validate.speed import measure_promises

    from ..report.plain import show, table

    columns, rows = ("what", "measured", "limit", "holds"), measure_promises()
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        show(table((*columns[:3], ""), ((*r[:3], "ok" if r[3] else "missed") for r in rows), left=(0, 3)))
    sys.exit(0 if all(r[3] for r in rows) else 1)


@validate.command()
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw predicted against measured (PNG).")
@click.option("--rows", "all_rows", is_flag=True, help="Print every row, not only those that miss by more than 25 %.")
@json_option
def published(plot: Path | None, all_rows: bool, as_json: bool) -> None:
    """Compare with training steps that others published."""
    from validate.published.show_steps import show_published

    show_published(plot=plot, all_rows=all_rows, as_json=as_json)


@validate.command()
@click.option("--quick", is_flag=True, help="A fixed part of the model types, in a few minutes.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Table (CSV) of the rows; a table that is there is continued.",
)
@workers_option
@dask_option
@json_option
def coverage(quick: bool, output: Path | None, workers: int, dask: str | None, as_json: bool) -> None:
    """Trace every model type of transformers and every tuner of PEFT.

    Lists those that `predict --traced` can take and why it cannot take the others. A type is built from transformers'
    own default config; the tuners are put on a small Llama.
    """
    with needed():
        from validate.oracle.show_coverage import show_coverage

        from ..partitions import Workers
    enough = show_coverage(quick=quick, output=output, workers=Workers(workers, dask), as_json=as_json)
    sys.exit(0 if enough else 1)


@validate.command()
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--device", default="h100-sxm", show_default=True, help="What every step is asked for.")
@click.option("--gpus", type=click.IntRange(1), help="Several GPUs, in the form that each file asks for.")
@click.option("--model", help="A known model, typed beside each file whose own is unknown here.")
@click.option("--traced", is_flag=True, help="Trace what has no built-in form (needs the validate extra; minutes).")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Table (CSV) of the rows.")
@json_option
def configs(
    folders: tuple[Path, ...], device: str, gpus: int | None, model: str | None, traced: bool, output: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Give all training configs below FOLDERs to predict --config.

    Of checkouts of Axolotl, LLaMA-Factory, PEFT, TRL and the alignment-handbook: how many are answered, and why others
    are not. The exit code is 1 if one ends in a traceback.
    """
    from validate.oracle.show_configs import show_configs

    asked = ("--device", device, *(("--gpus", str(gpus)) if gpus else ()))
    ok = show_configs(folders, asked, model=model, traced=traced, output=output, as_json=as_json)
    sys.exit(0 if ok else 1)


@validate.command()
@click.option("--images", is_flag=True, help="The benchmark of an image model (needs the diffusion extra).")
@click.option("--host", default="default", show_default=True, help="Host that dispatches, by name or path.")
@click.option("--all-rows", is_flag=True, help="List every row, not only the worst.")
@click.option("--fit-host", is_flag=True, help="Only tell how slow their host was (fitted).")
@json_option
def tuners(images: bool, host: str, all_rows: bool, fit_host: bool, as_json: bool) -> None:
    """Compare with PEFT's own benchmarks of its tuners.

    Llama-3.2-3B on an L40S, or FLUX.2-klein-4B (--images); every configuration is traced, which takes minutes.
    """
    with needed():
        from validate.published.show_tuners import show_host_speed, show_tuners
    if fit_host:
        if host != "default" or all_rows:
            raise UserError("--fit-host goes without --host and --all-rows")
        show_host_speed(images=images, as_json=as_json)
        return
    sys.exit(0 if show_tuners(images=images, host=host, all_rows=all_rows, as_json=as_json) else 1)


@validate.command()
@json_option
def layers(as_json: bool) -> None:
    """Compare with LoRAFusion's layer times and DRAM traffic (H100)."""
    from validate.published.show_layers import show_layers

    sys.exit(0 if show_layers(as_json=as_json) else 1)


@validate.command()
@json_option
def power(as_json: bool) -> None:
    """Compare power with what MLPerf's power submissions measured (H100 nodes)."""
    from validate.published.show_power import show_power

    sys.exit(0 if show_power(as_json=as_json) else 1)


@validate.command()
@click.option(
    "--kernels",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Fit device profiles to a folder of published kernel measurements.",
)
@click.option(
    "--records",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Fit host costs to the steps of a file of `validate measure`.",
)
@click.option(
    "--collectives",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Fit nodes to a table of published times of collectives (Parquet).",
)
@click.option(
    "--leave-one-device-out", is_flag=True, help="Only report how well datasheets and other devices predict one."
)
@click.option(
    "--part",
    type=click.Choice(("grouped", "residual", "early")),
    help="With --kernels, in a minute: products by expert alone, the learned factor of 16-bit products, or what "
    "cuBLAS's older kernels for Hopper have.",
)
@click.option("--device", help="With --records: price kernels with this profile.")
@click.option("--host", help="With --records: the host to start from.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("host.toml"),
    show_default=True,
    help="With --records: the host file.",
)
@click.option("--dry-run", is_flag=True, help="Fit and report, but write no file.")
@workers_option
@dask_option
@json_option
def fit(
    kernels: Path | None, records: Path | None, collectives: Path | None, leave_one_device_out: bool,
    part: str | None, device: str | None, host: str | None, output: Path, dry_run: bool, workers: int, dask: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Fit device profiles to kernels, nodes to collectives, or host costs to steps.

    With --kernels the fits of products are shared out among --workers, or those of a cluster that read the same folder.

    Errors are on what was left out of the fit. Host costs whose errors exceed 50 % are not written; the exit code is 1.
    """
    if sum(given is not None for given in (kernels, records, collectives)) != 1:
        kinds = "--kernels FOLDER (device profiles), --collectives FILE (nodes) or --records FILE (host costs)"
        raise UserError(f"fit needs either {kinds}")
    with needed(traces=records is not None):
        if collectives is not None:
            from validate.fitting.collectives.show import show_links
        elif records is None:
            from validate.fitting.show import show_fit

            from ..partitions import Workers
        else:
            from validate.calibration.show_refit import show_refit
    if collectives is not None:
        show_links(collectives, write=not dry_run, as_json=as_json)
    elif records is None:
        how = {"leave_one_device_out": leave_one_device_out, "write": not dry_run, "as_json": as_json}
        show_fit(kernels, part=part or "", workers=Workers(workers, dask), **how)
    elif not show_refit(records, device=device, host=host, output=None if dry_run else output, as_json=as_json):
        sys.exit(1)


@validate.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), default=Path("host.toml"), show_default=True)
def host(output: Path) -> None:
    """Measure this machine's host costs into a file for --host.

    At the end they predict the programs that were timed, a fifth of which the fit did not see: if they are off by more
    than 50 % nothing is written, and the exit code is 1.
    """
    with needed():
        from validate.calibration.show_host import show_host
    sys.exit(0 if show_host(output) else 1)


@validate.command()
@click.argument("name", type=click.Choice(("deepspeed-zero3", "fsdp2", "fsdp1")), default="deepspeed-zero3")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="The engine's file [default: NAME.toml]."
)
def engine(name: str, output: Path | None) -> None:
    """Measure what the hooks of DeepSpeed (which has to be installed) or FSDP cost the host.

    The bundled figures are in data/engines/.
    """
    with needed():
        from validate.calibration.show_engine import show_engine
    show_engine(name, output or Path(f"{name}.toml"))


@validate.command()
@click.option("--device", type=click.Choice(("cuda", "cpu")), required=True, help="What to train on.")
@click.option("--grid", default="small", show_default=True, help="small, standard, or the path of a TOML file.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=RECORDS,
    show_default=True,
    help="File of records; a file that is there is continued.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: PyTorch's choice].")
@click.option("--rounds", type=click.IntRange(1), help="Visits of each cell [default: the grid's].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the cells.")
@click.option(
    "--parallel",
    type=click.Choice(("ddp", "fsdp2")),
    help="Several processes share a step: torchrun --nproc-per-node N -m perfmodel validate measure ...",
)
def measure(
    device: str, grid: str, output: Path, threads: int | None, rounds: int | None, seed: int, parallel: str | None
) -> None:
    """Run real training steps and record what they took.

    Times, calls, kernels and memory, cell by cell; a stopped run resumes where it was.
    """
    with needed():
        from validate.measuring.show import show_measure
    failed = show_measure(device, grid, output, threads=threads, rounds=rounds, seed=seed, parallel=parallel)
    sys.exit(1 if failed else 0)


@validate.command()
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--phase", "phases", multiple=True, help="An annotation that marks a phase [default: the outermost].")
@click.option(
    "--top", type=click.IntRange(1), default=15, show_default=True, help="How many calls and kernels to list."
)
@json_option
def profile(path: Path, phases: tuple[str, ...], top: int, as_json: bool) -> None:
    """Read a FILE that a profiler of PyTorch wrote.

    Of a Chrome trace (torch.profiler, .json or .json.gz): kernels by phase, ATen call and name, how long the device is
    busy, launches, copies. Of an execution trace: the operators called. Of a table of key_averages (CSV with columns
    name, calls, self_cpu_us, cpu_total_us, self_cuda_us, cuda_total_us): its rows.
    """
    with needed(traces=False):
        from validate.measuring.show_profile import show_profile
    show_profile(path, phases, top, as_json=as_json)


@validate.command()
@click.argument("paths", metavar="[RECORDS]...", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--device", help="Predict with this profile [default: this machine's, as the records name it].")
@click.option("--host", help="Predict with this host [default: the one calibrated with the device, else the default].")
@click.option("--node", help="What several processes stand in [default: on a CPU this machine's, else by the device].")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write a page with plots and tables.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw predicted against measured (PNG).")
@json_option
def check(
    paths: tuple[Path, ...], device: str | None, host: str | None, node: str | None, html: Path | None,
    plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Compare with RECORDS of `validate measure`.

    They are records.jsonl by default. The exit code is 1 if a limit is exceeded: ATen calls and kernels exact, step
    time 15 % in the mean and 10 % in the median, ratio to full fine-tuning 8 %, verdicts right where 10 % decide them,
    peak memory 5 % in every cell. Of steps that several processes shared also the collectives and their bytes: exact.
    """
    from validate.checking.show import show_check

    if not paths and not RECORDS.exists():
        raise UserError(f"no {RECORDS} here: make it with `perfmodel validate measure`, or name other records")
    chosen = paths or (RECORDS,)
    holds = show_check(chosen, device=device, host=host, node=node, html=html, plot=plot, as_json=as_json)
    sys.exit(0 if holds else 1)
