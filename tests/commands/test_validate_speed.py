"""`perfmodel validate speed` times what its lines promise; how long that takes no test says, on a busy machine."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from validate import speed


class Planned:
    """What a sweep answers, as much of it as is timed."""

    def __init__(self, model: str, methods: list[str], *, batch: range, seq: Any, device: Any, **rest: Any) -> None:
        self.batches, self.seqs = len(batch), np.size(seq)
        self.others = len(methods) * np.size(device)

    def __len__(self) -> int:
        return self.batches * self.seqs * self.others

    def blocks(self) -> Iterator[dict[str, Any]]:
        yield {"batch": np.zeros(len(self))}


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Setups of each timed prediction; a command takes as long as importing numpy, all else a microsecond a setup."""
    sizes: list[int] = []

    def predict(*words: Any, batch: Any, seq: Any, **rest: Any) -> None:
        sizes.append(np.broadcast(batch, seq).size)

    def seconds(run: Callable[[], object], runs: int) -> float:
        swept = run()
        return 1e-6 * (swept if isinstance(swept, int) else sizes[-1])

    monkeypatch.setattr(speed, "_cold", lambda commands, **environment: dict.fromkeys(commands, 1.0))
    monkeypatch.setattr(speed, "_once", lambda arguments, **environment: 1.0)
    monkeypatch.setattr(speed, "_timed", seconds)
    monkeypatch.setattr(speed, "predict", predict)
    monkeypatch.setattr(speed, "sweep", Planned)
    monkeypatch.setattr(speed, "traced", lambda model, folder: model)
    monkeypatch.setattr(speed, "find_spec", lambda package: package)
    return sizes


def test_as_many_setups_are_timed_as_a_line_says(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that is smaller than promised would hold a promise that nobody gave."""
    monkeypatch.setattr(speed, "GRID_LIMIT", 1000.0)  # here a setup takes as long in a grid as alone
    done = CliRunner().invoke(main, ["validate", "speed", "--json"])
    assert done.exit_code == 0, done.output
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert timed == [1, 1000, 10_000, 1, 1, 1]
    assert rows["62 GPUs x 8 methods x 10 batches"]["measured"] == "0.00 s"  # a microsecond a setup
    assert rows["1,000 setups / one"]["measured"] == "1000.0"
    assert rows["10,000 setups"]["measured"] == "0.01 s"
    for swept in ("", " over a trace"):
        assert rows[f"sweep of 100,000{swept}, setups a second"]["measured"] == "1,000,000"


def test_traces_are_measured_where_they_can_be_made(timed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch the other promises hold or fail all the same."""
    monkeypatch.setattr(speed, "GRID_LIMIT", 1000.0)
    with_torch = {row[0] for row in speed.measure_promises()}
    monkeypatch.setattr(speed, "find_spec", lambda package: None if package == "torch" else package)
    without = {row[0] for row in speed.measure_promises()}
    assert without - with_torch == {"traced programs"}
    assert len(with_torch - without) == len(speed.TRACES) + 2


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("WARM_LIMIT", 0.9e-6),
        ("CATALOGUE_LIMIT", 60 * 8 * 10 * 0.9e-6),
        ("GRID_LIMIT", 999),
        ("SWEEP_LIMIT", 9e-3),
        ("RATE_LIMIT", 1_100_000),
        ("TRACED_LIMIT", 0.9),
        ("TRACED_RATE_LIMIT", 1_100_000),
    ],
)
def test_one_promise_that_is_missed_fails_the_command(
    timed: list[int], monkeypatch: pytest.MonkeyPatch, limit: str, value: float
) -> None:
    """A script goes by the exit code."""
    monkeypatch.setattr(speed, "GRID_LIMIT", 1000.0)
    monkeypatch.setattr(speed, limit, value)
    done = CliRunner().invoke(main, ["validate", "speed"])
    assert done.exit_code == 1
    assert done.output.count("missed") == 1


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_numpy_comes_without_threads_and_whoever_measures_gets_them() -> None:
    """A thread a core of its BLAS would double a command's start; processes that it starts choose for themselves."""
    name = "OPENBLAS_NUM_THREADS"
    program = (
        "import os; from perfmodel.__main__ import load_numpy; load_numpy();"
        f"print(len(os.listdir('/proc/self/task')), os.environ.get('{name}'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != name}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "None"]
