"""`perfmodel calibrate`: needs the validate extra."""

import sys
from pathlib import Path

import click

from ..devices.own import CALIBRATED
from ..program.installed import hush, needed
from .options import Finite, json_option

QUICK = 20.0  # s


@click.command()
@click.option("--device", type=click.Choice(("cuda", "cpu")), required=True, help="What to calibrate.")
@click.option("--name", default=CALIBRATED, show_default=True, help="Of the files: `--device NAME` from then on.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads, as training will have [default: PyTorch's].")
@click.option("--seconds", type=Finite(5), default=150.0, show_default=True, help="Time to take, roughly.")
@click.option("--quick", is_flag=True, help=f"Take {QUICK:.0f} seconds: a rough profile.")
@click.option(
    "--records", type=click.Path(dir_okay=False, path_type=Path), help="Keep the microbenchmarks (JSON lines)."
)
@click.option(
    "--network",
    is_flag=True,
    help="The links between GPUs instead, into a node's file: under torchrun, in each process.",
)
@json_option
def calibrate(
    device: str, name: str, threads: int | None, seconds: float, quick: bool, records: Path | None, network: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure this machine's kernels and host: --device NAME.

    The files go to $PERFMODEL_HOME, or else to the user's folder for configuration (~/.config/perfmodel). A CPU's
    profile holds for training with as many threads, and for a malloc that keeps freed memory (jemalloc, tcmalloc, or
    glibc's with MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_MAX_=0).

    At the end the files predict the programs that they were made from, and steps that they have not seen: if they are
    off by more than 50 % nothing is written, and the exit code is 1. A block of a GPU's kernels that is so far off is
    left out of its file.
    """
    hush()
    with needed():
        if network:
            from validate.calibration.show_network import show_network_calibration
        else:
            from validate.calibration.show_calibration import show_calibration
    taking = QUICK if quick else seconds
    if network:
        show_network_calibration(device, name, seconds=taking, as_json=as_json)
        return
    written = show_calibration(device, name, threads=threads, seconds=taking, output=records, as_json=as_json)
    sys.exit(0 if written else 1)
