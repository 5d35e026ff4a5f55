"""`perfmodel validate speed`: the speed promises of the README, as ratios measured in one run."""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from statistics import quantiles

import numpy as np

from perfmodel import architectures, methods
from perfmodel.cli import COMMANDS
from perfmodel.prediction.predict import predict
from perfmodel.questions.sweeps import sweep

MODEL, METHOD, DEVICE = "llama-3.2-3b", "lora:r=32,targets=q_proj+v_proj", "l40s"
WHERE = ("--model", MODEL, "--device", DEVICE, "--batch", "4", "--seq", "210")
COLD: dict[str, tuple[tuple[str, ...], float]] = {  # what -> arguments, and its limit, x `python -c "import numpy"`
    "predict": (("predict", "--method", METHOD, "--json", *WHERE), 3.0),
    "compare": (("compare", "--methods", "full", METHOD, *WHERE), 4.0),
    "explain": (("explain", "full", METHOD, *WHERE), 4.0),
    "advise": (("advise", "--method", METHOD, *WHERE), 4.0),
    "sweep": (("sweep", "--methods", "full", METHOD, *WHERE), 4.0),
    "models": (("models",), 4.0),
    "methods": (("methods",), 4.0),
    "methods lora": (("methods", "lora"), 4.0),
    "devices": (("devices",), 4.0),
    **{f"{command} --help": ((command, "--help"), 4.0) for command in COMMANDS},
}  # `report` draws pictures: no promise
NUMPY = ("import numpy", ["-c", "import numpy"])  # what a cold start is measured by
ROUNDS = 21  # of cold starts
WARM_LIMIT = 0.020  # s
GRID_LIMIT = 20.0  # x one point
SWEEP_LIMIT = 5.0  # s for 10,000 setups
RATE_LIMIT = 50_000  # setups a second of a large sweep


def _once(command: list[str]) -> float:
    """Processor seconds of a process, by a clock of microseconds.

    Byte code is cached, as it is where a package was installed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _cold() -> dict[str, float]:
    """Each cold command over importing numpy: the lower quartiles of runs in turn, as other work only adds to a run.

    So two measurements agree within two percent on a loaded machine; the quickest runs do so within five.
    """
    commands = {command: ["-m", "perfmodel", *arguments] for command, (arguments, _) in COLD.items()}
    seconds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for command, arguments in (NUMPY, *commands.items()):
            seconds.setdefault(command, []).append(_once([sys.executable, *arguments]))
    lower = {command: quantiles(times, n=4)[0] for command, times in seconds.items()}
    return {command: lower[command] / lower[NUMPY[0]] for command in commands}


def _timed(run: Callable[[], object], runs: int) -> float:
    """Seconds of the quickest run: what else is at work on a core, its other thread included, only adds to them."""
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_promises() -> list[tuple[str, str, str, bool]]:
    """(what, measured, limit, met) of every promise."""
    cold = _cold()
    architecture = architectures.from_config(architectures.load(MODEL))
    method = methods.parse(METHOD)

    def grid(batches: int, seqs: int) -> object:
        batch = np.arange(2, 2 + batches).reshape(-1, 1)
        seq = np.arange(128, 128 + 16 * seqs, 16).reshape(1, -1)
        return predict(architecture, method, device=DEVICE, batch=batch, seq=seq)

    lengths = count(210)  # another one each time: no answer is remembered
    one = _timed(lambda: predict(architecture, method, device=DEVICE, batch=4, seq=next(lengths)), 50)
    thousand = _timed(lambda: grid(20, 50), 3)
    ten_thousand = _timed(lambda: grid(100, 100), 3)
    planned = sweep(MODEL, [METHOD], device=DEVICE, batch=range(1, 101), seq=range(64, 64 + 1000 * 8, 8))
    rate = len(planned) / _timed(lambda: sum(len(b["batch"]) for b in planned.blocks()), 3)
    return [
        *(
            (f"cold {command} / import numpy", f"{cold[command]:.2f}", f"{limit}", cold[command] <= limit)
            for command, (_, limit) in COLD.items()
        ),
        ("warm predict", f"{one * 1e3:.1f} ms", f"{WARM_LIMIT * 1e3:.0f} ms", one <= WARM_LIMIT),
        ("1,000 setups / one", f"{thousand / one:.1f}", f"{GRID_LIMIT:.0f}", thousand <= GRID_LIMIT * one),
        ("10,000 setups", f"{ten_thousand:.2f} s", f"{SWEEP_LIMIT:.0f} s", ten_thousand <= SWEEP_LIMIT),
        ("sweep of 100,000, setups a second", f"{rate:,.0f}", f"{RATE_LIMIT:,}", rate >= RATE_LIMIT),
    ]
