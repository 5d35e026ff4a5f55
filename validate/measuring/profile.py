"""One step under torch.profiler: kernels by name, phase and ATen call, memory, the host's share."""

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from perfmodel.program.part import PHASES

from . import kineto
from .kineto import Profile
from .loop import TrainingLoop

MARK = "perfmodel: "  # before the name of a phase in the trace
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # below it Kineto reports on stderr when it starts and stops


def profile_step(program: TrainingLoop) -> Profile:
    """Run one step of a warm program under the profiler and parse its trace."""
    activities, on_gpu = [ProfilerActivity.CPU], program.device == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()  # or what the step before left in flight would be in the trace
    named = _ExperimentalConfig(capture_overload_names=on_gpu)
    with profile(activities=activities, profile_memory=not on_gpu, experimental_config=named) as profiler:
        program.step(lambda phase: record_function(MARK + phase))
        if on_gpu:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    return kineto.parse_trace(trace, [MARK + phase for phase in PHASES], transparent=composite)


@cache
def composite(name: str) -> bool:
    """Whether an operator has no kernel of its own: it is made of other calls (linear, matmul, reshape, …).

    With its overload a name is told apart from its like: `where.ScalarOther` is made of others, `where.self` is not.
    Overloads that only TorchScript knows have no place in the dispatcher; those that write into `out` are not asked,
    as many are made of the others.
    """
    space, _, base = name.partition("::")
    base, _, overload = base.partition(".")
    packet = getattr(getattr(torch.ops, space, None), base, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    if overload:
        return torch._C._dispatch_has_kernel(name) and _made_of_others(name)
    overloads = packet.overloads()  # type: ignore[no-untyped-call]
    schemas = [torch._C._get_schema(name, "" if o == "default" else o) for o in overloads]
    names = [
        f"{s.name}.{s.overload_name}".rstrip(".") for s in schemas if not any(a.is_out for a in s.arguments)
    ]  # fmt: skip
    known = [n for n in names if torch._C._dispatch_has_kernel(n)]
    return bool(known) and all(map(_made_of_others, known))


def _made_of_others(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def plain_profile(found: Profile, device: str, step_seconds: float) -> dict[str, Any]:
    """The profile as plain values.

    Args:
        step_seconds: median of the steps that ran without the profiler.

    Returns:
        `kernels`: phase -> device kernels, fills and copies within the device (CUDA) or operators called (CPU);
        `kernel_seconds`: phase -> seconds in them, each call without those inside it; `by_name` and, on CUDA,
        `by_call`: phase -> name -> [number, seconds]; `copies`: number and bytes of copies between host and device;
        `helpers`: number and seconds of what only helps a call's kernel, which is in the seconds but not in the
        numbers (see `kineto`); `host_bound_share`: share of the step in which the device waits (CUDA: the unprofiled
        step less busy time; CPU: time outside of operators while profiled); where ranks exchange something
        `communication_share`: that of the step in which a collective is under way.
    """
    whole = step_seconds if device == "cuda" else sum(found.phases.values()) or step_seconds
    if device == "cuda":
        inside = [w for w in found.work if not w.crosses_bus]
        rows = [(w.phase, w.name, int(w.is_kernel), w.seconds) for w in inside]
        share = max(0.0, 1.0 - found.busy / whole)
    else:
        rows = [(c.phase, c.name, 1, c.self_seconds) for c in found.calls]
        covered = sum(c.seconds for c in found.calls if c.outermost and c.phase != kineto.NO_PHASE)
        share = max(0.0, 1.0 - covered / whole)
    by_name = _table(rows)
    out: dict[str, Any] = {
        "kernels": {phase: sum(n for n, _ in names.values()) for phase, names in by_name.items()},
        "kernel_seconds": {phase: sum(s for _, s in names.values()) for phase, names in by_name.items()},
        "by_name": by_name,
        "host_bound_share": share,
        "profiled_seconds": {_plain(phase): seconds for phase, seconds in found.phases.items()},
    }
    if found.exchanging:
        out["communication_share"] = min(1.0, found.exchanging / whole)
    if device == "cuda":
        copies, helpers = [w for w in found.work if w.crosses_bus], [w for w in found.work if w.helps]
        out["by_call"] = _table((w.phase, w.call, int(w.is_kernel), w.seconds) for w in inside)
        out["copies"] = {"number": len(copies), "bytes": sum(w.nbytes for w in copies)}
        out["helpers"] = {"number": len(helpers), "seconds": sum(w.seconds for w in helpers)}
        out["busy_seconds"], out["unlaunched"] = found.busy, found.unlaunched
    return out


def _table(rows: Iterable[tuple[str, str, int, float]]) -> dict[str, dict[str, tuple[int, float]]]:
    """(phase, name, number, seconds) rows as phase -> name -> (number, seconds)."""
    table: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
    for phase, name, number, seconds in rows:
        before, so_far = table[_plain(phase)].get(name, (0, 0.0))
        table[_plain(phase)][name] = before + number, so_far + seconds
    return {phase: dict(names) for phase, names in table.items()}


def _plain(phase: str) -> str:
    return phase.removeprefix(MARK)
