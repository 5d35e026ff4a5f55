"""Recorded programs as files: gzipped JSON behind a line that names its form and the digest of what follows.

Ops, shapes and numbers are tables that the parts refer to. What is read is data only, whole, and of this form, or else
`NotAProgram`: a file that was cut short, or comes from elsewhere, is as good as none.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..program.dtypes import ITEMSIZE
from ..program.op import PLAIN, Attrs, Op, Spec
from ..program.part import PHASES, HostWork, Part
from ..program.polynomials import POWERS, Polynomial
from ..program.streams import MAIN, Run
from ..resources import read_packed, written
from ..tape.tensor import Parameter
from .program import LiveBytes, Numbers, Program

FORM = "perfmodel recorded program 3"
MOST_OPS = 10**7  # of a program; a file of bytes could name more than memory holds
FAULTS = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)


class NotAProgram(ValueError):
    """A file that holds no recorded program of this form."""


def read_program(path: Path) -> Program:
    """The program of a file.

    Raises:
        NotAProgram: it is not there, cannot be read, or holds something else.
    """
    try:
        return decoded_value(read_object(path))
    except FAULTS as error:
        raise NotAProgram(f"{path}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """What `write_object` put into a file.

    Raises:
        NotAProgram: it is not there, cannot be read, or holds something else.
    """
    try:
        head, _, body = read_packed(path).partition(b"\n")
        said = json.loads(head)
        if said["form"] != FORM or said["sha256"] != sha256(body).hexdigest():
            raise NotAProgram(f"{path}: another form, or not whole")
        return dict(json.loads(body))
    except FAULTS as error:
        raise NotAProgram(f"{path}: {error}") from None


def write_object(path: Path, values: dict[str, Any]) -> None:
    """Write JSON behind its digest, gzipped, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    body = json.dumps(values, separators=(",", ":")).encode()
    head = json.dumps({"form": FORM, "sha256": sha256(body).hexdigest()}).encode()
    with written(path) as place:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(gzip.compress(head + b"\n" + body, mtime=0))


def encoded(program: Program) -> dict[str, Any]:
    """A program as plain values."""
    tables = _Tables()
    return {
        "first": [tables.part(part) for part in program.first],
        "later": [tables.part(part) for part in program.later],
        "ops": tables.ops,
        "specs": tables.specs,
        "parameters": [
            [p.name, list(p.shape), p.dtype, p.kind, p.requires_grad, p.used, p.count, p.elements]
            for p in program.parameters
        ],
        "live": _live(program.live),
        "buffers": [tables.spec(spec) for spec in program.buffers],
        "traced": program.traced,
        "blocks": program.blocks,
        "at": program.at,
        "made_with": dict(program.made_with),
        "notes": list(program.notes),
    }


class _Tables:
    """Ops and specs by the places that they get in a file."""

    def __init__(self) -> None:
        self.ops: list[Any] = []
        self.specs: list[Any] = []
        self.place_of_op: dict[int, int] = {}
        self.place_of_spec: dict[Spec, int] = {}

    def part(self, part: Part) -> dict[str, Any]:
        """Its ops as (place, times in a row)."""
        runs: list[list[int]] = []
        for op in part.ops:
            place = self.op(op)
            if runs and runs[-1][0] == place:
                runs[-1][1] += 1
            else:
                runs.append([place, 1])
        host = {f.name: n for f in fields(HostWork) if (n := getattr(part.host, f.name))}
        return {"name": part.name, "phase": part.phase, "repeat": part.repeat, "host": host, "ops": runs}

    def op(self, op: Op) -> int:
        if id(op) not in self.place_of_op:
            self.place_of_op[id(op)] = len(self.ops)
            read, written = ([self.spec(s) for s in specs] for specs in (op.inputs, op.outputs))
            nbytes = {"read": _plain(op.bytes_read), "written": _plain(op.bytes_written)}
            entry = {"name": op.name, "in": read, "out": written, **nbytes}
            extra = {
                "view": op.view, "recompute": op.recompute, "owner": "" if op.owner == "base" else op.owner,
                "attrs": {k: v for k, v in op.attrs._asdict().items() if v != getattr(PLAIN, k)},
                "runs": [] if op.runs == MAIN else [op.runs.on, list(op.runs.after)],
            }  # fmt: skip
            self.ops.append(entry | {k: v for k, v in extra.items() if v})
        return self.place_of_op[id(op)]

    def spec(self, spec: Spec) -> int:
        if spec not in self.place_of_spec:
            self.place_of_spec[spec] = len(self.specs)
            self.specs.append([spec.dtype, [_plain(dim) for dim in spec.shape], spec.copies])
        return self.place_of_spec[spec]


