"""One visit of a cell: build it, time its steps, then count calls, profile and weigh one more step each."""

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from perfmodel.program.part import PHASES
from perfmodel.tracing.programs.choose import out_of_memory
from perfmodel.tracing.trace import CallRecorder

from ..oracle.parallel import RankRecorder
from . import profile
from .cells import Cell
from .clocks import Clock, clock_for
from .loop import TrainingLoop
from .names import unified
from .team import SETTLED, DelayAfterCollective, Team, messages


def visit(
    cell: Cell, device: str, *, threads: int, warm_up: int, steps: int, whole: bool = True, team: Team | None = None
) -> dict[str, Any]:
    """Measure a cell in this process; a failure becomes a record too.

    Args:
        threads: of the CPU, which must be those of torch already.
        whole: also count dispatches and profile (once a cell is enough); times and memory are always taken.
        team: the processes that share the step; then messages are counted beside dispatches.
    """
    try:
        return {"status": "ok", **_measure(cell, device, threads, warm_up, steps, whole, team)}
    except Exception as error:  # of torch, transformers or peft, or a package that is missing
        text = " ".join(str(error).split())[:300] or type(error).__name__
        return {"status": "oom" if out_of_memory(error) else "error", "message": text}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _measure(
    cell: Cell, device: str, threads: int, warm_up: int, steps: int, whole: bool, team: Team | None
) -> dict[str, Any]:
    program = TrainingLoop(cell, device, team)
    clock = clock_for(device, alone=threads == 1 and team is None)
    for _ in range(max(warm_up, SETTLED) if team else warm_up):
        program.step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rows = [_timed(program, clock) for _ in range(steps)]
    seconds = {name: [row[name] for row in rows] for name in rows[0]}
    record: dict[str, Any] = {
        "clock": clock.kind,
        "seconds": seconds,
        "median_s": {name: median(values) for name, values in seconds.items()},
        "spread": relative_range(seconds["step"]),
        "params": {
            "total": sum(p.numel() for p in program.model.parameters()),
            "trainable": sum(p.numel() for p in program.trained),
        },
    }
    if device == "cuda":
        peak, reserved, kept = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), workspaces()
        record["memory"] = {
            "peak": peak - kept, "reserved": reserved, "held": program.held_bytes(), "workspaces": kept,
        }  # fmt: skip
    if whole and cell.setup.compile == "none":  # a mode that sees every call would turn the compiled program off
        recorder = RankRecorder() if team else CallRecorder()
        record["dispatches"], record["calls"] = dispatches(program, recorder)
        if isinstance(recorder, RankRecorder):
            record["messages"] = messages(recorder.collectives)
    if whole or device == "cpu":
        found = profile.profile_step(program)
        if device == "cpu":
            held = program.held_bytes()
            record["memory"] = {"peak": held + (paused_peak(program) if team else found.memory_peak), "held": held}
        if whole:
            record["profile"] = profile.plain_profile(found, device, record["median_s"]["step"])
    return record


def workspaces() -> int:
    """Bytes of cuBLAS's workspaces, which lie in PyTorch's allocator for as long as a handle and a stream do.

    They are given back: up to 32 MiB for each thread that computes, and none of a step's own.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # not in a PyTorch without CUDA
    before = torch.cuda.memory_allocated()
    if clear is not None:
        clear()
    return before - torch.cuda.memory_allocated()


def _timed(program: TrainingLoop, clock: Clock) -> dict[str, float]:
    @contextmanager
    def lap(phase: str) -> Iterator[None]:
        yield
        clock.lap(phase)

    clock.start()
    program.step(lap)
    return clock.finish()


def relative_range(values: list[float]) -> float:
    """Highest less lowest over the median."""
    return (max(values) - min(values)) / median(values)


def paused_peak(program: TrainingLoop) -> int:
    """What a step takes at most of the memory, whenever gloo's threads drop what they sent."""
    with DelayAfterCollective():  # type: ignore[no-untyped-call]
        return profile.profile_step(program).memory_peak


def dispatches(program: TrainingLoop, recorder: CallRecorder) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Non-view ATen calls of one real step: by phase, and by phase and name (see `names.unified`)."""
    recorder.recording = True
    program.step(recorder.observe)
    calls: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
    for phase, found in recorder.trace.calls.items():
        for (name, _, _), number in found.items():
            calls[phase][unified(name)] += number
    return {p: sum(c.values()) for p, c in calls.items()}, {p: dict(c) for p, c in calls.items()}
