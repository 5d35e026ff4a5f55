"""`perfmodel validate engine`: measure what the Python of DeepSpeed or FSDP costs beside the model's, and write
data/engines/*.toml.

Tiny Llamas (width 64, 4 tokens) are trained on one thread of this CPU, with and without DeepSpeed's ZeRO-3 or FSDP. Of
DeepSpeed a process of one rank (gloo) runs all its hooks, of FSDP one of `RANKS` whose group sends nothing. Both run
in turns, so that what else the machine does slows both. What a step takes longer with it, less the ATen calls that the
tape records for it, is laid on parameters, gradients and units by non-negative least squares. Only what further layers
add counts, so that nothing of a step as a whole gets in. The costs are given in modules of the host: the same models
without it say how this machine's host compares with the default one.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.devices import host as hosts
from perfmodel.devices.engine import COSTS
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.resources import write_text
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models

from ..measuring.environment import cpu_name
from ..oracle.cases import SMALL
from ..oracle.flat import flat_units
from .hosts import dispatched

DEEPSPEED = "deepspeed-zero3"
ENGINES = {DEEPSPEED: "DeepSpeed ZeRO-3", "fsdp2": "FSDP2", "fsdp1": "FSDP1"}
RANKS = 4  # of FSDP
LAYERS = (4, 8)
METHODS = ("full", "lora:r=4,targets=all-linear", "lora:r=4")
CHECKPOINTS = ("none", "block-reentrant")
MICRO_BATCHES = 2
WARM_UP, STEPS = 2, 6  # DeepSpeed traces the order of modules in its first steps
WIDTH = SMALL["llama"]["hidden_size"]
# What transformers makes of "auto" (integrations/deepspeed.py), and DeepSpeed's defaults; the optimizer is PyTorch's,
# since DeepSpeed's own for a CPU has to be compiled
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": MICRO_BATCHES,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": WIDTH**2,
        "stage3_prefetch_bucket_size": int(0.9 * WIDTH**2),
        "stage3_param_persistence_threshold": 10 * WIDTH,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
    },
}
Seconds = dict[str, float]  # by phase; forward and backward of one micro-batch


@dataclass(frozen=True)
class EngineRow:
    """What the layers between the two depths add to one phase of one program.

    Attributes:
        plain, engine: measured seconds without and with the engine.
        expected, recorded: the same as the default host dispatches the ops that the tape records.
        units: parameters that go forward and backward, gradients, parameters that are updated, units (`COSTS`).
    """

    name: str
    plain: float
    engine: float
    expected: float
    recorded: float
    units: tuple[float, ...]


@dataclass(frozen=True)
class Running:
    """A model to train: how it runs, how it runs back, and what follows a micro-batch, the last of a step or not."""

    model: Any
    backward: Callable[[Any], None]
    update: Callable[[bool], None]

    def step(self) -> Iterator[tuple[str, float]]:
        """One optimizer step: CPU seconds by phase."""
        ids = torch.zeros(1, 4, dtype=torch.long)
        clock = time.thread_time  # the machine's other work does not count
        for micro in range(MICRO_BATCHES):
            last = micro == MICRO_BATCHES - 1
            begin = clock()
            loss = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
            forward = clock()
            self.backward(loss)
            back = clock()
            self.update(last)
            end = clock()
            yield "forward", forward - begin
            yield "backward", back - forward
            if last:
                yield "optimizer", end - back


Wrap = Callable[[Any], Running]  # a model with the engine around it


def start(name: str) -> Wrap:
    """An engine or form, in a process group of its own.

    Raises:
        ImportError: it is not installed.
    """
    import torch.distributed as dist

    if name == DEEPSPEED:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        import deepspeed

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        return lambda model: _engine(deepspeed, model)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    return _fsdp2 if name == "fsdp2" else _fsdp1


def options_of(name: str) -> dict[str, Any]:
    """What of a setup asks for it."""
    return {"engine": name} if name == DEEPSPEED else {"parallel": name, "gpus": RANKS}


def engine_programs() -> Iterator[tuple[str, str]]:
    """(method, checkpointing) of the models that are timed."""
    yield from product(METHODS, CHECKPOINTS)


def time_programs(engine: str, progress: Callable[[str], None] = lambda name: None) -> list[EngineRow]:
    """Time every program at both depths, with and without the engine."""
    wrap = start(engine)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    try:
        for method, checkpoint in engine_programs():
            progress(f"{method} {checkpoint}")
            few, many = (_at_depth(engine, wrap, method, checkpoint, layers) for layers in LAYERS)
            rows += [
                _between(f"{method} {checkpoint} {phase}", a, b) for phase, a, b in zip(PHASES, few, many, strict=True)
            ]
    finally:
        torch.set_num_threads(threads)
    return rows


def _between(name: str, few: EngineRow, many: EngineRow) -> EngineRow:
    units = tuple(b - a for a, b in zip(few.units, many.units, strict=True))
    return EngineRow(
        name, many.plain - few.plain, many.engine - few.engine, many.expected - few.expected,
        many.recorded - few.recorded, units,
    )  # fmt: skip


def _at_depth(engine: str, wrap: Wrap, method_text: str, checkpoint: str, layers: int) -> list[EngineRow]:
    """One program, phase by phase."""
    config = Config({**SMALL["llama"], "num_hidden_layers": layers}, "llama", "llama")
    architecture = from_config(config)
    method = methods.parse(method_text).bind(architecture)
    setup = Setup(batch=1, seq=4, dtype="fp32", checkpoint=checkpoint, optimizer="adamw-fused")
    steps = [build(architecture, method, replace(setup, **options), "cpu") for options in ({}, options_of(engine))]
    running = []
    for around in (_plain, wrap):
        model = models.apply_method(models.build_model(config, setup, device="cpu"), method, architecture)
        model.train()
        if checkpoint != "none":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        running.append(around(model))
    times = _in_turns(running)
    by = hosts.load()
    expected, recorded = (dispatched(step, by) for step in steps)
    return [
        EngineRow(phase, times[0][phase], times[1][phase], expected[phase], recorded[phase], units(steps[1], phase))
        for phase in PHASES
    ]


def units(step: Step, phase: str) -> tuple[float, ...]:
    """Of one phase, parameters that go forward and backward, gradients, updates and units, as `COSTS` names them."""
    parts = [(part, times) for part, times in step.parts() if part.phase == phase]
    gradients = float(sum(times * part.host.gradients for part, times in parts))
    updates = phase == "optimizer"
    return (
        float(sum(times * part.host.weights for part, times in parts)),
        float(sum(times * part.host.returns for part, times in parts)),
        0.0 if updates else gradients,
        gradients if updates else 0.0,
        float(sum(times * part.host.units for part, times in parts)),
    )


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _plain(model: Any) -> Running:
    trained = _trained(model)
    optimizer = torch.optim.AdamW(trained, fused=True)

    def update(last: bool) -> None:
        if last:
            torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
            optimizer.step()
            optimizer.zero_grad()

    return Running(model, lambda loss: loss.backward(), update)


def _engine(deepspeed: Any, model: Any) -> Running:
    optimizer = torch.optim.AdamW(_trained(model), fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)[0]
    return Running(engine, engine.backward, lambda last: engine.step())


def _fsdp2(model: Any) -> Running:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _plain(model)


def _fsdp1(model: Any) -> Running:
    sharded = flat_units(model, type(_blocks(model)[0]))
    return replace(_plain(sharded), update=_without_norm(sharded))


def _without_norm(model: Any) -> Callable[[bool], None]:
    """The update of flat parameters, whose norm is a method of the model that reads it on the host."""
    optimizer = torch.optim.AdamW(_trained(model), fused=True)

    def update(last: bool) -> None:
        if last:
            model.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()

    return update


def _blocks(model: Any) -> list[Any]:
    found = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(found[0])


def _in_turns(programs: list[Running]) -> list[Seconds]:
    """Of each program the lower quartile of CPU seconds: a micro-batch's forward and backward, and the update."""
    taken: list[dict[str, list[float]]] = [{phase: [] for phase in PHASES} for _ in programs]
    for step in range(WARM_UP + STEPS):
        for program, seconds in zip(programs, taken, strict=True):
            for phase, t in program.step():
                if step >= WARM_UP:
                    seconds[phase].append(t)
    return [{phase: float(np.quantile(t, 0.25)) for phase, t in seconds.items()} for seconds in taken]