def _live(live: LiveBytes) -> dict[str, Any]:
    more = [_halves(more) for more in live.more]
    return {"checked": _halves(live.checked), "least": _halves(live.least), "more": more, "times": list(live.times)}


def _halves(halves: Sequence[Numbers]) -> list[list[Any]]:
    return [[_plain(number) for number in numbers] for numbers in halves]


def _plain(number: Any) -> Any:
    return list(number.coefficients) if isinstance(number, Polynomial) else number


def decoded_value(values: dict[str, Any]) -> Program:
    """The program that `encoded` made plain values of.

    Raises:
        KeyError, IndexError, TypeError, ValueError, AttributeError: they are not of that form.
    """
    specs = [Spec(_dtype(dtype), _numbers(shape), int(copies)) for dtype, shape, copies in values["specs"]]
    ops = [_op(entry, specs) for entry in values["ops"]]
    if sum(int(times) for part in (*values["first"], *values["later"]) for _, times in part["ops"]) > MOST_OPS:
        raise ValueError(f"more than {MOST_OPS:,} ops")
    return Program(
        first=tuple(_part(entry, ops) for entry in values["first"]),
        later=tuple(_part(entry, ops) for entry in values["later"]),
        parameters=tuple(_parameter(*entry) for entry in values["parameters"]),
        live=_live_bytes(values["live"]),
        buffers=tuple(specs[place] for place in values["buffers"]),
        traced=int(values["traced"]),
        blocks=int(values["blocks"]),
        at=None if values["at"] is None else (int(values["at"][0]), int(values["at"][1])),
        made_with={str(k): str(v) for k, v in values["made_with"].items()},
        notes=tuple(map(str, values["notes"])),
    )


def _part(entry: dict[str, Any], ops: list[Op]) -> Part:
    if entry["phase"] not in PHASES:
        raise ValueError(f"phase {entry['phase']!r}")
    host = HostWork(**{str(k): int(n) for k, n in entry["host"].items()})
    found = [op for place, times in entry["ops"] for op in [ops[place]] * times]
    return Part(str(entry["name"]), entry["phase"], int(entry["repeat"]), found, host)


def _op(entry: dict[str, Any], specs: list[Spec]) -> Op:
    attrs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.get("attrs", {}).items()}
    runs = entry.get("runs")
    return Op(
        str(entry["name"]),
        tuple(specs[place] for place in entry["in"]),
        tuple(specs[place] for place in entry["out"]),
        _number(entry["read"]),
        _number(entry["written"]),
        view=bool(entry.get("view", False)),
        attrs=Attrs(**attrs) if attrs else PLAIN,
        owner=str(entry.get("owner", "base")),
        recompute=bool(entry.get("recompute", False)),
        runs=Run(str(runs[0]), tuple(map(str, runs[1]))) if runs else MAIN,
    )


def _parameter(
    name: str, shape: list[int], dtype: str, kind: str, trains: bool, used: bool, count: int, elements: int
) -> Parameter:
    p = Parameter(str(name), tuple(map(int, shape)), _dtype(dtype), kind=str(kind), trainable=bool(trains))
    p.used, p.count, p.elements = bool(used), int(count), int(elements)
    return p


def _dtype(name: str) -> str:
    if name not in ITEMSIZE:
        raise ValueError(f"dtype {name!r}")
    return name


def _number(entry: Any) -> Any:
    """An int, or a polynomial of its coefficients."""
    if isinstance(entry, list):
        if len(entry) != POWERS or not all(isinstance(c, (int, float)) for c in entry):
            raise ValueError(f"{entry} are no coefficients")
        return Polynomial(tuple(entry))
    if not isinstance(entry, int):
        raise TypeError(f"{entry!r} is no number")
    return entry


def _numbers(entries: list[Any]) -> Numbers:
    return tuple(map(_number, entries))


def _live_bytes(live: dict[str, Any]) -> LiveBytes:
    more, times = tuple(map(_pair, live["more"])), tuple(map(int, live["times"]))
    return LiveBytes(_pair(live["checked"]), _pair(live["least"]), more, times)


def _pair(halves: list[list[Any]]) -> tuple[Numbers, Numbers]:
    early, late = map(_numbers, halves)
    return early, late
