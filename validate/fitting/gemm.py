"""Fits the GEMM model to aiconfigurator's bf16 and NeuSight's fp32 measurements.

bf16: https://github.com/ai-dynamo/aiconfigurator, one file a GPU. Its frameworks leave different data in L2: SGLang
and vLLM cycle through 6 copies of A and B, TensorRT-LLM keeps one A and as many B as fill L2, at most 5. So a row is a
shape and a protocol, the median over the versions of a framework.
fp32: `validate.fitting.sgemm`; its launch floors contain the host, so device files get those of bf16 instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import OptimizeResult, least_squares

from perfmodel.devices.gemm import GemmParameters
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array

from . import sgemm
from .campaigns import REACTION
from .judging import (
    Fit,
    FitCaveats,
    FitErrors,
    Shapes,
    column,
    hardware,
    measured_table,
    settled,
    shape_hash,
    strings,
    unsearched,
)

FIT_ROWS = 12000  # rows that a fit uses at most: more change the third digit of the error
FIT_ROWS_FP32 = 4000  # the same for one that several devices share in fp32, whose rows are priced at two clocks
LOSS_SCALE = 0.02  # |log error| above which a row counts linearly, not quadratically: close to the mean |error|
PRIOR = 0.003  # pull to the start per e-fold and sqrt(row): decides only what the data leaves open
# The same of what fp32 devices share: DRAM streams reach four fifths of the datasheet, writes cost as much. One device
# may need less, as kernels of few loads in flight do on an A100, but that does not carry over.
PRIOR_DRAM = 0.2
SAME_PATH = 2.0 / 3.0  # share of the only device with the same instructions among those that stand for one left out
LAUNCH_CLOCKS = 4500.0  # of a device without bf16 measurements
# Energy that the power limit sees of a product within a training step, over that of one run again and again: kernels
# between the products wait for memory and leave power to them. Fitted to the one step of a 70 W board that is for
# fitting (BERT-large, batch 8, on an L4); 0.8 if products take 60 % of the time and the rest half the power.
STEP_POWER = 0.82
AICONFIGURATOR = "https://github.com/ai-dynamo/aiconfigurator"

BF16_FILES = {
    "a100-80gb-sxm": "gemm_bf16_a100_sxm.parquet",
    "l40s": "gemm_bf16_l40s.parquet",
    "h100-sxm": "gemm_bf16_h100_sxm.parquet",
    "b200": "gemm_bf16_b200_sxm.parquet",
    "b300": "gemm_bf16_b300_sxm.parquet",
    "gb200": "gemm_bf16_gb200.parquet",
    "gb300": "gemm_bf16_gb300.parquet",
}
SYNC = ("a100-80gb-sxm", "l40s")  # mma.sync and cp.async
ASYNC = ("h100-sxm", "b200", "b300", "gb200", "gb300")  # wgmma or tcgen05, TMA copies
# fp32, by the kernels in the profiles. The class: boards of ampere_sgemm, as are devices without rows of their own. The
# same stand for an H100, whose generated kernels (sm80_xmma, cutlass) are of that generation: an L4 runs some of them.
AMPERE_SGEMM = ("a100-40gb-pcie", "a100-80gb-pcie", "l4")
# Boards that stand for older ones (maxwell_sgemm, volta_sgemm); not the P4, which was measured with two libraries.
SGEMM = ("p100", "v100-32gb-pcie", "t4", *AMPERE_SGEMM)

# The L2 of the A100, Hopper and data-centre Blackwell is in two halves, each for one half of the SMs (NVIDIA's A100 and
# H100 whitepapers): what both read is there twice, what one writes goes to the other. Other chips' L2 is in one part.
IN_ONE_PART: dict[str, Any] = {"l2_share": 1.0, "l2_write_cost": 1.0}
IN_HALVES = ("a100-80gb-sxm", *ASYNC)

SYNC_MMA = GemmParameters(k_step=32, k_latency=3.5, k_bubble=4.0, wave_tail=0.6)
ASYNC_MMA = GemmParameters(k_step=64)
BOUNDS: dict[str, tuple[float, float]] = {
    "launch_clocks": (1e3, 3e5), "math_efficiency": (0.2, 1.0), "derating": (0.001, 1.5),
    "derating_time": (1e-4, 1.0), "tile_balance": (0.5, 300.0), "k_latency": (0.01, 100.0),
    "k_bubble": (0.005, 100.0), "epilogue": (0.02, 50.0), "wave_tail": (0.005, 1.0),
    "memory_efficiency": (0.4, 1.1), "write_cost": (0.3, 3.0), "overlap_loss": (0.005, 1.0),
    "l2_share": (0.1, 1.5), "l2_written": (0.3, 1.0), "l2_stream": (0.03, 10.0), "l2_write_cost": (0.3, 5.0),
    "split_latency": (1e-7, 2e-5), "split_traffic": (0.02, 20.0),
}  # fmt: skip
FP32_ONLY: dict[str, tuple[float, float]] = {
    "memory_efficiency": (0.1, 1.0), "long_row": (0.001, 10.0), "page_reach": (4e3, 3e5),
}  # fmt: skip
POWER: dict[str, tuple[float, float]] = {"power_share": (0.2, 1.5), "load_energy": (0.05, 20.0)}
BENCH: dict[str, tuple[float, float]] = {"clock": (0.3, 1.2), "reaction": (0.02, 0.5)}  # of NeuSight's boards


def starting_point(slug: str, dtype: str) -> GemmParameters:
    """What the library has on a device (tiles, k step), and where its fit starts."""
    if dtype == "fp32":
        return sgemm.STARTS[slug]
    return SYNC_MMA if slug in SYNC else ASYNC_MMA


def searched_bounds(dtype: str, *, power: bool = True) -> dict[str, tuple[float, float]]:
    """The fitted parameters and their limits; in fp32 with or without those of the power limit.

    What a write to L2 costs makes no price in fp32 better: there SMs compute far longer than they store.
    """
    if dtype == "bf16":
        return BOUNDS
    return {n: limits for n, limits in BOUNDS.items() if n != "l2_write_cost"} | FP32_ONLY | (POWER if power else {})


def gemm_rows(folder: Path, slug: str, dtype: str) -> pd.DataFrame:
    """m, n, k, b, seconds, group, a_copies, b_copies, left_out, an order by hash: one row a measurement."""
    rows = _load_bf16(folder, slug) if dtype == "bf16" else sgemm.sgemm_rows(folder, slug)
    h = shape_hash(rows.b, rows.m, rows.n, rows.k)
    order = (h >> np.uint64(8)) % np.uint64(1 << 20)
    return rows.assign(left_out=h % np.uint64(3) == 0, order=order, dtype=dtype, device=slug)


def _load_bf16(folder: Path, slug: str) -> pd.DataFrame:
    measured = measured_table(folder, BF16_FILES[slug])
    l2_bytes = hardware(slug).l2_bytes
    parts = []
    for framework in ("sglang", "trtllm", "vllm"):
        columns = [c for c in strings(measured) if c.startswith(framework)]
        if not columns:
            continue
        rows = measured[["m", "n", "k"]].astype(float)
        rows["seconds"] = np.exp(measured[columns].apply(np.log).median(axis=1)) * 1e-3
        fills = np.clip(np.ceil(l2_bytes / (2 * rows.n * rows.k)), 1, 5)
        a_copies, b_copies = (1.0, fills) if framework == "trtllm" else (6.0, 6.0)
        parts.append(rows.assign(group=framework, b=1.0, a_copies=a_copies, b_copies=b_copies).dropna())
    return pd.concat(parts, ignore_index=True)


class Used(NamedTuple):
    """What a fit uses of a device: rows, datasheet, and what its library has (tiles, k step) and where it starts."""

    rows: pd.DataFrame
    hardware: Hardware
    own: GemmParameters


class Found(NamedTuple):
    """What a fit found.

    Attributes:
        parameters: of the price model.
        clock: of the board while the collected rows were measured, over that of the other rows.
        reaction: of the board's power control, in seconds (`campaigns.boosts`).
        caveats: parameters that the rows do not tell, and those at a bound.
    """

    parameters: GemmParameters
    clock: float = 1.0
    reaction: float = REACTION
    caveats: FitCaveats = FitCaveats()


def priced_products(rows: pd.DataFrame, hw: Hardware, found: Found) -> Array:
    """Seconds of every row; fp32 ones at the clock that a replay of what ran before tells."""
    p, clock, reaction, _ = found
    if rows["dtype"].iloc[0] == "bf16":
        return Shapes.of(rows).price(hw, p)
    board = sgemm.Board(rows, hw, p, clock)
    return board.predict(hw, p, clock, board.boosts(reaction))


def roofline_seconds(rows: pd.DataFrame, hw: Hardware) -> Array:
    """max(FLOPs / peak, bytes / bandwidth), no fitted figure."""
    m, n, k, b = (column(rows, c) for c in ("m", "n", "k", "b"))
    dtype = str(rows["dtype"].iloc[0])
    moved = (2 if dtype == "bf16" else 4) * b * (m * k + k * n + m * n)
    return np.maximum(2 * b * m * n * k / hw.peak(dtype), moved / hw.memory_bandwidth)


def least(residuals: Callable[[Array], Array], first: Array, low: Array, high: Array) -> OptimizeResult:
    """Robust least squares from one start."""
    return least_squares(
        residuals,
        np.clip(first, low + 1e-6, high - 1e-6),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=LOSS_SCALE,
        diff_step=np.array(2e-3),
        max_nfev=60,
    )


def deviation(predicted: Array, measured: Array, dtype: str) -> Array:
    """What a fit makes small: ln(predicted/measured), and for fp32 the relative error itself.

    The two differ where the rows scatter widely, as on boards whose clock jumps under their power limit (T4, L4, P4).
    """
    ratio = predicted / measured
    return np.asarray(np.log(ratio) if dtype == "bf16" else ratio - 1.0)


def fit_gemm(
    rows_of: Mapping[str, pd.DataFrame], dtype: str, begin: GemmParameters, shares: Mapping[str, float] | None = None
) -> Found:
    """Parameters shared by the devices of `rows_of`, from their rows that are not left out.

    `shares` are the devices' parts of `FIT_ROWS`; equal ones if None.
    """
    used = []
    for slug, rows in rows_of.items():
        kept = rows[~rows.left_out].sort_values(["order", "group"], kind="stable")
        rows_in_all = FIT_ROWS_FP32 if dtype == "fp32" and len(rows_of) > 1 else FIT_ROWS
        count = int(rows_in_all * (shares[slug] if shares else 1.0 / len(rows_of)))
        own = replace(starting_point(slug, dtype), power_share=begin.power_share)
        used.append(Used(kept.head(count).reset_index(drop=True), hardware(slug), own))
    return fit_rows(used, dtype, begin)


def fit_rows(used: Sequence[Used], dtype: str, begin: GemmParameters) -> Found:
    """Parameters shared by some devices."""
    measured = np.concatenate([column(rows, "seconds") for rows, _, _ in used])
    limits = searched_bounds(dtype, power=begin.power_share > 0.0)
    bench = BENCH if dtype == "fp32" else {}
    low, high = (np.log([b[i] for b in (*limits.values(), *bench.values())]) for i in (0, 1))
    first = np.log([*(getattr(begin, n) for n in limits), *(1.0, REACTION)[: len(bench)]])
    known = PRIOR_DRAM if dtype == "fp32" and len(used) > 1 else PRIOR
    pull = np.array([known if n in ("memory_efficiency", "write_cost") else PRIOR for n in (*limits, *bench)])
    pull *= np.sqrt(len(measured))
    seconds = _seconds(used, dtype)

    def found(z: Array, own: GemmParameters) -> Found:
        values: list[Any] = np.exp(z).tolist()
        return Found(replace(own, **dict(zip(limits, values, strict=False))), *values[len(limits) :])

    def price(z: Array) -> Array:
        return seconds([found(z, own) for _, _, own in used])

    def residuals(z: Array) -> Array:
        return np.concatenate([deviation(price(z), measured, dtype), pull * (z - first)])

    # Two starts: the loss has kinks where the best tile changes.
    ends = [least(residuals, first + shift * np.resize([1, -1], len(first)), low, high) for shift in (0.0, 0.4)]
    end = min(ends, key=lambda f: float(f.cost)).x
    z, caveats = settled((*limits, *bench), end, first, (low, high), price)
    return found(z, begin)._replace(caveats=caveats.but(bench, FitCaveats()).but_kept(unsearched(begin, limits)))


def _seconds(used: Sequence[Used], dtype: str) -> Callable[[Sequence[Found]], Array]:
    """Seconds of all rows, one device after the other, by what a fit tries for each."""
    if dtype == "bf16":
        shapes = [(Shapes.of(rows), hw) for rows, hw, _ in used]
        return lambda tried: np.concatenate(
            [x.price(hw, t.parameters) for (x, hw), t in zip(shapes, tried, strict=True)]
        )
    boards = [(sgemm.Board(*x), x.hardware) for x in used]
    usual = [board.boosts(REACTION) for board, _ in boards]

    def seconds(tried: Sequence[Found]) -> Array:
        # The power control of one board can be fitted; several share the usual one.
        known = [boards[0][0].boosts(tried[0].reaction)] if len(boards) == 1 else usual
        each = zip(boards, tried, known, strict=True)
        return np.concatenate([board.predict(hw, t.parameters, t.clock, boost) for (board, hw), t, boost in each])

    return seconds


def on_device(found: Found, slug: str, dtype: str) -> Found:
    """Class parameters with the tiles and k step that the library has on the device, and in 16 bit its kind of L2."""
    shared: dict[str, Any] = {n: getattr(found.parameters, n) for n in (*searched_bounds(dtype), "power_share")}
    if dtype == "bf16" and slug not in IN_HALVES:
        shared |= IN_ONE_PART
    return found._replace(parameters=replace(starting_point(slug, dtype), **shared))


def judge_gemms(rows: pd.DataFrame, hw: Hardware, found: Found) -> dict[str, FitErrors]:
    """Errors on the left-out rows: all, and by slice where a slice has 20 rows."""
    rows = rows[rows.left_out].reset_index(drop=True)
    return errors_by_slice(rows, priced_products(rows, hw, found), hw)


def errors_by_slice(rows: pd.DataFrame, predicted: Array, hw: Hardware) -> dict[str, FitErrors]:
    """Errors of predicted seconds: of all rows, and by slice where a slice has 20."""
    plain, seconds = roofline_seconds(rows, hw), column(rows, "seconds")
    thin = ((rows.n <= 128) | (rows.k <= 128)) & (rows.m >= 512) & (rows.b == 1)
    cuts = {"all": rows.m > 0, "m_from_64": rows.m >= 64, "m_below_64": rows.m < 64, "adapter_shapes": thin} | {
        str(g): rows.group == g for g in rows.group.unique()
    }
    kept = {name: np.asarray(cut) for name, cut in cuts.items()}
    return {n: FitErrors.of(predicted[k], plain[k], seconds[k]) for n, k in kept.items() if k.sum() >= 20}


def fit_device(folder: Path, slug: str, dtype: str) -> Fit:
    """One device from its own rows."""
    rows = gemm_rows(folder, slug, dtype)
    found = fit_gemm({slug: rows}, dtype, starting_point(slug, dtype))
    errors = judge_gemms(rows, hardware(slug), found)
    return Fit(
        parameters=found.parameters,
        source=AICONFIGURATOR if dtype == "bf16" else sgemm.NEUSIGHT,
        software=software(folder, slug) if dtype == "bf16" else "PyTorch eager, cuBLAS, TF32 off",
        rows_fitted=min(FIT_ROWS, int((~rows.left_out).sum())),
        rows_left_out=int(rows.left_out.sum()),
        errors=errors["all"],
        slices={k: v for k, v in errors.items() if k != "all"},
        notes=sgemm.replay_notes(rows, found.clock) if dtype == "fp32" else "",
        caveats=found.caveats,
    )


def software(folder: Path, slug: str) -> str:
    """What ran the bf16 products of a device."""
    columns = [
        c.removesuffix("_ms").replace("_", " ")
        for c in strings(measured_table(folder, BF16_FILES[slug]))
        if c.endswith("_ms")
    ]
    return ", ".join(columns) + "; short bursts in CUDA graphs"


def donors(slug: str, dtype: str) -> dict[str, float]:
    """Whose rows make the class default for a device that is left out, and their shares in it."""
    if dtype == "fp32":
        others = [d for d in (AMPERE_SGEMM if slug in (*AMPERE_SGEMM, "h100-sxm") else SGEMM) if d != slug]
        return dict.fromkeys(others, 1.0 / len(others))
    same = [d for d in (SYNC if slug in SYNC else ASYNC) if d != slug]
    if len(same) > 1:
        return dict.fromkeys(same, 1.0 / len(same))
    far = [d for d in ("a100-80gb-sxm", "l40s", "h100-sxm", "b200") if d not in (slug, *same)]  # one Blackwell
    return {same[0]: SAME_PATH} | dict.fromkeys(far, (1.0 - SAME_PATH) / len(far))


def leave_out(folder: Path, slug: str, dtype: str) -> FitErrors:
    """Errors of a device priced from its datasheet and the others' rows."""
    shares = donors(slug, dtype)
    begin = starting_point(slug, dtype)
    if dtype == "fp32":
        begin = sgemm.limited(begin)
    elif slug in SYNC:  # what one of these boards throttles would be taken for a lack of efficiency of the other
        begin = replace(begin, power_share=1.0)
    found = fit_gemm({d: gemm_rows(folder, d, dtype) for d in shares}, dtype, begin, shares)
    return judge_gemms(gemm_rows(folder, slug, dtype), hardware(slug), on_device(found, slug, dtype))["all"]


def fit_class(folder: Path, members: tuple[str, ...], dtype: str, begin: GemmParameters) -> tuple[Found, int]:
    """What the devices of a class share, and how many rows made it."""
    rows_of = {d: gemm_rows(folder, d, dtype) for d in members}
    each = (FIT_ROWS_FP32 if dtype == "fp32" else FIT_ROWS) // len(members)
    used = sum(min(each, int((~r.left_out).sum())) for r in rows_of.values())
    return fit_gemm(rows_of, dtype, begin), used


def in_steps(p: GemmParameters, launch_clocks: float) -> GemmParameters:
    """What a fit to fp32 products alone says about those of a training step."""
    return replace(p, launch_clocks=launch_clocks, power_share=p.power_share * STEP_POWER)
