"""`perfmodel validate host`: measure what this machine's host spends, and write a host file.

Tiny models (width 64, 4 tokens) make kernels take next to no time, so a real training step on the CPU shows its host
work: Python, dispatcher, autograd, hooks. Many such steps of different make-up and one non-negative least squares give
the cost of each kind of work; what a calibrated CPU spends in the kernels is taken off first. What no timed step holds
(launches on a GPU, compiled graphs, an engine's hooks) is kept from the default host, and the file says so. Every fifth
program is left out of the fit, to judge it (`verify`).
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np
import torch
from scipy.optimize import lsq_linear

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.calls import costs
from perfmodel.devices import host as hosts
from perfmodel.devices import price
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.resources import write_text
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models
from perfmodel.tracing.programs.updates import make_optimizer

from ..accuracy import Errors
from ..fitting.judging import FitCaveats
from ..measuring.environment import cpu_name
from ..oracle.cases import NO_DROPOUT, SMALL

LAYERS = 8
METHODS = ("full", "lora:r=4,targets=all-linear", "lora:r=4")
OPTIMIZERS = ("adamw-foreach", "adamw-loop")
WARM_UP, STEPS = 4, 15
LEFT_OUT = 5  # every so-manieth program is left out of the fit
MOST_KERNELS = 0.2  # of a tiny step is host work at least, whatever the kernels' prices say
NOTHING = 1e-9  # s: what takes less is nothing
NEEDED = 10  # programs that are timed even if the time is over
COSTS = tuple(f.name for f in fields(Host) if f.name not in ("name", "source"))


@dataclass(frozen=True)
class Timed:
    """One program, as the tape has it, and the seconds that its real step took by phase."""

    name: str
    step: Step
    seconds: dict[str, float]


@dataclass(frozen=True)
class HostFit:
    """Host costs fitted to timed programs.

    Attributes:
        caveats: costs that no timed step holds any of, which are the default host's, and those that went as low as they
            may, since their work was not told apart from other work.
        fitted, left_out: the programs in the fit and those that it did not see.
    """

    host: Host
    caveats: FitCaveats
    fitted: list[Timed]
    left_out: list[Timed]

    def provenance(self, found: Mapping[str, Errors]) -> dict[str, Any]:
        """What the host file says about the fit; `found` holds the errors of its check."""
        return {
            **{key: list(names) for key, names in asdict(self.caveats).items()},
            **{f"{key}_{what}": getattr(e, what) for key, e in found.items() for what in ("number", "mean", "worst")},
        }


def host_programs() -> Iterator[tuple[Config, str, str, str]]:
    """The programs that are timed: (config, method, checkpointing, optimizer)."""
    number = 0
    for name in ("llama", "gpt2", "bert", "opt"):
        values = {**SMALL[name], **NO_DROPOUT.get(name, {})}
        values["n_layer" if name == "gpt2" else "num_hidden_layers"] = LAYERS
        for method in METHODS:
            for checkpoint in ("none", "block", "block-reentrant"):
                yield Config(values, name, name), method, checkpoint, OPTIMIZERS[number % len(OPTIMIZERS)]
                number += 1


def work_of(step: Step, phase: str) -> dict[str, float]:
    """Units of each kind of host work in one phase, named as the fields of `Host`."""
    work = dict.fromkeys(COSTS, 0.0)
    for part, times in step.parts():
        if part.phase != phase:
            continue
        calls = times * sum(not op.view for op in part.ops)
        views = times * sum(op.view for op in part.ops)
        if phase == "optimizer" and any(costs.by_lists(op) for op in part.ops):
            work["optimizer_call"] += calls
            work["tensor"] += sum(
                sum(s.copies for s in op.outputs) for op in part.ops if op.name.startswith("_foreach")
            )
        elif phase == "optimizer":
            work["loop_call"] += calls
            work["view"] += views
        else:
            work["call" if phase == "forward" else "backward_call"] += calls
            work["view" if phase == "forward" else "backward_view"] += views
        for cost, count in (*hosts.PYTHON.items(), ("update", "updates")):
            work[cost] += times * getattr(part.host, count)
    return work


def kernel_seconds(step: Step, on: DeviceProfile) -> dict[str, float]:
    """Seconds of a step's kernels by phase."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for part, times in step.parts():
        seconds[part.phase] += times * float(price.durations(part.ops, on).sum())
    return seconds


