"""What `perfmodel validate profile` prints of a file that a profiler of PyTorch wrote."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfmodel import units
from perfmodel.errors import UserError, nearest
from perfmodel.report.plain import print_json, show, table

from . import kineto, traces
from .kineto import Profile
from .profile import composite, plain_profile

BROKEN = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
Facts = Any
Table = Mapping[str, Mapping[str, tuple[int, float]]]  # phase -> name -> (number, seconds)


def show_profile(path: Path, phases: Sequence[str], top: int, *, as_json: bool) -> None:
    """Print a Chrome trace, an execution trace or a table of averages.

    Args:
        phases: annotations that mark phases; the outermost ones if none is named.
        top: how many calls and kernels to list.

    Raises:
        UserError: the file is none of them.
    """
    if path.suffix == ".csv":
        facts, text = _averages(traces.averages(path), top)
    else:
        trace = traces.read_trace(path)
        if not {"nodes", "traceEvents"} & set(trace):
            raise UserError(f"{path}: neither a Chrome trace (traceEvents) nor an execution trace (nodes)")
        try:
            facts, text = _nodes(trace, top) if "nodes" in trace else _chrome(trace, phases, top)
        except UserError:
            raise
        except BROKEN as error:
            raise UserError(f"{path}: not as PyTorch writes a trace ({type(error).__name__}: {error})") from None
    print_json(facts) if as_json else show(text)


def _chrome(trace: dict[str, Any], phases: Sequence[str], top: int) -> tuple[Facts, str]:
    known = traces.all_annotations(trace)
    for phase in phases:
        if phase not in known:
            has = nearest(phase, known) if known else "it has none"
            raise UserError(f"no annotation {phase!r} is in the trace: {has}")
    found = kineto.parse_trace(trace, phases or traces.annotations(trace), transparent=composite)
    if not (found.work or found.calls or found.unlaunched):
        raise UserError("the trace holds no call and no work of a device")
    device = "cuda" if found.work else "cpu"
    seconds = found.span if found.work else sum(c.seconds for c in found.calls if c.outermost)
    facts = plain_profile(found, device, seconds or 1.0)
    facts["launches"] = found.launches
    rows = [
        [phase, units.seconds(facts["profiled_seconds"].get(phase, 0.0)), f"{n:,}", units.seconds(s)]
        for (phase, n), s in zip(facts["kernels"].items(), facts["kernel_seconds"].values(), strict=True)
    ]
    parts = [table(("phase", "host", "kernels" if found.work else "calls", "time"), rows)]
    if found.work:
        parts.append(_device(found, facts))
        launches = [[k, f"{n:,}", units.seconds(s)] for k, (n, s) in sorted(found.launches.items())]
        parts.append(table(("launches", "number", "host"), launches))
        parts.append(table(("call", "kernels", "time", ""), _rows(facts["by_call"], top)))
    elif found.unlaunched:
        parts.append(
            f"{found.unlaunched:,} works of the device without a launch: the trace holds no calls of CUDA's runtime"
        )
    parts.append(table(("kernel" if found.work else "call", "number", "time", ""), _rows(facts["by_name"], top)))
    return facts, "\n\n".join(parts)


def _device(found: Profile, facts: Facts) -> str:
    helpers, copies = facts["helpers"], facts["copies"]
    return (
        f"device busy {units.seconds(found.busy)} of {units.seconds(found.span)}; "
        f"{helpers['number']:,} helpers inside calls ({units.seconds(helpers['seconds'])}), "
        f"{copies['number']:,} copies over the bus ({units.nbytes(copies['bytes'])}), "
        f"{found.unlaunched:,} works without a launch"
    )


def _rows(found: Table, top: int) -> list[list[str]]:
    """The names that take longest, all phases taken together, with their share."""
    sums: dict[str, tuple[int, float]] = {}
    for name, (number, seconds) in (row for names in found.values() for row in names.items()):
        before, so_far = sums.get(name, (0, 0.0))
        sums[name] = before + number, so_far + seconds
    total = sum(s for _, s in sums.values())
    longest = sorted(sums.items(), key=lambda row: -row[1][1])[:top]
    return [
        [(name or "(no call)")[:60], f"{n:,}", units.seconds(s), units.percent(s / total if total else None, 1)]
        for name, (n, s) in longest
    ]


def _nodes(trace: dict[str, Any], top: int) -> tuple[Facts, str]:
    found = {phase: dict(names.most_common()) for phase, names in traces.calls(trace, composite).items()}
    rows = [[phase, name, f"{n:,}"] for phase, names in found.items() for name, n in list(names.items())[:top]]
    return found, table(("phase", "call", "number"), rows, left=(0, 1))


def _averages(found: list[traces.Average], top: int) -> tuple[Facts, str]:
    longest = sorted(found, key=lambda a: -a.device_self)
    rows = [[a.name[:60], f"{a.calls:,}", units.seconds(a.cpu_total), units.seconds(a.device_self)] for a in longest]
    return [vars(a) for a in longest], table(("name", "calls", "host", "device"), rows[:top])
