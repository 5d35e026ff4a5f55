"""`perfmodel validate tuners`: PEFT's own benchmarks, every tuner traced as `predict --traced` does it.

data/published/peft_tuners.csv holds the step times that PEFT's method_comparison/MetaMathQA measured, one row a
configuration of a tuner, with its adapter_config.json as text; peft_image_tuners.csv those of
method_comparison/image-gen, full fine-tuning (without a config) among them. No row was looked at to fit a price.
"""

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perfmodel.architectures import load as load_model
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.devices.host import Host
from perfmodel.errors import UserError
from perfmodel.methods.parts.peft_adapter import PeftAdapter
from perfmodel.prediction.predict import Prediction, of_step
from perfmodel.recording.step import Step
from perfmodel.resources import DATA, read_rows
from perfmodel.setup import Setup
from perfmodel.tracing import traced

from .steps import stack_of

TABLE = DATA / "published" / "peft_tuners.csv"
IMAGES = DATA / "published" / "peft_image_tuners.csv"
MEAN_LIMIT = 0.12  # mean |relative error| of the step time
RANK_LIMIT = 0.9  # Spearman's correlation of predicted and measured step times
WORST = 5
TIMES = (0.5, 4.0)  # how much slower than the usual host theirs may be in a fit


@dataclass(frozen=True)
class TunerRow:
    """One configuration of a tuner and the seconds that its step took.

    Attributes:
        spread: seconds between the fastest and the slowest segment of the run.
        trainable: parameters that train, as PEFT counted them.
        memory: most bytes that the allocator had reserved, over all batch shapes of the run.
        config: the values of its adapter_config.json; none for full fine-tuning.
    """

    id: str
    source: str
    model: str
    device: str
    setup: Setup
    seconds: float
    spread: float
    trainable: int
    memory: int
    config: dict[str, Any]

    @property
    def tuner(self) -> str:
        """PEFT's name of the tuner."""
        return str(self.config.get("peft_type", "full"))


@dataclass(frozen=True)
class TunerOutcome:
    """A row with its prediction, or the reason why there is none."""

    row: TunerRow
    prediction: Prediction | None
    reason: str = ""

    @property
    def predicted(self) -> float:
        """Predicted seconds of the step."""
        assert self.prediction is not None, self.reason
        return float(self.prediction.time.phases["total"])

    @property
    def error(self) -> float:
        """Signed relative error of the step time."""
        return self.predicted / self.row.seconds - 1


@dataclass(frozen=True)
class TunerSummary:
    """What is reported of the rows that could be traced; errors are |relative error| of the step time."""

    rows: int
    tuners: int
    mean: float
    median: float
    p90: float
    spearman: float
    worst: tuple[TunerOutcome, ...]

    @property
    def holds(self) -> bool:
        """Whether both limits are kept."""
        return self.mean <= MEAN_LIMIT and self.spearman >= RANK_LIMIT


def published_tuners(path: Path = TABLE) -> list[TunerRow]:
    """A table of PEFT's benchmarks."""
    return read_rows(path, _row)


def _row(r: dict[str, str]) -> TunerRow:
    setup = Setup(
        batch=int(r["batch"]),
        seq=int(r["seq"]),
        dtype=r["dtype"],
        optimizer=r["optimizer"],
        checkpoint=r["checkpoint"],
        padded=r["padded"] == "1",
        stack=stack_of(r["software"]),
    )
    return TunerRow(
        id=r["id"],
        source=r["source"],
        model=r["model"],
        device=r["device"],
        setup=setup,
        seconds=float(r["step_time_s"]),
        spread=float(r["spread_s"]),
        trainable=int(r["trainable"]),
        memory=int(r["memory_reserved_bytes"]),
        config=json.loads(r["config"]),
    )


def evaluate_tuner(row: TunerRow, host: str | Host = "default") -> TunerOutcome:
    """Trace the tuner's program and price it."""
    try:
        return TunerOutcome(
            row, _predict(json.dumps(row.config, sort_keys=True), row.model, row.setup, row.device, host)
        )
    except UserError as error:
        return TunerOutcome(row, None, str(error))


