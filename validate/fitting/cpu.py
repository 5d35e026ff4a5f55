"""Fits the price model of a CPU to microbenchmark records (`validate.microbench`).

Every model is a sum of terms, so each block is a bounded linear least-squares fit of relative errors, reweighted a few
times towards their absolute value: a disturbed row counts little. A third of the rows is left out and judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear, minimize

from perfmodel.devices.cpu import (
    GRAIN,
    CpuAttentionParameters,
    CpuGemmParameters,
    CpuStreamParameters,
    aliased,
    attention_work,
    cpu_attention_time,
    cpu_gemm_time,
    regime,
    stream_time,
)
from perfmodel.devices.cpu_work import KINDS, LIKE, REGIMES, STATE
from perfmodel.devices.hardware import ITEMSIZE, Hardware
from perfmodel.errors import UserError
from perfmodel.program.dims import Array

from .cpu_ops import Amounts, passes
from .judging import Fit, FitCaveats, FitErrors, fold

PACKED_AS = {  # regimes that differ in the rate of their products alone
    "nn_aliased": "nn_few", "tn_narrow": "tn", "nn_narrow": "nn", "nn_few_narrow": "nn_few", "nt_narrow": "nt",
    "nt_aliased_narrow": "nt_aliased",
}  # fmt: skip
NEEDED_ROWS = 6  # products that tell the parameters of a layout
NEEDED_MORE = 3  # those that tell in what else a regime differs from it
NEEDED_ATTENTION = 12
BEYOND = 1.3  # no product runs at so many times the best rate that was measured, packing included
ROUNDS, SCALE = 20, 0.02  # reweighting: rounds, and the relative error below which it stays quadratic
PULL = 2e-3  # of the squared logarithm from where a search begins: what the rows do not tell stays there
NOTHING = 1e-4  # a term that never makes up more of a row is none
SOURCE = "perfmodel calibrate on this machine"


@dataclass(frozen=True)
class CpuRow:
    """A microbenchmark: its case, median seconds of a call (steps are judged by theirs), and those of its dispatch."""

    case: Mapping[str, Any]
    seconds: float
    dispatch: float

    @property
    def sizes(self) -> Mapping[str, int]:
        """Dims by name."""
        sizes: Mapping[str, int] = self.case["sizes"]
        return sizes

    @property
    def left_out(self) -> bool:
        """Whether no fit sees it; the smallest calls always count, for they alone tell a floor."""
        first = self.case["op"], self.case["layout"], self.case["backward"]
        return self.sizes.get("rows") != 1 and fold(*first, *self.sizes.values()) == 0


def cpu_rows(records: Sequence[Mapping[str, Any]]) -> list[CpuRow]:
    """Rows of microbenchmark records.

    Raises:
        UserError: a record that no microbenchmark wrote, or none that times a dispatch.
    """
    found = [r for r in records if r.get("kind") == "microbench"]
    try:
        timed = [(r["case"], float(r["seconds"]["median"])) for r in found]
        dispatch = min(float(r["seconds"]["least"]) for r in found if r["case"]["op"] == "dispatch")
    except (KeyError, TypeError, ValueError):
        raise UserError("these records hold no microbenchmarks of a calibration (kind, case, seconds)") from None
    return [CpuRow(case, max(s, 1e-9), dispatch) for case, s in timed]


def least_relative(columns: Sequence[Array], seconds: Array, low: Sequence[float], known: Array | float = 0.0) -> Array:
    """Coefficients from `low` up that price the rows, `known` seconds of each included, with least relative error."""
    x = np.stack(columns, axis=1) / seconds[:, None]
    target = 1.0 - known / seconds
    lower = np.asarray(low, np.float64)
    scale = 1.0 / np.maximum(np.abs(x).max(axis=0), 1e-300)  # columns of one size: seconds and FLOPs are far apart
    weight = np.ones(len(seconds))
    solution = lower
    for _ in range(ROUNDS):
        found = lsq_linear(x * scale * weight[:, None], target * weight, bounds=(lower / scale, np.inf))
        solution = np.maximum(found.x * scale, lower)
        weight = 1.0 / np.sqrt(np.abs(x @ solution - target) + SCALE)
    return np.where(np.abs(x * solution).max(axis=0) < NOTHING, lower, solution)


def _fit(
    parameters: Any, found: Sequence[CpuRow], predict: Callable[[CpuRow], float], plain: Callable[[CpuRow], float],
    software: str, caveats: FitCaveats,
) -> Fit:  # fmt: skip
    out = [r for r in found if r.left_out] or list(found)
    errors = FitErrors.of(
        np.array([r.dispatch + predict(r) for r in out]),
        np.array([plain(r) for r in out]),
        np.array([r.seconds for r in out]),
    )
    return Fit(parameters, SOURCE, software, len(found) - len(out), len(out), errors, caveats=caveats)


def _enough(found: Sequence[CpuRow], least: int, what: str) -> None:
    if len([r for r in found if not r.left_out]) < least:
        raise UserError(f"only {len(found)} microbenchmarks of {what}, too few to fit: give the calibration more time")


def _seconds_of(found: Sequence[CpuRow]) -> tuple[Array, Array]:
    """Measured seconds, and those of them that are dispatch."""
    return np.array([r.seconds for r in found]), np.array([r.dispatch for r in found])


def fit_gemms(all_rows: Sequence[CpuRow], dtype: str, hardware: Hardware, software: str) -> Fit:
    """Products of a dtype: a floor, and by regime the FLOPs and the passes over the three operands."""
    found = [r for r in all_rows if r.case["block"] == "gemm" and r.case["dtype"] == dtype]
    used = [r for r in found if not r.left_out]
    _enough(found, 20, f"{dtype} products")
    t, dispatch = _seconds_of(used)
    m, n, k = (np.array([r.sizes[d] for r in used], np.float64) for d in "mnk")
    regimes = [regime(r.sizes["m"], r.sizes["n"], r.case["layout"], dtype) for r in used]
    known = [name for name in REGIMES if regimes.count(name) >= (NEEDED_MORE if name in LIKE else NEEDED_ROWS)]
    terms = {name: _terms(name, known) for name in REGIMES}
    keys = sorted({(i, key) for name in known for i, key in enumerate(terms[name])})
    sizes = m * n * k, m * k, k * n, m * n
    columns = [sizes[i] * np.array([terms[r][i] == key for r in regimes]) for i, key in keys]
    low = [0.0 if i else 2.0 / (BEYOND * hardware.peak(dtype)) for i, _ in keys]
    floor, *found_terms = least_relative([np.ones(len(t)), *columns], t, [0.0, *low], dispatch)
    value = dict(zip(keys, found_terms, strict=True))
    by_regime = {name: [value[i, key] for i, key in enumerate(terms[name])] for name in REGIMES}
    pass_ = ITEMSIZE[dtype] / hardware.memory_bandwidth
    p = CpuGemmParameters(
        float(floor),
        {name: float(2.0 / (x[0] * hardware.peak(dtype))) for name, x in by_regime.items()},
        *({name: float(x[i] / pass_) for name, x in by_regime.items()} for i in (1, 2, 3)),
    )

    def predict(r: CpuRow) -> float:
        s = r.sizes
        layout = r.case["layout"]
        return float(cpu_gemm_time(s["m"], s["n"], s["k"], hardware=hardware, parameters=p, dtype=dtype, layout=layout))

    def plain(r: CpuRow) -> float:
        x, y, z = (r.sizes[d] for d in "mnk")
        moved = ITEMSIZE[dtype] * (x * z + z * y + x * y) / hardware.memory_bandwidth
        return max(2.0 * x * y * z / hardware.peak(dtype), moved)

    caveats = FitCaveats(
        tuple(name for name in REGIMES if name not in known), _zeros(p, "a_passes", "b_passes", "c_passes")
    )
    return _fit(p, found, predict, plain, software, caveats)


def _terms(name: str, known: Sequence[str]) -> tuple[str, str, str, str]:
    """Whose FLOPs and passes over the three operands a regime has; what was not measured goes as the like one does."""
    while name not in known:
        name = LIKE.get(name, known[0])
    a = PACKED_AS.get(name, name)
    rest = "nt" if a == "nt_aliased" else a  # reading A is all that is slow there
    rate = "nt" if name == "nt_aliased" else name
    return rate, a, rest, rest


def _zeros(parameters: Any, *names: str) -> tuple[str, ...]:
    """The parameters, or entries of tables of them, that went as low as they may."""
    found: list[str] = []
    for name in names:
        value = getattr(parameters, name)
        entries = {f"{name}.{key}": x for key, x in value.items()} if isinstance(value, Mapping) else {name: value}
        found += [key for key, x in entries.items() if x == 0.0]
    return tuple(found)


def tells_attention(all_rows: Sequence[CpuRow], dtype: str) -> bool:
    """Whether enough calls of attention in a dtype were measured, in each direction."""
    used = [r.case["backward"] for r in _of_attention(all_rows, dtype) if not r.left_out]
    return min(used.count(True), used.count(False)) >= NEEDED_ATTENTION // 2


def fit_attention_kernel(all_rows: Sequence[CpuRow], dtype: str, hardware: Hardware, software: str) -> Fit:
    """The flash kernel of a dtype: a floor, blocks, scores and products, forward and backward."""
    found = _of_attention(all_rows, dtype)
    _enough(found, NEEDED_ATTENTION, f"{dtype} attention")
    values: dict[str, float] = {}
    for prefix, backward in (("", False), ("backward_", True)):
        used = [r for r in found if not r.left_out and r.case["backward"] == backward]
        blocks, scores, flops = np.array([_attention_terms(r) for r in used]).T
        whole_pages = np.array([_whole_pages(r) for r in used])
        seconds, dispatch = _seconds_of(used)
        columns = [
            np.ones(len(used)),
            blocks / hardware.sm_count,
            scores / hardware.sm_count,
            flops,
            flops * whole_pages,
        ]
        low = [0.0, 0.0, 0.0, 1.0 / max(hardware.fp32_flops, hardware.peak(dtype)), 0.0]
        floor, block, score, per_flop, more = least_relative(columns, seconds, low, dispatch)
        values |= {
            f"{prefix}floor": float(floor),
            f"{prefix}block": float(block),
            f"{prefix}score": float(score * hardware.clock_hz),
            f"{prefix}efficiency": float(1.0 / (per_flop * hardware.fp32_flops)),
            f"{prefix}aliasing": float(1.0 + more / per_flop),
        }
    p = CpuAttentionParameters(**values)

    def predict(r: CpuRow) -> float:
        return _attention_seconds(r, hardware, p)

    caveats = FitCaveats((), _zeros(p, *(f.name for f in fields(p))))
    return _fit(p, found, predict, lambda r: float(_attention_terms(r)[2] / hardware.peak(dtype)), software, caveats)


def _of_attention(all_rows: Sequence[CpuRow], dtype: str) -> list[CpuRow]:
    return [r for r in all_rows if r.case["block"] == "attention" and r.case["dtype"] == dtype]


def _attention_seconds(r: CpuRow, hardware: Hardware, p: CpuAttentionParameters) -> float:
    s = r.sizes
    sizes = (s["batch"], s["seq"], s["seq"], s["heads"], s["head_dim"])
    kind = {"dtype": r.case["dtype"], "causal": True, "backward": r.case["backward"]}
    return float(cpu_attention_time(*sizes, hardware=hardware, parameters=p, **kind))


def _whole_pages(r: CpuRow) -> bool:
    return bool(aliased(r.sizes["heads"] * r.sizes["head_dim"] * ITEMSIZE[r.case["dtype"]]))


def _attention_terms(r: CpuRow) -> tuple[float, float, float]:
    s = r.sizes
    blocks, scores = attention_work(s["batch"], s["seq"], s["seq"], s["heads"], causal=True)
    return float(blocks), float(scores), float(2.0 * (5 if r.case["backward"] else 2) * scores * s["head_dim"])


def fit_streams(all_rows: Sequence[CpuRow], hardware: Hardware, software: str) -> Fit:
    """Bandwidths from calls that only stream, then a floor and clocks an element for every kind."""
    found = [r for r in all_rows if r.case["block"] == "pointwise"]
    _enough(found, 40, "pointwise calls")
    used = [r for r in found if not r.left_out]
    p = _bandwidths([r for r in used if r.case["dtype"] == "fp32"], hardware)
    floors, clocks, _ = _by_kind([r for r in used if r.case["dtype"] == "fp32"], hardware, p)
    usual = CpuStreamParameters()
    p = replace(p, floors={**usual.floors, **floors}, clocks={**usual.clocks, **clocks})
    _, clocks16, back16 = _by_kind([r for r in used if r.case["dtype"] != "fp32"], hardware, p)
    p = replace(p, clocks16={**p.clocks, **clocks16}, back16=back16)
    kept = [f"floors.{k}" for k in KINDS if k not in floors] + [f"clocks.{k}" for k in KINDS if k not in clocks]
    caveats = FitCaveats(
        (*kept, *(f"clocks16.{k}" for k in KINDS if k not in clocks16)), _zeros(p, "floors", "clocks", "clocks16")
    )

    def predict(r: CpuRow) -> float:
        return sum(_seconds(kind, amounts, r, hardware, p) for kind, amounts in _passes(r))

    def plain(r: CpuRow) -> float:
        return sum(amounts[0] for _, amounts in _passes(r)) / hardware.memory_bandwidth

    judged = [r for r in found if r.sizes["rows"] > 1]
    return _fit(p, judged, predict, plain, software, caveats)


def _passes(r: CpuRow) -> list[tuple[str, Amounts]]:
    return passes(r.case["op"], r.case["dtype"], r.sizes["rows"], r.sizes["columns"])


def _seconds(kind: str, amounts: Amounts, r: CpuRow, hardware: Hardware, p: CpuStreamParameters) -> float:
    half = r.case["dtype"] != "fp32" or r.case["op"] in ("cast", "add_mixed")
    back = r.case["op"] in STATE
    return float(stream_time(*amounts, hardware=hardware, parameters=p, kind=kind, half=half, back=back))


def _bandwidths(used: Sequence[CpuRow], hardware: Hardware) -> CpuStreamParameters:
    """Bandwidths and what the caches keep, with no clocks an element, from what only streams."""
    plain = [r for r in used if all(kind == "stream" for kind, _ in _passes(r))]
    zeros = dict.fromkeys(KINDS, 0.0)
    base = CpuStreamParameters(floors=zeros, clocks=zeros, clocks16=zeros)
    seconds, dispatch = _seconds_of(plain)

    def make(z: Array) -> CpuStreamParameters:
        stream, ratio, usable, cold, shared, floor = map(float, np.exp(z))
        return replace(
            base, stream=stream, cache_ratio=1.0 + ratio, cache_usable=usable, cold=cold, shared_bytes=shared,
            floors={**zeros, "stream": floor},
        )  # fmt: skip

    def loss(z: Array) -> float:
        p = make(z)
        predicted = [sum(_seconds(kind, amounts, r, hardware, p) for kind, amounts in _passes(r)) for r in plain]
        off = np.abs(np.log((dispatch + np.array(predicted)) / seconds))
        return float(np.mean(off)) + PULL * float(np.sum((z - start) ** 2))

    start = np.log([2.0, 1.0, 0.7, 1.0, 8e6, 5e-7])
    simplex = np.vstack([start, start + 0.7 * np.eye(len(start))])
    options: Any = {"maxiter": 600, "xatol": 1e-3, "fatol": 1e-5, "initial_simplex": simplex}
    return make(minimize(loss, start, method="Nelder-Mead", options=options).x)


def _by_kind(
    used: Sequence[CpuRow], hardware: Hardware, p: CpuStreamParameters
) -> tuple[dict[str, float], dict[str, float], float]:
    """Floor and clocks an element of the kinds that the rows hold, and more of what is written back to memory.

    The bandwidths are given.
    """
    floors, clocks, back = {}, {}, 0.0
    bare = replace(p, floors=dict.fromkeys(KINDS, 0.0), clocks=dict.fromkeys(KINDS, 0.0))
    bare = replace(bare, clocks16=bare.clocks)
    for kind in KINDS:
        mine = [r for r in used if _passes(r)[-1][0] == kind and len(_passes(r)) == 1]
        if len({r.sizes["rows"] for r in mine}) < 2:  # sizes alike do not tell a floor from clocks an element
            continue
        seconds, dispatch = _seconds_of(mine)
        base = np.array([_seconds(kind, _passes(r)[0][1], r, hardware, bare) for r in mine])
        elements = np.array([_passes(r)[0][1][1] for r in mine])
        cores = np.clip(np.ceil(elements / GRAIN), 1.0, hardware.sm_count)
        columns = [np.ones(len(mine)), elements / cores]
        written_back = np.array([r.case["op"] in STATE for r in mine])
        if written_back.any():
            columns.append(columns[1] * written_back)
        found = least_relative(columns, seconds, [0.0] * len(columns), dispatch + base)
        floors[kind], clocks[kind] = float(found[0]), float(found[1] * hardware.clock_hz)
        back += float(sum(found[2:]) * hardware.clock_hz)  # of one kind alone: what streams
    return floors, clocks, back
