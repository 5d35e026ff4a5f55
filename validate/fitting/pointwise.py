"""Fits the pointwise model to NeuSight (fp32, 7 GPUs), vidur (A100, H100, A40), Liger (A100, H100), a profile (H100).

NeuSight (https://github.com/sitar-lab/NeuSight) and vidur (https://github.com/microsoft/vidur) give kernel durations
of a profiler, so no gap between kernels; vidur rounds to 1 us: its rows below 10 us are fitted weakly and not judged.
What a benchmark adds to every row (do_bench's events, a launch that NeuSight's rows contain) is fitted with each board.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from perfmodel.devices.hardware import Hardware
from perfmodel.devices.pointwise import KINDS, PointwiseParameters, pointwise_time
from perfmodel.program.dims import Array

from . import liger
from .judging import (
    Fit,
    FitCaveats,
    FitErrors,
    FittedParameters,
    at_ends,
    column,
    fold,
    hardware,
    measured_table,
    settled,
    unsearched,
)
from .profiles import profiled_rows
from .sequences import Kernels, TimedKernel

NEUSIGHT = {
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "NVIDIA A100-PCIE-40GB": "a100-40gb-pcie",
    "NVIDIA L4": "l4",
    "Tesla P100-PCIE-16GB": "p100",
    "Tesla P4": "p4",
    "Tesla T4": "t4",
    "Tesla V100-PCIE-32GB": "v100-32gb-pcie",
}
VIDUR = {"a100": "a100-80gb-sxm", "h100": "h100-sxm", "a40": "a40"}
PARENTS = {  # the same silicon, or the generation before: where a fit starts, and what fills its gaps
    "a100-80gb-sxm": "a100-80gb-pcie",
    "h100-sxm": "a100-80gb-sxm",
}
PAIRS = (("a100-40gb-pcie", "a100-80gb-pcie"), ("a100-80gb-pcie", "a100-40gb-pcie"))
SOURCES = {
    "neusight": ("https://github.com/sitar-lab/NeuSight", "PyTorch eager, fp32"),
    "vidur": ("https://github.com/microsoft/vidur", "PyTorch profiler"),
    "liger": ("https://github.com/linkedin/Liger-Kernel", "eager and Triton, 2024-26"),
    "tracelens": ("https://github.com/AMD-AGI/TraceLens", "a profile, PyTorch 2.6"),
}
BOUNDS: dict[str, tuple[float, float]] = {
    "launch_floor": (3e-7, 1e-5), "kernel_gap": (2e-7, 1.35e-6), "column_stream": (0.1, 1.05),
    "fused_backward_rate": (0.1, 4.0), "fused_backward_stream": (0.1, 1.05), "fused_norm_stream": (0.3, 1.05),
    "row_latency": (1e-9, 1e-6), "serial_latency": (1e-7, 3e-6), "row_copy_latency": (1e-7, 3e-6),
    "stream": (0.5, 1.05), "l2_ratio": (0.8, 6.0), "l2_usable": (0.2, 1.5), "strided_rate": (0.2, 8.0),
    "cast_rate": (0.2, 8.0), "gather_rate": (0.1, 4.0), "exp_rate": (0.3, 6.0), "norm_stream": (0.3, 1.0),
    "norm_backward_stream": (0.3, 0.95), "norm_row_bytes": (5e2, 3e5), "norm_reread": (0.02, 1.0),
    "softmax_stream": (0.3, 1.05), "softmax_row_bytes": (5e2, 3e5), "softmax_reread": (0.02, 1.0),
}  # fmt: skip
# Clocks of a kernel of one block in profiles of real programs: 2.05 us on an A100, 1.55 on an H100, with gaps of 1.1 to
# 1.35 us between kernels (HolisticTraceAnalysis tests/data/nccl_parser_config, TraceLens tests/traces/h100).
SHORTEST = 3000.0
PRIOR = 0.15  # residual of a factor e away from the start (data rows weigh up to 10 each family)
OVERHEADS = {"liger": 5e-6, "neusight": 1.5e-5}  # s that a benchmark adds to a row; where a fit starts
LONGEST = 6.0  # times that


def pointwise_rows(folder: Path) -> pd.DataFrame:
    """gpu, source, family, kernels, fold, seconds, host_bound: one row a measurement."""
    parts = {"neusight": _neusight(folder), "vidur": _vidur(folder), "liger": liger.liger_rows(folder)}
    parts["tracelens"] = profiled_rows()
    rows = pd.concat([d.assign(source=source) for source, d in parts.items()], ignore_index=True)
    host = np.array([h is True or (isinstance(h, np.bool_) and bool(h)) for h in rows.host_bound])
    return rows.assign(host_bound=host)


def _neusight(folder: Path) -> pd.DataFrame:
    d = measured_table(folder, "kernels_fp32_neusight.parquet")
    d = d[~d.op.isin(["linear", "bmm"]) & d.gpu.isin(list(NEUSIGHT))]
    family = d.op.map({"ln": "layer norm", "softmax": "softmax"}).fillna("pointwise")
    ops = list(zip(d.op, d.B, d.H, strict=True))
    columns = {"gpu": d.gpu.map(NEUSIGHT), "family": "fp32 " + family, "seconds": d.latency_ms * 1e-3}
    kernels = [_neusight_kernels(op, float(b), float(h)) for op, b, h in ops]
    folds = [fold(op, int(b), int(h)) for op, b, h in ops]
    return pd.DataFrame({**columns, "kernels": pd.Series(kernels, index=d.index), "fold": folds})


def _neusight_kernels(op: str, rows: float, hidden: float) -> Kernels:
    n = 4.0 * rows * hidden
    if op in ("ln", "softmax"):
        return [TimedKernel(n, n, "norm" if op == "ln" else "softmax", None, rows, hidden)]
    return [TimedKernel(2 * n if op in ("add", "mul", "div", "pow") else n, n)]


def _vidur(folder: Path) -> pd.DataFrame:
    """The residual add and the embedding; the other columns time vLLM's own kernels."""
    d = measured_table(folder, "kernels_vidur.parquet")
    keys = ["gpu", "model", "num_tokens", "tp", "n_head", "n_kv_head", "n_embd", "n_ffn", "vocab", "gated"]
    d = d.groupby(keys, as_index=False).median(numeric_only=True)
    out = []
    for op, name in (("add", "add_ms"), ("embedding", "emb_ms")):
        for r in d[d[name].notna()].to_dict("records"):
            tokens = float(r["num_tokens"])
            n = tokens * float(r["n_embd"])
            # phi-2 (not gated) adds twice a layer.
            adds = [TimedKernel(4 * n, 2 * n)] * (1 if r["gated"] else 2)
            kernels = adds if op == "add" else [TimedKernel(2 * n, 2 * n, "embedding", n, tokens)]
            shape = fold(op, *(r[k] for k in ("num_tokens", "tp", "n_embd", "n_ffn", "n_head", "n_kv_head")))
            out.append((VIDUR[str(r["gpu"])], op, kernels, shape, float(r[name]) * 1e-3))
    return pd.DataFrame(out, columns=["gpu", "family", "kernels", "fold", "seconds"])


