"""`perfmodel validate published`: predictions against training steps that others measured and published.

data/published/steps.csv holds the cited figures, a source on every row. Rows are split by whole groups (settings
measured together) into `fit`, which was looked at while the model was built, and `check`, on which errors are reported.
data/published/families.csv holds steps of model families that joined later, split by whole sources;
several_gpus.csv those of several GPUs, to which nothing was fitted.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perfmodel.architectures import Config, load
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.prediction.predict import predict
from perfmodel.program.dtypes import FLOATING
from perfmodel.program.software import SoftwareStack
from perfmodel.resources import DATA, read_rows
from perfmodel.setup import Setup

from ..accuracy import Errors, Pair, beyond, paired

TABLE = DATA / "published" / "steps.csv"
FAMILIES = DATA / "published" / "families.csv"
SEVERAL = DATA / "published" / "several_gpus.csv"
# columns of several_gpus.csv that are options of `Setup`
OF_SEVERAL: dict[str, Callable[[str], Any]] = {
    "gpus": int, "nodes": int, "tp": int, "pp": int, "parallel": str, "offload": str, "fsdp_units": str,
    "reduce_dtype": str,
    "reshard": lambda flag: flag != "0", "sync_each_batch": lambda flag: flag == "1",
    "sequence_parallel": lambda flag: flag == "1",
    "node": lambda name: beside_table(name, ".toml"),
}  # fmt: skip
# packages and their versions in a row's words: `torch 2.1.0 cu121`, `PyTorch 2.0 CUDA 11.8`, `transformers==4.49.0`
NAMED = re.compile(
    r"\b(?:py)?(?P<name>torch|cuda|transformers|peft|cu(?=\d))(?: |==)?(?P<version>\d[\w.+]*)", re.IGNORECASE
)

# PyTorch's releases (https://github.com/pytorch/pytorch/blob/main/RELEASE.md, "Release Cadence"), the newest first
RELEASED = {
    "2025-10-15": "2.9", "2025-08-06": "2.8", "2025-04-23": "2.7", "2025-01-29": "2.6", "2024-10-17": "2.5",
    "2024-07-24": "2.4", "2024-04-24": "2.3", "2024-01-30": "2.2", "2023-10-04": "2.1", "2023-03-15": "2.0",
}  # fmt: skip


@dataclass(frozen=True)
class PublishedStep:
    """One published figure and what it is of.

    Attributes:
        head: the class of transformers that was trained, where it is not the bundled config's.
        config: what else of the config was not the bundled one's.
        seconds: what was timed (step, forward, backward) with its figure.
    """

    id: str
    family: str
    model: str
    head: str
    config: dict[str, Any]
    device: str
    method: str
    setup: Setup
    seconds: dict[str, float]
    rounding: float
    memory: float | None
    memory_kind: str
    group: str
    split: str
    zero_grad: bool
    doubt: bool
    source: str
    notes: str


@dataclass(frozen=True)
class StepOutcome:
    """A row with its prediction."""

    row: PublishedStep
    predicted: dict[str, float]
    low: float
    high: float
    memory: float

    @property
    def seconds(self) -> float:
        """Seconds that were measured in all."""
        return sum(self.row.seconds.values())

    @property
    def predicted_seconds(self) -> float:
        """Predicted seconds of the same phases."""
        return sum(self.predicted.values())

    @property
    def slack(self) -> float:
        """Half a unit of the figure's last digit, relative."""
        return self.row.rounding / 2 / self.seconds

    @property
    def error(self) -> float:
        """Signed relative error; a figure's rounding is not held against the model."""
        return beyond(self.predicted_seconds / self.seconds - 1, self.slack)

    @property
    def inside(self) -> bool:
        """Whether the measured figure lies in the predicted interval."""
        slack = self.row.rounding / 2
        return self.low - slack <= self.seconds <= self.high + slack


def published_steps(path: Path = TABLE) -> list[PublishedStep]:
    """The table of published steps."""
    return read_rows(path, _row)


def stack_of(software: str, date: str = "") -> SoftwareStack:
    """The versions that a row names in words; what it does not name is current, but PyTorch as of its date.

    Args:
        date: YYYY, YYYY-MM or YYYY-MM-DD, until the end of which it was measured; empty: unknown.

    >>> stack_of("torch 2.7.1+cu126 transformers 4.52.4 peft 0.15.2.dev0").words
    'torch 2.7.1, CUDA 12.6, transformers 4.52.4, peft 0.15.2'
    >>> stack_of("", "2024-06-07").torch
    (2, 3, 0)
    """
    named = {match["name"].lower(): match["version"] for match in NAMED.finditer(software)}
    if date and date[:10] < max(RELEASED):
        named.setdefault("torch", next((torch for since, torch in RELEASED.items() if since <= f"{date}-99"), "2.0"))
    build = named.pop("cu", "")
    if build and "torch" in named:
        named["torch"] += f"+cu{build}"
    return SoftwareStack.of(named)


