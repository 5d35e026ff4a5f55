"""What is written: each kind of file with a program that writes it again and again, and what must be true of it.

A program goes on where it was, as the real ones do, and tells how far it is; whatever happened to it, the file then
holds what it had told, at most one write more, and each entry once.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.partitions import Columns, Partitions, Workers
from perfmodel.questions.sweeps import sweep
from perfmodel.recording import files
from perfmodel.report.files import rows_to
from perfmodel.resources import DATA, write_text
from validate.campaign.ledger import Ledger
from validate.measuring.records import append_records, only_writer, read_records

Tell = Callable[[int], None]  # how many writes are done
WRITES = 6
DEVICE = (DATA / "devices" / "t4.toml").read_text(encoding="utf-8")
PADDING = random.Random(0).randbytes(12_000).hex()  # so that a file has many places to be cut at, a gzipped one too


class TornError(Exception):
    """A file that cannot be read, or holds something that nobody wrote."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        write: writes up to `WRITES` versions or entries into a folder, from where it is, and tells after each.
        held: the versions or entries that the folder holds, in order.
        adds: whether a write adds an entry; else it replaces the version before.
    """

    name: str
    write: Callable[[Path, Tell], None]
    held: Callable[[Path], list[int]]
    adds: bool = False


def _next(held: list[int]) -> range:
    return range(held[-1] + 1 if held else 0, WRITES)


def replaced(name: str, write: Callable[[Path, int], None], read: Callable[[Path], int]) -> Target:
    """A file of one version, under `name` in its folder."""

    def held(folder: Path) -> list[int]:
        return [read(folder / name)] if (folder / name).exists() else []

    def run(folder: Path, tell: Tell) -> None:
        for version in _next(held(folder)):
            write(folder / name, version)
            tell(version + 1)

    return Target(name, run, held)


def _record(unit: int) -> dict[str, object]:
    return {"kind": "unmeasured", "unit": str(unit), "status": "error", "message": PADDING[:2000]}


def _units(folder: Path) -> list[int]:
    path = folder / "records.jsonl"
    try:
        return [int(record["unit"]) for record in read_records(path)] if path.exists() else []
    except UserError as error:
        raise TornError(str(error)) from None


def _measure(folder: Path, tell: Tell) -> None:
    """As `validate measure` keeps its records."""
    path = folder / "records.jsonl"
    with only_writer(path):
        for unit in _next(_units(folder)):
            append_records(path, _record(unit))
            tell(unit + 1)


def _campaign(folder: Path, tell: Tell) -> None:
    """As a campaign does."""
    path = folder / "records.jsonl"
    with only_writer(path):
        ledger = Ledger(path)
        for unit in _next(sorted(int(unit) for unit in ledger.done)):
            ledger.keep(_record(unit), now=True)
            tell(unit + 1)


def _write_device(path: Path, version: int) -> None:
    write_text(path, DEVICE.replace('name = "', f'name = "{version} ', 1))


def _read_device(path: Path) -> int:
    try:
        return int(profile.load(path).name.split()[0])
    except UserError as error:
        raise TornError(str(error)) from None


def _read_program(path: Path) -> int:
    try:
        return int(files.read_object(path)["version"])
    except files.NotAProgram as error:
        raise TornError(str(error)) from None


def _write_sweep(path: Path, version: int) -> None:
    with rows_to(path) as write:
        for low in (16, 256):  # in blocks, as the command writes
            seqs = range(low, low + 240, 16)
            write(sweep("gpt2", ["full", "lora"], device="l40s", batch=[version + 1], seq=seqs).table())


def _read_sweep(path: Path) -> int:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TornError(str(error)) from None
    if len(rows) != 60 or {row["batch"] for row in rows} != {rows[0]["batch"]}:
        raise TornError(f"{len(rows)} rows")
    return int(rows[0]["batch"]) - 1


def _parts(folder: Path) -> list[int]:
    try:
        kept = Partitions(folder / "parts", {}, Workers())
        return [int(kept.columns(number)["n"][0]) for number in sorted(kept.done)]
    except UserError as error:
        raise TornError(str(error)) from None


def _part(number: int) -> list[Columns]:
    return [{"n": np.array([number]), "x": np.array([PADDING])}]


def _partitions(folder: Path, tell: Tell) -> None:
    """As `sweep --partitions` does."""
    kept = Partitions(folder / "parts", {}, Workers())
    kept.fill((partial(_part, number) for number in range(WRITES)), lambda number: tell(number + 1))


TARGETS = (
    Target("records", _measure, _units, adds=True),
    Target("campaign", _campaign, _units, adds=True),
    *([Target("partitions", _partitions, _parts, adds=True)] if find_spec("pyarrow") else []),
    replaced("device.toml", _write_device, _read_device),
    replaced("program.json.gz", lambda path, n: files.write_object(path, {"version": n, "x": PADDING}), _read_program),
    replaced("sweep.json", _write_sweep, _read_sweep),
)