class Batch:
    """Rows of kernels flattened by kind, so that a price is a few vector operations."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.of = {name: np.asarray(rows.source == name, dtype=np.float64) for name in OVERHEADS}
        self.no_gap = np.where(rows.source == "liger", 0.0, [len(k) for k in rows.kernels])
        cleared = np.asarray(rows.source == "liger")  # do_bench clears L2 before every run
        nan = float("nan")
        columns: dict[str, list[tuple[float, ...]]] = {}
        for i, kernels in enumerate(rows.kernels):
            for first, k in zip((True, *[False] * len(kernels)), kernels, strict=False):
                sizes = (nan if v is None else v for v in (k.elements, k.rows, k.row_elements))
                columns.setdefault(k.kind, []).append((i, k.read, k.written, *sizes, float(first and cleared[i])))
        self.kinds = {kind: np.array(v, dtype=np.float64).T for kind, v in columns.items()}

    def price(self, hw: Hardware, p: PointwiseParameters, overheads: Mapping[str, float] = OVERHEADS) -> Array:
        """Seconds of every row, with those that its benchmark adds."""
        out = -self.no_gap * p.kernel_gap
        for name, added in overheads.items():
            out = out + self.of[name] * added
        for kind, (index, read, written, elements, rows, lanes, cold) in self.kinds.items():
            seconds = pointwise_time(
                read, written, kind=kind, hardware=hw, parameters=p,
                elements=np.where(np.isnan(elements), np.maximum(read, written) / 4.0, elements),
                rows=np.where(np.isnan(rows), 1e9, rows),
                row_elements=np.where(np.isnan(lanes), 512.0, lanes),
                cold=cold,
            )  # fmt: skip
            np.add.at(out, index.astype(int), seconds)
        return out

    def roofline(self, hw: Hardware) -> Array:
        """Bytes over the datasheet's bandwidth."""
        out = np.zeros(len(self.no_gap))
        for index, read, written, *_ in self.kinds.values():
            np.add.at(out, index.astype(int), (read + written) / hw.memory_bandwidth)
        return out


