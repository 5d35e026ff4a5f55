"""One step under torch.profiler: kernels by name, phase and ATen call, memory, the host's share."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from perfmodel.program.part import PHASES

from . import kineto
from .kineto import Profile
from .loop import Program

MARK = "perfmodel: "  # before the name of a phase in the trace
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below it Kineto reports on stderr when it starts and stops


def trace_step(program: Program) -> Profile:
    """Run one step of a warm program under the profiler and parse its trace."""
    activities = [ProfilerActivity.CPU]
    if program.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=program.device == "cpu") as profiler:
        program.step(lambda phase: record_function(MARK + phase))
        if program.device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return kineto.parse(trace, [MARK + phase for phase in PHASES], transparent=composite)


def composite(name: str) -> bool:
    """Whether an ATen call has no kernel of its own: it is made of other calls (linear, matmul, reshape, …)."""
    space, _, base = name.partition("::")
    if space != "aten" or not hasattr(torch.ops.aten, base):
        return False
    packet = getattr(torch.ops.aten, base)
    return any(
        torch._C._dispatch_has_kernel_for_dispatch_key(getattr(packet, o)._name, "CompositeImplicitAutograd")
        for o in packet.overloads()
    )


def summary(found: Profile, device: str, step_seconds: float) -> dict[str, Any]:
    """The profile as plain values.

    Args:
        step_seconds: median of the steps that ran without the profiler.

    Returns:
        `kernels`: phase -> device kernels, fills and copies within the device (CUDA) or ATen calls (CPU);
        `kernel_seconds`: phase -> seconds in them, each call without those inside it; `by_name` and, on CUDA,
        `by_call`: phase -> name -> [number, seconds]; `copies`: number and bytes of copies between host and device;
        `host_bound_share`: share of the step in which the device waits (CUDA: the unprofiled step less busy time; CPU:
        time outside of ATen calls while profiled).
    """
    if device == "cuda":
        kernels = [w for w in found.work if not w.crosses_bus]
        rows = [(w.phase, w.name, w.seconds) for w in kernels]
        share = max(0.0, 1.0 - found.busy / step_seconds)
    else:
        rows = [(c.phase, c.name, c.self_seconds) for c in found.calls]
        inside = sum(c.seconds for c in found.calls if c.outermost and c.phase != kineto.NO_PHASE)
        share = max(0.0, 1.0 - inside / sum(found.phases.values()))
    by_name = _table(rows)
    out: dict[str, Any] = {
        "kernels": {phase: sum(n for n, _ in names.values()) for phase, names in by_name.items()},
        "kernel_seconds": {phase: sum(s for _, s in names.values()) for phase, names in by_name.items()},
        "by_name": by_name,
        "host_bound_share": share,
        "profiled_seconds": {_plain(phase): seconds for phase, seconds in found.phases.items()},
    }
    if device == "cuda":
        out["by_call"] = _table((w.phase, w.call, w.seconds) for w in kernels)
        copies = [w for w in found.work if w.crosses_bus]
        out["copies"] = {"number": len(copies), "bytes": sum(w.nbytes for w in copies)}
        out["busy_seconds"], out["unlaunched"] = found.busy, found.unlaunched
    return out


def _table(rows: Iterable[tuple[str, str, float]]) -> dict[str, dict[str, tuple[int, float]]]:
    """(phase, name, seconds) rows as phase -> name -> (number, seconds)."""
    table: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    for phase, name, seconds in rows:
        number, before = table[_plain(phase)].get(name, (0, 0.0))
        table[_plain(phase)][name] = (number + 1, before + seconds)
    return {phase: dict(names) for phase, names in table.items()}


def _plain(phase: str) -> str:
    return phase.removeprefix(MARK)