def dispatched(step: Step, by: Host) -> dict[str, float]:
    """Seconds in which a host dispatches the phases, an engine's Python left out."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for part, times in step.parts():
        if part.ops:
            seconds[part.phase] += times * float(by.dispatch(part, "cpu").sum())
    return seconds


def time_program(config: Config, method_text: str, checkpoint: str, optimizer: str) -> Timed:
    """Time a real step of one program, phase by phase."""
    architecture = from_config(config)
    setup = Setup(batch=1, seq=4, dtype="fp32", checkpoint=checkpoint, optimizer=optimizer)
    method = methods.parse(method_text).bind(architecture)
    step = build(architecture, method, setup, "cpu")
    model = models.apply_method(models.build_model(config, setup, device="cpu"), method, architecture)
    model.train()
    if checkpoint != "none":
        reentrant = checkpoint == "block-reentrant"
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    times = _time_steps(model, make_optimizer([p for p in model.parameters() if p.requires_grad], step.optimizer))
    return Timed(f"{config.name} {method_text} {checkpoint} {optimizer}", step, dict(zip(PHASES, times, strict=True)))


def _time_steps(model: Any, update: torch.optim.Optimizer) -> list[float]:
    ids = torch.zeros(1, 4, dtype=torch.long)
    attention = torch.ones_like(ids)
    trained = [p for p in model.parameters() if p.requires_grad]
    clock = time.thread_time  # the machine's other work does not count
    rows = []
    for _ in range(WARM_UP + STEPS):
        start = clock()
        loss = model(input_ids=ids, attention_mask=attention, labels=ids).loss
        forward = clock()
        loss.backward()
        backward = clock()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        update.step()
        update.zero_grad()
        rows.append((forward - start, backward - forward, clock() - backward))
    return [float(x) for x in np.median(rows[WARM_UP:], axis=0)]


def fit_host(
    timed: Sequence[Timed], on: DeviceProfile | None = None, least: Mapping[str, float] | None = None
) -> HostFit:
    """Seconds per unit of work by bounded least squares on relative errors, on all programs but every fifth.

    Args:
        on: this machine's calibrated CPU, whose kernels are taken off; without it they count as host work.
        least: seconds that a unit takes at least, where that was measured by itself.
    """
    left_out = list(timed[LEFT_OUT - 1 :: LEFT_OUT])
    fitted = [t for i, t in enumerate(timed) if (i + 1) % LEFT_OUT]
    rows = [(work_of(t.step, phase), seconds) for t in fitted for phase, seconds in _host_seconds(t, on).items()]
    names = [name for name in COSTS if any(work[name] for work, _ in rows)]
    measured = np.array([seconds for _, seconds in rows])
    work = np.array([[work[name] for name in names] for work, _ in rows])
    low = np.array([(least or {}).get(name, 0.0) for name in names])
    scale = 1.0 / work.max(axis=0)
    found = lsq_linear(work * scale / measured[:, None], np.ones(len(rows)), bounds=(low / scale, np.inf))
    solution = np.maximum(found.x * scale, low)
    solution = np.where(solution > NOTHING, solution, 0.0)
    kept = tuple(name for name in COSTS if name not in names)
    spent = {name: getattr(hosts.load(), name) for name in kept} | dict(zip(names, map(float, solution), strict=True))
    at_bound = tuple(name for name, x, floor in zip(names, solution, low, strict=True) if x <= floor + NOTHING)
    software = f"PyTorch {version('torch')}, transformers {version('transformers')}, peft {version('peft')}"
    source = f"measured {date.today()}, {software}, Python {python_version()}"
    source += f"; not measured, the default host's: {', '.join(kept)}"
    return HostFit(
        Host(name=cpu_name() or "this machine", source=source, **spent), FitCaveats(kept, at_bound), fitted, left_out
    )


def _host_seconds(timed: Timed, on: DeviceProfile | None) -> dict[str, float]:
    """Seconds of a program's phases less those of its kernels."""
    kernels = kernel_seconds(timed.step, on) if on else dict.fromkeys(PHASES, 0.0)
    return {phase: max(t - kernels[phase], MOST_KERNELS * t) for phase, t in timed.seconds.items()}


def calibrate_host(
    progress: Callable[[str], None] = lambda name: None,
    *,
    on: DeviceProfile | None = None,
    least: Mapping[str, float] | None = None,
    seconds: float = np.inf,
) -> HostFit:
    """Time programs on this machine and fit its host costs to them.

    Args:
        on, least: see `fit`.
        seconds: after which no further program is begun.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    end = time.perf_counter() + seconds
    timed: list[Timed] = []
    todo = list(host_programs())
    random.Random(0).shuffle(todo)  # so that the first few are of every kind
    try:
        for i, (config, method, checkpoint, optimizer) in enumerate(todo):
            if i >= NEEDED and time.perf_counter() > end:
                break
            progress(f"{config.name} {method} {checkpoint}")
            timed.append(time_program(config, method, checkpoint, optimizer))
    finally:
        torch.set_num_threads(threads)
    return fit_host(timed, on, least)


def write_host(host: Host, path: Path, fit: Mapping[str, Any] | None = None) -> None:
    """Write a host file, whole or not at all; `fit` is the table that says how it came about."""
    lines = [f'name = "{host.name}"', f'source = "{host.source}"', "", "[seconds]"]
    lines += [f"{f.name} = {getattr(host, f.name):.3g}" for f in fields(Host) if f.name not in ("name", "source")]
    if fit:
        told = {k: f"{v:.4g}" if isinstance(v, float) else json.dumps(v) for k, v in fit.items()}
        lines += ["", "[fit]", *(f"{name} = {value}" for name, value in told.items())]
    write_text(path, "\n".join(lines) + "\n")