def informed(rows: pd.DataFrame) -> list[str]:
    """The parameters that these rows can say something about."""
    kinds = {k.kind for kernels in rows.kernels for k in kernels}
    found = {f for kind in kinds for f in KINDS[kind] if isinstance(f, str)}
    if "vidur" in set(rows.source):
        found |= {"launch_floor", "l2_ratio", "l2_usable"}
    if "liger" in set(rows.source):
        found |= {"kernel_gap"}
    return [f for f in BOUNDS if f in found]


class PointwiseFit(NamedTuple):
    """What a fit found: parameters, those in doubt, and seconds that each benchmark adds to a row of this board."""

    parameters: PointwiseParameters
    caveats: FitCaveats
    overheads: dict[str, float]


def fit_pointwise(rows: pd.DataFrame, hw: Hardware, begin: PointwiseParameters) -> PointwiseFit:
    """Every source and family weighs alike; a weak prior holds what data do not."""
    names, batch, measured = informed(rows), Batch(rows), column(rows, "seconds")
    added = {name: seconds for name, seconds in OVERHEADS.items() if name in set(rows.source)}
    sizes = np.asarray(rows.groupby(["source", "family"]).seconds.transform("size"))
    noise = 1.0 / (1.0 + np.where(rows.source == "vidur", 0.5e-6, 0.0) / measured / 0.05)
    weight = noise * np.sqrt(100.0 / sizes)
    bounds = BOUNDS | {"launch_floor": (BOUNDS["launch_floor"][0], SHORTEST / hw.clock_hz)}
    limits = [*(bounds[f] for f in names), *((s / LONGEST, s * LONGEST) for s in added.values())]
    low, high = np.log(limits).T
    usual = np.log([*(getattr(begin, f) for f in names), *added.values()])
    first = np.clip(usual, low + 1e-6, high - 1e-6)

    def make(x: Array) -> tuple[PointwiseParameters, dict[str, float]]:
        values: list[float] = np.exp(x).tolist()
        known = dict(zip((*names, *added), values, strict=True))
        return replace(begin, **{f: known[f] for f in names}), {f: known[f] for f in added}

    def price(x: Array) -> Array:
        return batch.price(hw, *make(x))

    def residuals(x: Array) -> Array:
        return np.concatenate([weight * np.log(price(x) / measured), PRIOR * (x - first)])

    end = least_squares(residuals, first, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=60).x
    x, caveats = settled((*names, *added), end, usual, (low, high), price)
    p, overheads = make(x)
    return PointwiseFit(p, caveats.but(added, FitCaveats()).but_kept(unsearched(p, names)), overheads)


def judge_families(
    rows: pd.DataFrame, hw: Hardware, p: PointwiseParameters, overheads: Mapping[str, float] = OVERHEADS
) -> dict[str, FitErrors]:
    """Errors by source and family, and their average, in which every family weighs alike."""
    rows = rows[(rows.source != "vidur") | (rows.seconds >= 1e-5)].reset_index(drop=True)
    batch = Batch(rows)
    predicted, plain, seconds = batch.price(hw, p, overheads), batch.roofline(hw), column(rows, "seconds")
    found = {}
    for (source, family), part in rows.groupby(["source", "family"]):
        i = np.asarray(part.index)
        found[f"{source}_{family}".replace(" ", "_")] = FitErrors.of(predicted[i], plain[i], seconds[i])
    return {"all": FitErrors.average(found.values()), **found}


@dataclass(frozen=True)
class PointwiseResults:
    """Fits by device, the class default, errors of leaving a device out."""

    fits: dict[str, Fit]
    default: Fit
    left_out_device: dict[str, FitErrors]
    pairs: list[FitErrors]  # a device priced with a like device's parameters