def _row(r: dict[str, str]) -> PublishedStep:
    amp = r["dtype"] if r["amp"] == "1" else r["amp"] if r["amp"] in FLOATING else None
    setup = Setup(
        batch=int(r["batch"]),
        seq=int(r["seq"]),
        dtype=r["dtype"],
        amp=amp,
        optimizer="adamw" if r["optimizer"] == "none" else r["optimizer"],
        grad_accum=int(r["grad_accum"]),
        checkpoint=r["checkpoint"],
        attention=r["attention"],
        compile=r["compile"],
        engine=r["engine"],
        **{name: kind(r[name]) for name, kind in OF_SEVERAL.items() if r.get(name)},
        clip_grad=r["clip"] == "1",
        padded=r["padded"] == "1",
        stack=stack_of(r["software"], r["date"]),
    )
    if r["doubt"] == "1":  # its forward is inflated, its backward is in line
        seconds = {"backward": float(r["bwd_s"])}
    elif r["fwd_s"] and r["bwd_s"]:
        seconds = {"forward": float(r["fwd_s"]), "backward": float(r["bwd_s"])}
    elif r["phases"] == "fwd+bwd":
        seconds = {"forward+backward": float(r["step_time_s"])}
    else:
        seconds = {"step": float(r["step_time_s"])}
    return PublishedStep(
        id=r["id"],
        family=r["family"],
        model=beside_table(r["model"], ".json"),
        head=r.get("head", ""),
        config=json.loads(r.get("config") or "{}"),
        device=r["device"],
        method=r["method"],
        setup=setup,
        seconds=seconds,
        rounding=float(r["rounding_s"] or 0),
        memory=float(r["peak_memory_bytes"]) if r["peak_memory_bytes"] else None,
        memory_kind=r["memory_kind"],
        group=r["group"],
        split=r["split"],
        zero_grad=r["zero_grad"] == "1",
        doubt=r["doubt"] == "1",
        source=r["source"],
        notes=r["notes"],
    )


def beside_table(name: str, suffix: str) -> str:
    """The path of what one source alone has, which lies beside the tables; another name as it is."""
    return str(TABLE.parent / name) if name.endswith(suffix) else name


def _model_of(row: PublishedStep) -> str | Config:
    changes = {"architectures": [row.head], **row.config} if row.head else row.config
    if not changes:
        return row.model
    config = load(row.model)
    return Config({**config.values, **changes}, config.origin, config.name)


def evaluate_row(row: PublishedStep) -> StepOutcome:
    """Predict what a row measured."""
    on = profile.load(row.device)
    p = predict(_model_of(row), row.method, row.setup, on, host=hosts.host_of("default", on))
    t = p.time.phases
    parts = {"step": t["total"], "forward+backward": t["forward"] + t["backward"], **t}
    predicted = {what: float(parts[what]) for what in row.seconds}
    share = sum(predicted.values()) / float(t["total"])
    return StepOutcome(
        row, predicted, float(p.time.low) * share, float(p.time.high) * share,
        float(p.memory.peak),
    )  # fmt: skip


def evaluate_rows(
    rows: Iterable[PublishedStep], progress: Callable[[str], None] = lambda name: None
) -> list[StepOutcome]:
    """Predict all rows."""
    outcomes = []
    for row in rows:
        outcomes.append(evaluate_row(row))
        progress(row.id)
    return outcomes


def row_pairs(outcomes: Sequence[StepOutcome]) -> list[Pair[StepOutcome]]:
    """Every method with full fine-tuning of its group, batch and length."""
    return paired(outcomes, lambda o: (o.row.group, o.row.setup.batch, o.row.setup.seq), lambda o: o.row.method)


def summarise_rows(outcomes: Sequence[StepOutcome]) -> list[dict[str, Any]]:
    """One line per family, and one for all: errors, ratios, verdicts, memory, coverage."""
    lines = []
    families = sorted({o.row.family for o in outcomes})
    for family in [*families, "all"]:
        members = [o for o in outcomes if family in ("all", o.row.family)]
        errors = Errors.of(o.error for o in members)
        ratio = row_pairs(members)
        clear = [p for p in ratio if p.decided]
        memory = [o.memory / o.row.memory - 1 for o in members if o.row.memory and o.row.memory_kind == "allocated"]
        lines.append(
            {
                "source": family, "rows": errors.number, "mean": errors.mean, "median": errors.median,
                "p90": errors.p90, "worst": errors.worst, "pairs": len(ratio),
                "ratio_mean": Errors.of(p.error for p in ratio).mean if ratio else None,
                "verdicts": f"{sum(p.right for p in clear)}/{len(clear)}" if clear else "",
                "memory_mean": Errors.of(memory).mean if memory else None,
                "coverage": float(np.mean([o.inside for o in members])),
            }
        )  # fmt: skip
    return lines
