"""`perfmodel validate host`: measure what this machine's host spends, and write a host file.

Tiny models (width 64, 4 tokens) make kernels take next to no time, so a real training step on the CPU shows its host
work: Python, dispatcher, autograd, hooks. Many such steps of different make-up and one non-negative least squares give
the cost of each kind of work; what a calibrated CPU spends in the kernels is taken off first. The launch figures of a
GPU cannot be seen from here and are kept from the default.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
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

from ..measuring.environment import cpu_name
from ..oracle.counts import NO_DROPOUT, SMALL

LAYERS = 8
KEPT = ("launch_call", "launch", "graph_launch", "compiled_kernel", "compiled_graph", "guard")  # not measured here
METHODS = ("full", "lora:r=4,targets=all-linear", "lora:r=4")
OPTIMIZERS = ("adamw-foreach", "adamw-loop")
WARM_UP, STEPS = 4, 15
MOST_KERNELS = 0.2  # of a tiny step is host work at least, whatever the kernels' prices say
NOTHING = 1e-9  # s: what takes less is nothing
NEEDED = 10  # programs that are timed even if the time is over


@dataclass(frozen=True)
class Sample:
    """One phase of one program: how much of each kind of host work it does, and the median seconds."""

    name: str
    work: dict[str, float]
    seconds: float


def programs() -> Iterator[tuple[Config, str, str, str]]:
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
    work = {f.name: 0.0 for f in fields(Host) if f.name not in (*KEPT, "name", "source")}
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
        for cost, count in hosts.PYTHON.items():
            work[cost] += times * getattr(part.host, count)
    return work


def kernel_seconds(step: Step, on: DeviceProfile) -> dict[str, float]:
    """Seconds of a step's kernels by phase."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for part, times in step.parts():
        seconds[part.phase] += times * float(price.durations(part.ops, on).sum())
    return seconds


def measure(
    config: Config, method_text: str, checkpoint: str, optimizer: str, on: DeviceProfile | None
) -> list[Sample]:
    """Time a real step of one program, phase by phase, less the kernels' seconds `on` a calibrated CPU."""
    architecture = from_config(config)
    setup = Setup(batch=1, seq=4, dtype="fp32", checkpoint=checkpoint, optimizer=optimizer)
    method = methods.parse(method_text).bind(architecture)
    step = build(architecture, method, setup, "cpu")
    model = models.apply(models.build(config, setup, device="cpu"), method, architecture)
    model.train()
    if checkpoint != "none":
        reentrant = checkpoint == "block-reentrant"
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    times = _time_steps(model, make_optimizer([p for p in model.parameters() if p.requires_grad], step.optimizer))
    name = f"{config.name} {method_text} {checkpoint} {optimizer}"
    kernels = kernel_seconds(step, on) if on else dict.fromkeys(PHASES, 0.0)
    return [
        Sample(f"{name} {phase}", work_of(step, phase), max(t - kernels[phase], MOST_KERNELS * t))
        for phase, t in zip(PHASES, times, strict=True)
    ]


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
    return [float(x) for x in np.quantile(rows[WARM_UP:], 0.25, axis=0)]


def fit(samples: list[Sample], least: Mapping[str, float] | None = None) -> tuple[dict[str, float], float]:
    """Seconds per unit of work by bounded least squares on relative errors; the mean |relative error| with it.

    Args:
        least: seconds that a unit takes at least, where that was measured by itself.
    """
    names = list(samples[0].work)
    measured = np.array([s.seconds for s in samples])
    work = np.array([[s.work[n] for n in names] for s in samples])
    low = np.array([(least or {}).get(n, 0.0) for n in names])
    scale = 1.0 / np.maximum(work.max(axis=0), 1.0)
    found = lsq_linear(work * scale / measured[:, None], np.ones(len(samples)), bounds=(low / scale, np.inf))
    solution = np.maximum(found.x * scale, low)
    error = float(np.mean(np.abs(work @ solution / measured - 1)))
    return {n: float(v) if v > NOTHING else 0.0 for n, v in zip(names, solution, strict=True)}, error


def calibrate(
    progress: Callable[[str], None] = lambda name: None,
    *,
    on: DeviceProfile | None = None,
    least: Mapping[str, float] | None = None,
    seconds: float = np.inf,
) -> tuple[Host, float, int]:
    """Measure this machine: its host file, the fit's mean |relative error|, and the number of phases timed.

    Args:
        on: this machine's calibrated CPU, whose kernels are taken off; without it they count as host work.
        least: see `fit`.
        seconds: after which no further program is begun.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    end = time.perf_counter() + seconds
    samples: list[Sample] = []
    todo = list(programs())
    random.Random(0).shuffle(todo)  # so that the first few are of every kind
    try:
        for i, (config, method, checkpoint, optimizer) in enumerate(todo):
            if i >= NEEDED and time.perf_counter() > end:
                break
            progress(f"{config.name} {method} {checkpoint}")
            samples += measure(config, method, checkpoint, optimizer, on)
    finally:
        torch.set_num_threads(threads)
    spent, error = fit(samples, least)
    default = hosts.load()
    spent |= {name: getattr(default, name) for name in KEPT}
    software = f"PyTorch {version('torch')}, transformers {version('transformers')}, peft {version('peft')}"
    kept = "launch and compile figures: the default host's"
    source = f"measured {date.today()}, {software}, Python {python_version()}; {kept}"
    return Host(name=cpu_name() or "this machine", source=source, **spent), error, len(samples)


def write(host: Host, path: Path, fit: Mapping[str, Any] | None = None) -> None:
    """Write a host file, whole or not at all; `fit` is the table that says how it came about."""
    lines = [f'name = "{host.name}"', f'source = "{host.source}"', "", "[seconds]"]
    lines += [f"{f.name} = {getattr(host, f.name):.3g}" for f in fields(Host) if f.name not in ("name", "source")]
    if fit:
        told = {k: f"{v:.4g}" if isinstance(v, float) else json.dumps(v) for k, v in fit.items()}
        lines += ["", "[fit]", *(f"{name} = {value}" for name, value in told.items())]
    write_text(path, "\n".join(lines) + "\n")