def fit_pointwise_blocks(folder: Path, step: Callable[[str], None]) -> PointwiseResults:
    """Every device with rows; gaps are filled from the parent or the class."""
    rows = pointwise_rows(folder)
    rows = rows[~rows.host_bound]
    told: dict[str, PointwiseFit] = {}
    for slug in sorted(rows.gpu.unique(), key=lambda g: (list(PARENTS).index(g) + 1 if g in PARENTS else 0, g)):
        own = rows[(rows.gpu == slug) & (rows.fold != 0)]
        parent = told.get(PARENTS.get(slug, ""))
        told[slug] = fit_pointwise(own, hardware(slug), parent.parameters if parent else PointwiseParameters())
        step(f"pointwise {slug}")
    found = {slug: t.parameters for slug, t in told.items()}
    known = {slug: informed(rows[rows.gpu == slug]) for slug in found}
    default = class_default(found, known)
    fits, left_out = {}, {}

    def judge(slug: str, p: PointwiseParameters) -> FitErrors:
        return judge_families(rows[rows.gpu == slug], hardware(slug), p, told[slug].overheads)["all"]

    for slug, p in found.items():
        donor = found["a100-80gb-sxm"] if slug.startswith("a100") else default
        whole = told[slug]._replace(parameters=replace(donor, **{f: getattr(p, f) for f in known[slug]}))
        fits[slug] = _as_fit(rows[rows.gpu == slug], hardware(slug), whole)
        left_out[slug] = judge(slug, class_default({k: v for k, v in found.items() if k != slug}, known))
    pairs = [
        judge(slug, replace(default, **{f: getattr(found[donor], f) for f in known[slug]})) for slug, donor in PAIRS
    ]
    told_of_class = FittedParameters(default, _class_caveats(default, known))
    of_class = _class_fit(fits, told_of_class, left_out)
    return PointwiseResults(fits, of_class, left_out, pairs)


def _as_fit(rows: pd.DataFrame, hw: Hardware, told: PointwiseFit) -> Fit:
    errors = judge_families(rows[rows.fold == 0], hw, told.parameters, told.overheads)
    sources = [SOURCES[s] for s in SOURCES if s in set(rows.source)]
    return Fit(
        parameters=told.parameters,
        caveats=told.caveats,
        source=", ".join(url for url, _ in sources),
        software="; ".join(software for _, software in sources),
        rows_fitted=int((rows.fold != 0).sum()),
        rows_left_out=int((rows.fold == 0).sum()),
        errors=errors["all"],
        slices={k: v for k, v in errors.items() if k != "all"},
        notes="Parameters that these rows say nothing about come from a like device or the class. "
        + ", ".join(f"{name} adds {seconds * 1e6:.1f} us to a row" for name, seconds in told.overheads.items()),
    )


def class_default(found: dict[str, PointwiseParameters], known: dict[str, list[str]]) -> PointwiseParameters:
    """Median over the devices whose rows speak about a parameter; the dataclass's default where none does."""
    values = {}
    for name in BOUNDS:
        seen = [getattr(p, name) for slug, p in found.items() if name in known[slug]]
        if seen:
            values[name] = float(np.median(seen))
    return replace(PointwiseParameters(), **values)


def _class_caveats(default: PointwiseParameters, known: dict[str, list[str]]) -> FitCaveats:
    """What no device's rows speak about, and medians at a bound."""
    seen = [name for name in BOUNDS if any(name in names for names in known.values())]
    low, high = np.log([BOUNDS[name] for name in seen]).T
    ends = at_ends(seen, np.log([getattr(default, name) for name in seen]), (low, high))
    return FitCaveats(unsearched(default, seen), tuple(ends))


def _class_fit(
    fits: dict[str, Fit], default: FittedParameters[PointwiseParameters], left_out: dict[str, FitErrors]
) -> Fit:
    return Fit(
        parameters=default.parameters,
        caveats=default.caveats,
        source="medians over " + ", ".join(sorted(fits)) + ": " + ", ".join(url for url, _ in SOURCES.values()),
        software="; ".join(software for _, software in SOURCES.values()),
        rows_fitted=sum(f.rows_fitted for f in fits.values()),
        rows_left_out=sum(f.rows_left_out for f in fits.values()),
        errors=FitErrors.average(left_out.values()),
    )
