"""Fits a GPU's profile to the microbenchmarks of a calibration, with the fits of published measurements.

The datasheet is that of the bundled device of the same name, or else what the driver tells, with the best rates that
were measured as peaks. Parameters start from the defaults of the device's class; calls that the host bounds are left
out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from perfmodel.devices import kernels, profile
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.gemm_parameters import LAYOUTS, GemmParameters, Layout
from perfmodel.devices.price import ROW_WISE
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.program.dims import Array

from . import gemm, pointwise
from .attention import fit as attention
from .attention import flash_papers
from .cpu import SOURCE, CpuRow, cpu_rows
from .cpu_ops import op
from .judging import Fit, FitCaveats, FitErrors, column, fold, shape_hash
from .sequences import TimedKernel

Record = Mapping[str, Any]

ARCHITECTURES = {
    "6": "pascal", "7.0": "volta", "7.2": "volta", "7.5": "turing", "8.9": "ada", "8": "ampere", "9": "hopper",
    "10": "blackwell", "12": "blackwell",
}  # compute capability, or its major number -> architecture # fmt: skip
HOST_BOUND = 1.5  # calls that take less than so many launches show the host, not the kernel
FEWEST = 24  # rows of a block


def fit_gpu(found: Sequence[Record], here: Record) -> tuple[DeviceProfile, dict[str, Fit]]:
    """What is known of the GPU beforehand, and its fitted blocks.

    Raises:
        UserError: too few rows, or a GPU of no known family.
    """
    every = cpu_rows(found)
    launch = min((r.seconds for r in every if r.case["op"] == "launch"), default=0.0)
    telling = [r for r in every if r.seconds > HOST_BOUND * launch]
    known = beforehand(here["gpu"], telling)
    software = f"PyTorch {here['software'].get('torch')}, CUDA {here['gpu'].get('cuda')}"
    computes = known.hardware.bf16_flops is not None  # where PyTorch emulates bf16, it is not what is trained in
    fits = {f"gemm.{d}": _gemm(telling, d, known, software) for d in (("bf16", "fp32") if computes else ("fp32",))}
    if computes:
        block = "attention" if known.cudnn_attention == known.attention else "attention_cudnn"  # what PyTorch runs
        fits[block] = _attention(telling, known, software)
    return known, fits | {"pointwise": _pointwise(telling, launch, known, software)}


def beforehand(gpu: Record, telling: Sequence[CpuRow]) -> DeviceProfile:
    """The bundled profile of the GPU, or one of its class on what the driver tells."""
    if bundled := profile.bundled_by_makers_name(str(gpu["name"])):
        return bundled
    major, minor = int(gpu["major"]), int(gpu["minor"])
    capability = f"{major}.{minor}"
    architecture = ARCHITECTURES.get(capability, ARCHITECTURES.get(str(major)))
    if architecture is None:
        raise UserError(f"compute capability {capability} is of no known family: {', '.join(ARCHITECTURES)}")
    peaks = {d: _peak(telling, d) for d in ("bf16", "fp32")}
    highest = str(gpu.get("clocks.max.sm", "")).split()[:1]  # "1980 MHz", or [N/A] of a virtual GPU
    clock = float(highest[0]) * 1e6 if highest and highest[0].isdecimal() else 1.5e9
    sheet: dict[str, Any] = {
        "sm_count": int(gpu["multi_processor_count"]), "clock_hz": clock, "memory_bytes": float(gpu["total_memory"]),
        "usable_bytes": float(gpu["total_memory"]),
        "memory_bandwidth": _bandwidth(telling), "l2_bytes": float(gpu["L2_cache_size"]), "fp32_flops": peaks["fp32"],
    }  # fmt: skip
    if major >= 8:
        sheet |= {"bf16_flops": peaks["bf16"], "fp16_flops": peaks["bf16"], "tf32_flops": peaks["bf16"] / 2}
    table = {
        "name": str(gpu["name"]), "kind": "cuda", "architecture": architecture, "compute_capability": capability,
        "datasheet": sheet,
    }  # fmt: skip
    return profile.from_table("mine", table, str(gpu["name"]))


def datasheet(known: DeviceProfile, gpu: Record) -> dict[str, tuple[Any, str]]:
    """Figure -> (value, source)."""
    here = f"driver of {gpu['name']}, and rates measured by perfmodel calibrate"
    figures = asdict(known.hardware)
    return {k: (v, known.sources.get(k, here)) for k, v in figures.items() if v is not None}


def _peak(telling: Sequence[CpuRow], dtype: str) -> float:
    rates = [
        2.0 * r.sizes["m"] * r.sizes["n"] * r.sizes["k"] / r.seconds
        for r in telling
        if r.case["block"] == "gemm" and r.case["dtype"] == dtype
    ]
    if not rates:
        raise UserError(f"too few microbenchmarks of {dtype} products: give the calibration more time")
    return max(rates)


def _bandwidth(telling: Sequence[CpuRow]) -> float:
    streamed = [r for r in telling if r.case["op"] in ("add", "mul")]
    calls = [(op(r.case["op"], r.case["dtype"], r.sizes["rows"], r.sizes["columns"]), r.seconds) for r in streamed]
    if not calls:
        raise UserError("too few microbenchmarks of pointwise calls: give the calibration more time")
    return max(float(call.bytes_read + call.bytes_written) / seconds for call, seconds in calls)


def _enough(d: pd.DataFrame, what: str) -> pd.DataFrame:
    if len(d) < FEWEST:
        raise UserError(f"only {len(d)} microbenchmarks of {what}, too few to fit: give the calibration more time")
    return d


def _gemm(telling: Sequence[CpuRow], dtype: str, known: DeviceProfile, software: str) -> Fit:
    """The forward layout by the fit of published measurements, then how much slower the other two are."""
    mine = [r for r in telling if r.case["block"] == "gemm" and r.case["dtype"] == dtype]
    d = pd.DataFrame([{**r.sizes, "seconds": r.seconds, "layout": r.case["layout"]} for r in mine])
    d = _enough(d, f"{dtype} products").assign(
        b=1.0, a_copies=np.inf, b_copies=np.inf, dtype=dtype, group="own", campaign="own", entry=-1, device="own"
    )
    h = shape_hash(d.b, d.m, d.n, d.k)
    d = d.assign(left_out=h % np.uint64(3) == 0, order=(h >> np.uint64(8)) % np.uint64(1 << 20))
    forward = _enough(d[d.layout == "tn"], f"{dtype} products in forward layout")
    begin = replace(known.gemm[dtype], nn_slowdown=1.0, nt_slowdown=1.0)
    told = gemm.fit_rows([gemm.Used(forward[~forward.left_out], known.hardware, begin)], dtype, begin)
    slower = {f"{x}_slowdown": _slowdown(d[(d.layout == x) & ~d.left_out], known, told.parameters) for x in LAYOUTS[1:]}
    seen: dict[str, Any] = {name: factor for name, factor in slower.items() if factor is not None}
    kept = tuple(name for name in slower if name not in seen)
    p = replace(told.parameters, **seen, **{name: getattr(known.gemm[dtype], name) for name in kept})
    caveats = told.caveats.but(slower, FitCaveats(kept, tuple(name for name, factor in seen.items() if factor == 1.0)))
    out = d[d.left_out] if d.left_out.any() else d
    out = out.sort_values("layout", kind="stable")
    judged = [name for name in sorted(LAYOUTS) if (out.layout == name).any()]
    predicted = np.concatenate([_predicted(out[out.layout == name], known, p, name) for name in judged])
    errors = FitErrors.of(predicted, gemm.roofline_seconds(out, known.hardware), column(out, "seconds"))
    return Fit(p, SOURCE, software, int((~d.left_out).sum()), int(d.left_out.sum()), errors, caveats=caveats)


def _slowdown(part: pd.DataFrame, known: DeviceProfile, p: GemmParameters) -> float | None:
    """How much longer products of a layout take than the forward layout's, 1 at least; None without products."""
    if not len(part):
        return None
    return max(
        1.0, float(np.median(column(part, "seconds") / gemm.priced_products(part, known.hardware, gemm.Found(p))))
    )


