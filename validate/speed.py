"""`perfmodel validate speed`: the speed promises of the README, as ratios measured in one run.

Those on traced programs are measured where what traces them is installed.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import count, cycle
from pathlib import Path
from statistics import quantiles
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from perfmodel import architectures, methods
from perfmodel.cli import COMMANDS
from perfmodel.devices import profile
from perfmodel.prediction.predict import predict
from perfmodel.prediction.remembered import Steps
from perfmodel.questions.sweeps import Sweep, sweep
from perfmodel.tracing.recorded import traced

MODEL, METHOD, DEVICE = "llama-3.2-3b", "lora:r=32,targets=q_proj+v_proj", "l40s"
WITH_NICS = "h100-sxm"  # nodes of it have a network
WHERE = ("--model", MODEL, "--device", DEVICE, "--batch", "4", "--seq", "210")
SEVERAL = ("--gpus", "8", "--parallel", "fsdp2")
COLD: dict[str, tuple[tuple[str, ...], float]] = {  # what -> arguments, and its limit, x `python -c "import numpy"`
    "predict": (("predict", "--method", METHOD, "--json", *WHERE), 1.8),
    "compare": (("compare", "--methods", "full", METHOD, *WHERE), 1.8),
    "predict --gpus 8": (("predict", "--method", METHOD, "--json", *WHERE, *SEVERAL), 2.5),
    "explain": (("explain", "full", METHOD, *WHERE), 4.0),
    "advise": (("advise", "--method", METHOD, *WHERE), 4.0),
    "sweep": (("sweep", "--methods", "full", METHOD, *WHERE), 4.0),
    "plan": (("plan", "--methods", METHOD, "--samples", "10000", *WHERE), 4.0),
    "models": (("models",), 4.0),
    "methods": (("methods",), 4.0),
    "methods lora": (("methods", "lora"), 4.0),
    "devices": (("devices",), 4.0),
    **{f"{command} --help": ((command, "--help"), 4.0) for command in COMMANDS},
}  # `report` draws pictures: no promise
EVERYWHERE = (  # a plan over the catalogue, many of whose GPUs are too small for the setup as it is
    "-m", "perfmodel", "plan", "--model", "llama-3.1-8b", "--methods", "lora", "--samples", "10000", "--batch", "4",
    "--grad-accum", "4", "--seq", "2048",
)  # fmt: skip
EVERYWHERE_LIMIT = 3.0  # s
ROUNDS = 21  # of cold starts
WARM_LIMIT = 0.020  # s, of a setup whose step is recorded
DRAGGED_LIMIT = 0.002  # s, of one that differs from others in a size or the device
CATALOGUE_METHODS = (
    "full", "lora:r=16", "lora:r=16,targets=q_proj+v_proj", "lora:r=16,implementation=unsloth", "rslora:r=16",
    "qlora:r=16", "dora:r=16", "ia3",
)  # fmt: skip
CATALOGUE_BATCHES, CATALOGUE_LIMIT = range(2, 22, 2), 1.0  # s for every GPU with each of these methods and batches
GRID_LIMIT = 20.0  # x one point
SWEEP_LIMIT = 5.0  # s for 10,000 setups
BATCHES, SEQS = range(1, 101), range(64, 64 + 1000 * 8, 8)  # of a large sweep
RATE_LIMIT = 50_000  # setups a second of a large sweep
GPUS, OF_GPUS_LIMIT = (1, 2, 4, 8, 16, 32, 64, 128), 20_000  # of one over so many GPUs, and setups a second of it
TRACES = (("llama-3.1-8b", "full"), ("llama-3.1-8b", "lora"), ("qwen3.5-9b", "full"))  # first traces of 8B models
TRACED = ("compare", "--traced", "--model", "llama-3.1-8b", "--methods", "full", "lora", "--device", DEVICE)
TRACE_LIMIT = 20.0  # s
TRACED_LIMIT = 5.0  # x `python -c "import numpy"`: a program that is recorded already
TRACED_RATE_LIMIT = 20_000  # setups a second of a large sweep over one
Promise = tuple[str, str, str, bool]  # what, measured, limit, met


def _once(arguments: Sequence[str], **environment: str) -> float:
    """Processor seconds of a Python process, by a clock of microseconds.

    Byte code is cached, as it is where a package was installed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | environment
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _cold(commands: Mapping[str, Sequence[str]], **environment: str) -> dict[str, float]:
    """Each cold command of perfmodel over importing numpy: the lower quartiles of runs in turn.

    Other work only adds to a run. So two measurements agree within two percent on a loaded machine; the quickest runs
    do so within five.
    """
    calls = {"": ("-c", "import numpy")} | {name: ("-m", "perfmodel", *words) for name, words in commands.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, arguments in calls.items():
            seconds[name].append(_once(arguments, **environment))
    lower = {name: quantiles(times, n=4)[0] for name, times in seconds.items()}
    return {name: lower[name] / lower[""] for name in commands}


def _timed(run: Callable[[], object], runs: int) -> float:
    """Seconds of the quickest run: what else is at work on a core, its other thread included, only adds to them."""
    run()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _rate(planned: Sweep) -> float:
    """Setups a second of a sweep."""
    return len(planned) / _timed(lambda: sum(len(b["batch"]) for b in planned.blocks()), 3)


def _on_traces() -> Iterator[Promise]:
    """The promises on traced programs, in a folder of their own."""
    if not all(map(find_spec, ("torch", "transformers", "peft"))):
        yield "traced programs", "not installed", "pip install 'perfmodel[validate]'", True
        return
    with TemporaryDirectory() as home:
        for model, name in TRACES:
            words = ("-m", "perfmodel", "record", "--model", model, "--methods", name, "--device", DEVICE)
            seconds = _once(words, PERFMODEL_HOME=home)
            what, limit = f"first trace of {name} on {model}", f"{TRACE_LIMIT:.0f} s"
            yield what, f"{seconds:.1f} s", limit, seconds <= TRACE_LIMIT
        (cold,) = _cold({"compare": TRACED}, PERFMODEL_HOME=home).values()
        yield "cold compare --traced / import numpy", f"{cold:.2f}", f"{TRACED_LIMIT}", cold <= TRACED_LIMIT
        model, name = TRACES[0]
        recorded = traced(model, Path(home) / "programs")
        rate = _rate(sweep(recorded, [name], device=DEVICE, batch=BATCHES, seq=SEQS))
        what, limit = "sweep of 100,000 over a trace, setups a second", f"{TRACED_RATE_LIMIT:,}"
        yield what, f"{rate:,.0f}", limit, rate >= TRACED_RATE_LIMIT


def _dragged() -> Iterator[Promise]:
    """The promises on what differs from others in one thing: a slider, and the whole catalogue."""
    known = [profile.load(name) for name in profile.names()]
    gpus = [on.slug for on in known if on.kind == "cuda" and float(on.compute_capability) >= 7.0]  # which Triton needs
    batches, ranks, devices = count(2), count(2), cycle(gpus)
    asked: dict[str, Callable[[], object]] = {
        "batch": lambda: predict(MODEL, METHOD, device=DEVICE, batch=next(batches), seq=210),
        "rank": lambda: predict(MODEL, f"lora:r={next(ranks)}", device=DEVICE, batch=4, seq=210),
        "device": lambda: predict(MODEL, METHOD, device=next(devices), batch=4, seq=210),
    }
    limit = f"{DRAGGED_LIMIT * 1e3:.0f} ms"
    for what, run in asked.items():
        seconds = _timed(run, 200)
        yield f"warm predict of another {what}", f"{seconds * 1e3:.2f} ms", limit, seconds <= DRAGGED_LIMIT
    every = sweep(MODEL, CATALOGUE_METHODS, device=gpus, batch=CATALOGUE_BATCHES, seq=210)
    seconds = _timed(lambda: sum(len(b["batch"]) for b in every.blocks()), 3)
    what = f"{len(gpus)} GPUs x {len(CATALOGUE_METHODS)} methods x {len(CATALOGUE_BATCHES)} batches"
    yield what, f"{seconds:.2f} s", f"{CATALOGUE_LIMIT:.0f} s", seconds <= CATALOGUE_LIMIT


def measure_promises() -> list[Promise]:
    """Every promise."""
    cold = _cold({command: arguments for command, (arguments, _) in COLD.items()})
    architecture = architectures.from_config(architectures.load(MODEL))
    method = methods.parse(METHOD)

    def grid(batches: int, seqs: int) -> object:
        batch = np.arange(2, 2 + batches).reshape(-1, 1)
        seq = np.arange(128, 128 + 16 * seqs, 16).reshape(1, -1)
        return predict(architecture, method, device=DEVICE, batch=batch, seq=seq)

    alone = _timed(lambda: predict(architecture, method, device=DEVICE, batch=4, seq=210, steps=Steps()), 50)
    thousand = _timed(lambda: grid(20, 50), 3)
    ten_thousand = _timed(lambda: grid(100, 100), 3)
    everywhere = min(_once(EVERYWHERE) for _ in range(3))
    rate = _rate(sweep(MODEL, [METHOD], device=DEVICE, batch=BATCHES, seq=SEQS))
    some: dict[str, Any] = {"batch": BATCHES, "seq": SEQS[: len(SEQS) // len(GPUS)], "gpus": GPUS, "parallel": "fsdp2"}
    of_gpus = _rate(sweep(MODEL, [METHOD], device=WITH_NICS, **some))
    return [
        *(
            (f"cold {command} / import numpy", f"{cold[command]:.2f}", f"{limit}", cold[command] <= limit)
            for command, (_, limit) in COLD.items()
        ),
        ("warm predict", f"{alone * 1e3:.1f} ms", f"{WARM_LIMIT * 1e3:.0f} ms", alone <= WARM_LIMIT),
        *_dragged(),
        ("1,000 setups / one", f"{thousand / alone:.1f}", f"{GRID_LIMIT:.0f}", thousand <= GRID_LIMIT * alone),
        ("10,000 setups", f"{ten_thousand:.2f} s", f"{SWEEP_LIMIT:.0f} s", ten_thousand <= SWEEP_LIMIT),
        ("sweep of 100,000, setups a second", f"{rate:,.0f}", f"{RATE_LIMIT:,}", rate >= RATE_LIMIT),
        ("plan over every GPU", f"{everywhere:.2f} s", f"{EVERYWHERE_LIMIT:.0f} s", everywhere <= EVERYWHERE_LIMIT),
        ("sweep over GPUs, setups a second", f"{of_gpus:,.0f}", f"{OF_GPUS_LIMIT:,}", of_gpus >= OF_GPUS_LIMIT),
        *_on_traces(),
    ]