@cache
def _predict(config: str, model: str, setup: Setup, device: str, host: str | Host) -> Prediction:
    on = profile.load(device)
    return of_step(_built(config, model, setup, device), on, hosts.host_of(host, on))


@cache
def _built(config: str, model: str, setup: Setup, device: str) -> Step:
    """Some rows differ in what changes no op (learning rate, random start), so a program is traced once."""
    values = json.loads(config)
    method = PeftAdapter.of(values) if values else "full"
    return traced.of_method(load_model(model), method, setup, profile.load(device))[0]


def evaluate_tuners(
    rows: Sequence[TunerRow], progress: Callable[[str], None] = lambda name: None, host: str = "default"
) -> list[TunerOutcome]:
    """Trace and price all rows."""
    outcomes = []
    for row in rows:
        outcomes.append(evaluate_tuner(row, host))
        progress(row.id)
    return outcomes


class HostSpeed(NamedTuple):
    """How slow the host of a benchmark was.

    Attributes:
        slower: times as slow as the usual host, by the least mean error of the step time over all rows.
        halves: the same of each half of the tuners.
        rows: how many.
        before: mean error beside the usual host.
        crossed: mean error of each half's rows beside the host that the other half tells.
    """

    slower: float
    halves: tuple[float, float]
    rows: int
    before: float
    crossed: float


def host_speed(rows: Sequence[TunerRow], tried: Callable[[float], None] = lambda times: None) -> HostSpeed:
    """Fit one figure, how slow the host was, to all rows, and to each half of the tuners, to judge it on the other.

    Raises:
        UserError: a half is empty, or a row could not be traced.
    """
    from scipy.optimize import minimize_scalar

    halves: tuple[list[TunerRow], list[TunerRow]] = [], []
    for row in rows:
        halves[zlib.crc32(row.tuner.encode()) % 2].append(row)
    if not all(halves):
        raise UserError("a host is fitted to half of the tuners at a time: too few of them are here")
    usual = hosts.load()

    def error(row: TunerRow, times: float) -> float:
        outcome = evaluate_tuner(row, usual.slower(times))
        if outcome.prediction is None:
            raise UserError(f"{row.id}: {outcome.reason}")
        return abs(outcome.error)

    def mean(some: Sequence[TunerRow], times: float) -> float:
        tried(times)
        return float(np.mean([error(row, times) for row in some]))

    def least(some: Sequence[TunerRow]) -> float:
        found = minimize_scalar(lambda times: mean(some, times), bounds=TIMES, options={"xatol": 0.01})
        return round(float(found.x), 2)

    one, other = map(least, halves)
    crossed = [error(row, times) for half, times in zip(halves, (other, one), strict=True) for row in half]
    return HostSpeed(least(rows), (one, other), len(rows), mean(rows, 1.0), float(np.mean(crossed)))


def summarise_tuners(outcomes: Sequence[TunerOutcome]) -> TunerSummary:
    """Errors and rank correlation over the rows that have a prediction (at least two).

    Raises:
        UserError: fewer than two rows could be traced.
    """
    from scipy.stats import spearmanr

    found = [o for o in outcomes if o.prediction is not None]
    if len(found) < 2:
        raise UserError("fewer than two tuners could be traced: is another version of peft or transformers installed?")
    errors = np.abs([o.error for o in found])
    ranks = spearmanr([o.predicted for o in found], [o.row.seconds for o in found])
    worst = sorted(found, key=lambda o: -abs(o.error))[:WORST]
    return TunerSummary(
        rows=len(found),
        tuners=len({o.row.tuner for o in found}),
        mean=float(errors.mean()),
        median=float(np.median(errors)),
        p90=float(np.quantile(errors, 0.9)),
        spearman=float(ranks.statistic),
        worst=tuple(worst),
    )