def _predicted(part: pd.DataFrame, known: DeviceProfile, p: GemmParameters, layout: Layout) -> Array:
    m, n, k = (column(part, c) for c in ("m", "n", "k"))
    dtype = str(part["dtype"].iloc[0])
    return gemm_time(m, n, k, hardware=known.hardware, parameters=p, dtype=dtype, layout=layout)


def _attention(telling: Sequence[CpuRow], known: DeviceProfile, software: str) -> Fit:
    """Calls with as many key as query heads, as the published rows are."""
    mine = [r for r in telling if r.case["block"] == "attention" and r.sizes["heads"] == r.sizes["kv_heads"]]
    table = [
        {
            **r.sizes,
            "causal": True,
            "direction": "backward" if r.case["backward"] else "forward",
            "seconds": r.seconds,
            "left_out": fold(r.case["backward"], *r.sizes.values()) == 0,
        }
        for r in mine
    ]
    d = _enough(pd.DataFrame(table), "attention")
    usual = known.cudnn_attention
    told = attention.filled(attention.fit_published(d, known.hardware, usual), usual)
    out = d[d.left_out] if d.left_out.any() else d
    errors = flash_papers.published_errors(out, known.hardware, told.parameters)
    rows = int((~d.left_out).sum()), int(d.left_out.sum())
    return Fit(told.parameters, SOURCE, software, *rows, errors, caveats=told.caveats)


def _pointwise(telling: Sequence[CpuRow], launch: float, known: DeviceProfile, software: str) -> Fit:
    """Calls as the kernels that they launch; a call in a burst includes the gaps between them."""
    begin, table = known.pointwise, []
    for r in [r for r in telling if r.case["block"] == "pointwise"]:
        case = r.case["op"], r.case["dtype"], r.sizes["rows"], r.sizes["columns"]
        launched = [_kernel(k) for k in kernels.memory_bound(op(*case))]
        seconds = r.seconds - len(launched) * begin.kernel_gap  # the fit is of kernels alone
        if launched and seconds > 0 and r.seconds > HOST_BOUND * launch * len(launched):
            family = f"{r.case['dtype']} {launched[0].kind}"
            table.append(
                {"source": "own", "family": family, "kernels": launched, "fold": fold(*case), "seconds": seconds}
            )
    d = _enough(pd.DataFrame(table), "pointwise calls")
    told = pointwise.fit_pointwise(d[d.fold != 0].reset_index(drop=True), known.hardware, begin)
    errors = pointwise.judge_families(d[d.fold == 0] if (d.fold == 0).any() else d, known.hardware, told.parameters)[
        "all"
    ]
    rows = int((d.fold != 0).sum()), int((d.fold == 0).sum())
    return Fit(told.parameters, SOURCE, software, *rows, errors, caveats=told.caveats)


def _kernel(k: kernels.Kernel) -> TimedKernel:
    rows, length = (float(k.rows), float(k.length)) if k.kind in ROW_WISE else (None, None)
    return TimedKernel(float(k.read), float(k.written), k.kind, float(k.elements), rows, length)