def slowness(rows: list[EngineRow]) -> float:
    """How many times as long this machine's host takes as the default one, forward and back, without the engine."""
    dispatched = [row for row in rows if not row.name.endswith("optimizer")]  # an update on a CPU is one kernel
    return sum(row.plain for row in dispatched) / sum(row.expected for row in dispatched)


def fit_engine(rows: list[EngineRow]) -> tuple[dict[str, float], float]:
    """Each cost in modules of the host, and the mean |relative error| of the seconds with the engine."""
    scale = slowness(rows)
    beside = np.array([row.engine - row.plain - scale * (row.recorded - row.expected) for row in rows])
    work = np.array([row.units for row in rows]) * scale * hosts.load().module
    weights = 1 / np.array([row.engine for row in rows])
    found = nnls(work * weights[:, None], np.maximum(beside, 0.0) * weights)[0]
    error = float(np.mean(np.abs(work @ found - beside) * weights))
    return dict(zip(COSTS, map(float, found), strict=True)), error


def write_engine(engine: str, costs: dict[str, float], error: float, rows: list[EngineRow], path: Path) -> None:
    """Write an engine's file, with the measured rows in it."""
    packages = ("deepspeed",) * (engine == DEEPSPEED) + ("torch", "transformers", "peft")
    software = ", ".join(f"{name} {version(name)}" for name in packages)
    lines = [
        "# Written by `perfmodel validate engine`: what the engine's Python costs, in modules of the host.",
        f'name = "{ENGINES[engine]}"',
        f'source = "measured on {cpu_name() or "a CPU"}, {software}, {date.today()}"',
        "",
        "[modules]",
        *(f"{name} = {value:.3g}" for name, value in costs.items()),
        "",
        "[fit]",
        f"error = {error:.3f} # mean |relative error| of the rows",
        f"slowness = {slowness(rows):.3g} # of that host against the default one, without the engine",
        "",
        f"# seconds that {LAYERS[1] - LAYERS[0]} more layers of width {WIDTH} take, without and with the engine",
        "[measured]",
        *(f'"{row.name}" = [{row.plain:.3g}, {row.engine:.3g}]' for row in rows),
    ]
    write_text(path, "\n".join(lines) + "\n")
