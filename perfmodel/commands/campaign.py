"""`perfmodel validate campaign` and `validate paper`: they need the validate extra."""

import re
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..program.installed import needed
from .options import json_option

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
LEAST = 5.0  # s


class Budget(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """A time: `25m`, `90s`, `1h`, or seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)([smh]?)", str(value).strip(), re.ASCII)
        if not found:
            self.fail(f"{value!r} is not a time such as 25m, 90s, 1h or 600", param, ctx)
        seconds = float(found[1]) * UNITS[found[2]]
        if seconds < LEAST:
            self.fail(f"{value!r} is too short: {LEAST:.0f}s is the least", param, ctx)
        return seconds


@click.command()
@click.option("--device", type=click.Choice(("cuda", "cpu")), required=True, help="What to measure.")
@click.option("--budget", type=Budget(), default="25m", show_default=True, help="Time to take: 25m, 90s, 1h.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("campaign"),
    show_default=True,
    help="Folder of the records, the fitted files and the page; a campaign that is there goes on.",
)
@click.option("--plan", type=click.Path(dir_okay=False, path_type=Path), help="What to measure (TOML) [default: ours].")
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: PyTorch's choice].")
@json_option
def campaign(device: str, budget: float, output: Path, plan: Path | None, threads: int | None, as_json: bool) -> None:
    """Measure kernels, host and training steps within a budget.

    What tells most comes first; then a device and a host are fitted and checked on the steps. Stopped or killed at any
    moment it goes on where it was: `--budget 9m` three times is 27m once. In the folder: records.jsonl, device.toml,
    host.toml, page.html, summary.json.
    """
    with needed():
        from validate.campaign.show import show_campaign
    show_campaign(device, output, budget, plan=plan, threads=threads, as_json=as_json)


@click.command()
@click.option("--device", type=click.Choice(("cuda", "cpu")), help="What to measure: on a CPU, small models.")
@click.option("--predict-only", metavar="DEVICE", help="Measure nothing: predict for this device.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("paper.jsonl"),
    show_default=True,
    help="File of records; a file that is there is continued.",
)
@click.option("--profile", help="Predict with this device profile [default: this machine's].")
@click.option("--host", help="Predict with this host [default: the one calibrated with the device, else the default].")
@click.option("--threads", type=click.IntRange(1), help="CPU threads [default: PyTorch's choice].")
@json_option
def paper(
    device: str | None, predict_only: str | None, output: Path, profile: str | None, host: str | None,
    threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure and predict whether LoRA is slower (arXiv 2507.08833).

    The time of LoRA over that of full fine-tuning, forward + backward, by architecture. The exit code is 1 if a verdict
    is wrong where more than 10 % decide it.
    """
    if (device is None) == (predict_only is None):
        raise UserError("paper needs either --device cuda or cpu (measure here), or --predict-only DEVICE")
    with needed():
        from validate.campaign.show_paper import show_paper
    holds = show_paper(
        device, output, predict_only=predict_only, profile=profile, host=host, threads=threads, as_json=as_json
    )  # fmt: skip
    sys.exit(0 if holds else 1)
