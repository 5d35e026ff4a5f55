"""What the model predicts before anything is measured: how long a step will take, whether it fits, where LoRA stops to
pay. It guides the campaign, and no figure of it enters a fit or a check.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from math import exp, log
from typing import Any

from perfmodel import architectures, methods
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.prediction.predict import predict
from perfmodel.questions.crossover import MethodPair, crossovers

from ..accuracy import BASELINE
from ..checking.machine import name_of
from ..measuring.cells import Cell

USUAL = {"cuda": "a100-80gb-sxm", "cpu": "cpu-xeon-2.5ghz-1t"}  # the guide on a machine that no bundled profile names
POINTS = (1.0, 0.5, 2.0)  # of the length at which the verdict turns; the first tells most
ROUND_TO = 16  # tokens


def guide(environment: dict[str, Any]) -> DeviceProfile:
    """The bundled profile of the device, or a usual one of its kind."""
    known = profile.bundled_by_makers_name(name_of(environment))
    kind = environment["device"]
    return known if known and known.kind == kind else profile.load(USUAL[kind])


def memory_of(environment: dict[str, Any]) -> float:
    """Bytes of memory that steps may take."""
    if environment["device"] == "cuda":
        gpu = environment["gpu"]
        return float(min(gpu["total_memory"], gpu.get("free_memory", gpu["total_memory"])))
    return float(environment["host"]["memory_bytes"])


def expected(cell: Cell, on: DeviceProfile) -> tuple[float, float]:
    """Predicted seconds of a step, and the least bytes that it needs at its peak.

    Raises:
        UserError: the tape has no such program.
    """
    p = predict(cell.config, cell.method, cell.setup, on, host=hosts.host_of("default", on))
    return float(p.time.phases["total"]), float(p.memory.peak)


def around(cells: Iterable[Cell], on: DeviceProfile, longest: int) -> Iterator[Cell]:
    """The cells of every group at sequence lengths around the break-even of its last method with full fine-tuning.

    Where no length up to the longest turns the verdict, the one at which the two come closest is taken alone.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.group, []).append(cell)
    for members in groups.values():
        for seq in lengths(members[-1], on, longest):
            yield from (replace(cell, setup=replace(cell.setup, seq=seq)) for cell in members)


def lengths(cell: Cell, on: DeviceProfile, longest: int) -> list[int]:
    """Around where a cell's method takes as long as full fine-tuning: the length itself, its half, its double.

    Raises:
        UserError: the method is full fine-tuning itself, or does not fit the model.
    """
    architecture = architectures.from_config(cell.config)
    if cell.method == BASELINE:
        raise UserError(f"a stage around the break-even ends with another method than {BASELINE}")
    full, other = (methods.parse(text).bind(architecture) for text in (BASELINE, cell.method))
    pair = MethodPair(architecture, full, other, replace(cell.setup, seq=longest), on, hosts.host_of("default", on))
    found = crossovers(pair, ("seq",))[0]
    rows = zip(found.values, found.ratio, found.fits_a, found.fits_b, strict=True)
    points = [(log(v), log(r)) for v, r, *fit in rows if v <= longest and all(fit)]
    if not points:
        return []
    crossed = [(a, b) for a, b in pairwise(points) if a[1] * b[1] <= 0 and a[1] != b[1]]
    if not crossed:
        return [_rounded(exp(min(points, key=lambda p: abs(p[1]))[0]), longest)]
    (x0, y0), (x1, y1) = crossed[-1]
    turn = exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    return list(dict.fromkeys(_rounded(turn * factor, longest) for factor in POINTS))


def _rounded(seq: float, longest: int) -> int:
    return min(longest, max(ROUND_TO, round(seq / ROUND_TO) * ROUND_TO))
