"""Profiles in files, one's own or published: Chrome traces, execution traces (Chakra), tables of `key_averages`."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from perfmodel.program.part import PHASES
from perfmodel.resources import mapping, parsed, read_packed, read_rows

from .names import is_operator

LARGEST_TRACE = 256 * 2**20  # bytes of JSON, a dozen steps of a large model; in memory they take ten times as much
FORWARD, BACKWARD, OPTIMIZER = PHASES


def read_trace(path: Path) -> dict[str, Any]:
    """The object in a JSON file, compressed by gzip or not.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    text = read_packed(path, LARGEST_TRACE).decode(errors="replace")
    return mapping(parsed(text, json.loads, "JSON", str(path)), str(path))


def annotations(trace: dict[str, Any]) -> list[str]:
    """What marks the phases of a Chrome trace: its outermost annotations; the profiler's steps if there is no other."""
    spans = [
        (float(e["ts"]), -float(e["dur"]), str(e["name"]))
        for e in trace["traceEvents"]
        if e.get("cat") == "user_annotation"
    ]
    steps = [s for s in spans if s[2].startswith("ProfilerStep#")]
    found, until = [], float("-inf")
    for start, minus, name in sorted([s for s in spans if s not in steps] or steps):
        if start >= until:
            found.append(name)
            until = start - minus
    return list(dict.fromkeys(found))


def all_annotations(trace: dict[str, Any]) -> list[str]:
    """All annotations of a Chrome trace, in the order of their first."""
    return list(dict.fromkeys(str(e["name"]) for e in trace["traceEvents"] if e.get("cat") == "user_annotation"))


def calls(trace: dict[str, Any], transparent: Callable[[str], bool]) -> dict[str, Counter[str]]:
    """Operators of an execution trace by phase and name: those that the dispatcher sees below autograd.

    A node names its parent; what autograd's engine runs is backward, what lies in an optimizer's annotation is its.

    Args:
        transparent: whether an operator only calls others.
    """
    nodes = {node["id"]: node for node in trace["nodes"]}

    def around(key: int) -> str | None:
        parent = nodes[key]["ctrl_deps"]
        return inside(parent) if parent in nodes and parent != key else FORWARD

    @cache
    def inside(key: int) -> str | None:
        """The phase of what lies in a node; None in an operator, whose calls are its own matter."""
        name, phase = str(nodes[key]["name"]), around(key)
        if phase is None or (is_operator(name) and not transparent(name)):
            return None
        return OPTIMIZER if name.startswith("Optimizer.") else BACKWARD if name.startswith("autograd::") else phase

    found: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    for key, node in nodes.items():
        phase = around(key)
        if phase is not None and inside(key) is None:
            found[phase][str(node["name"])] += 1
    return found


@dataclass(frozen=True)
class Average:
    """A row of `key_averages().table()`: an operator, a node of autograd, or a kernel, in seconds of all its calls."""

    name: str
    calls: int
    cpu_total: float
    device_self: float

    @property
    def is_kernel(self) -> bool:
        """Whether the row is work of the device: nothing on the host bears its name."""
        return self.cpu_total == 0 and not is_operator(self.name)


def averages(path: Path) -> list[Average]:
    """The rows of a CSV file with columns name, calls, {self_cpu, cpu_total, self_cuda, cuda_total}_us; sums left out.

    Raises:
        UserError: it cannot be read, or a row has not these columns.
    """

    def row(fields: dict[str, str]) -> Average | None:
        if not fields["calls"]:
            return None
        columns = ("cpu_total_us", "self_cuda_us")
        return Average(fields["name"], int(fields["calls"]), *(float(fields[c]) * 1e-6 for c in columns))

    return [found for found in read_rows(path, row) if found]
