"""Fits the attention model to causal prefill rows of aiconfigurator and to published FlashAttention-2 speeds.

PyTorch's flash kernel (and the flash-attn package below version 3) is FlashAttention-2 on every GPU, so only rows of
FA2 kernels count: serving frameworks' FA2 on A100 and L40S, papers and issues on the others. Serving frameworks also
copy k and v into a paged cache beside the kernel; `append` (bytes moved per byte of k and v) prices that in the fit
and is left out of the profile. Backward has published rows only.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from perfmodel.devices.attention import (
    AttentionParameters,
    attention_backward_time,
    attention_flops,
    attention_forward_time,
    seconds_per_byte,
)
from perfmodel.devices.hardware import Hardware

from . import flash_papers
from .judging import Array, Fit, FitErrors, column, fold, hardware, measured_table

AICONFIGURATOR = "https://github.com/ai-dynamo/aiconfigurator"
# device: name in the measurements, framework, version, kernel
SERVING = {
    "a100-80gb-sxm": ("a100_sxm", "SGLang", "0.5.10", "flash_attention"),
    "l40s": ("l40s", "VLLM", "0.24.0", "vllm_flash_attn_fa2"),
}
# GA102 with full-rate tensor cores: https://www.nvidia.com/en-us/design-visualization/rtx-a5000/
RTX_A5000 = Hardware(64, 1.695e9, 24 * 2**30, 768e9, 6 * 2**20, 27.8e12, 55.6e12, 111.1e12, 111.1e12)
SHAPE = ["batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim"]
LAUNCH_FLOOR = 4e-6  # s: serving frameworks' floors contain more than the kernel
SCALARS = ("launch_floor", "cta_overhead", "alone", "p", "exposed_memory", "l2_ratio", "append")
START = (6e-6, 3000.0, 0.7, 1.6, 0.5, 1.5, 1.5)
LOW = (1e-6, 1.0, 0.2, 1.02, 0.02, 1.0, 0.02)
HIGH = (3e-5, 4e4, 3.0, 8.0, 3.0, 6.0, 6.0)


@dataclass(frozen=True)
class Served:
    """A kernel inside a serving framework: the kernel, and its cache copy in bytes per byte of k and v."""

    parameters: AttentionParameters
    append: float

    def training(self) -> AttentionParameters:
        """The kernel alone."""
        return replace(self.parameters, launch_floor=LAUNCH_FLOOR)


def attention_rows(folder: Path, slug: str) -> pd.DataFrame:
    """Full-causal rows of a device's FA2 kernel (no window), the median of repeated shapes."""
    d = measured_table(folder, "attention_forward_bf16.parquet")
    gpu, framework, version, kernel = SERVING[slug]
    d = d[(d.gpu == gpu) & (d.framework == framework) & (d.version == version) & (d.kernel_source == kernel)]
    d = d[d.window_size.isna() | (d.window_size == 0)]
    d = d.groupby(SHAPE)["latency_ms"].median().reset_index()
    left_out = [fold(*(int(v) for v in row)) == 0 for row in d[SHAPE].itertuples(index=False)]
    return d.assign(seconds=d.latency_ms * 1e-3, left_out=left_out)


def priced_serving(d: pd.DataFrame, hw: Hardware, served: Served) -> Array:
    """Seconds of serving rows, the cache copy included."""
    b, s, h, kv, dim = (column(d, c) for c in SHAPE)
    copied = 2.0 * b * s * kv * dim * 2.0  # bytes of k and v
    per_byte = seconds_per_byte(copied + 2.0 * b * s * h * dim * 2.0, hw, served.parameters.l2_ratio)
    kernel = attention_forward_time(b, s, s, h, kv, dim, hardware=hw, parameters=served.parameters)
    return kernel + served.append * copied * per_byte


def errors(d: pd.DataFrame, hw: Hardware, served: Served) -> dict[str, FitErrors]:
    """Errors from 512 tokens up, and below."""
    b, s, h, kv, dim = (column(d, c) for c in SHAPE)
    plain = np.maximum(
        attention_flops(b, s, s, h, dim) / hw.peak("bf16"), 4.0 * b * s * dim * (h + kv) / hw.memory_bandwidth
    )
    predicted, seconds = priced_serving(d, hw, served), column(d, "seconds")
    return {
        name: FitErrors.of(predicted[k], plain[k], seconds[k]) for name, k in (("long", s >= 512), ("short", s < 512))
    }


def fit_served(rows_of: dict[str, pd.DataFrame]) -> Served:
    """One set for all devices of `rows_of`, each weighted alike."""
    sizes = sorted({int(s) for d in rows_of.values() for s in d.head_dim.unique()})
    used = [(d[~d.left_out], hardware(slug)) for slug, d in rows_of.items()]
    weights = [np.sqrt(1.0 / len(d)) if len(used) > 1 else 1.0 for d, _ in used]
    scale = 30.0 if len(used) > 1 else 1.0

    def unpack(x: Array) -> Served:
        v = dict(zip(SCALARS, map(float, np.exp(x)), strict=False))
        efficiency = tuple((s, float(e)) for s, e in zip(sizes, np.exp(x[len(SCALARS) :]), strict=True))
        append = v.pop("append")
        return Served(AttentionParameters(**v, efficiency=efficiency), append)

    def residuals(x: Array) -> Array:
        served = unpack(x)
        parts = [
            w * scale * np.log(priced_serving(d, hw, served) / column(d, "seconds"))
            for (d, hw), w in zip(used, weights, strict=True)
        ]
        return np.concatenate(parts)

    first = np.log([*START, *[0.55] * len(sizes)])
    limits = (np.log([*LOW, *[0.03] * len(sizes)]), np.log([*HIGH, *[1.2] * len(sizes)]))
    return unpack(least_squares(residuals, first, bounds=limits, loss="soft_l1", f_scale=0.1, max_nfev=100).x)


def published_time(d: pd.DataFrame, hw: Hardware, p: AttentionParameters) -> Array:
    """Seconds of published rows."""
    out = np.empty(len(d))
    for (causal, direction), part in d.reset_index(drop=True).groupby(["causal", "direction"]):
        time = attention_forward_time if direction == "forward" else attention_backward_time
        b, s, h, dim = (column(part, c) for c in ("batch", "seq", "heads", "head_dim"))
        out[np.asarray(part.index)] = time(b, s, s, h, h, dim, causal=bool(causal), hardware=hw, parameters=p)
    return out


def published_errors(d: pd.DataFrame, hw: Hardware, p: AttentionParameters) -> FitErrors:
    """Errors on published rows."""
    s, b, h, dim = (column(d, c) for c in ("seq", "batch", "heads", "head_dim"))
    flops = 4.0 * b * h * s * s * dim * np.where(d.causal, 0.5, 1.0) * np.where(d.direction == "backward", 2.5, 1.0)
    moved = b * s * h * dim * 2.0 * np.where(d.direction == "backward", 8.0, 4.0)
    plain = np.maximum(flops / hw.peak("bf16"), moved / hw.memory_bandwidth)
    return FitErrors.of(published_time(d, hw, p), plain, column(d, "seconds"))


def fit_published(d: pd.DataFrame, hw: Hardware, base: AttentionParameters) -> AttentionParameters:
    """Efficiencies and overheads of forward, then of backward, from the few published rows; the rest from `base`."""
    train = d[~d.left_out]
    forward, backward = train[train.direction == "forward"], train[train.direction == "backward"]
    sizes = sorted(int(s) for s in forward.head_dim.unique())
    clock = hw.clock_hz

    def with_forward(x: Array) -> AttentionParameters:
        efficiency = tuple((s, float(e)) for s, e in zip(sizes, np.exp(x[2:]), strict=True))
        overhead, exposed = float(np.exp(x[0])) * clock, float(np.exp(x[1]))
        return replace(base, cta_overhead=overhead, exposed_memory=exposed, efficiency=efficiency)

    first = np.log([1e-6, 0.3] + [0.4] * len(sizes))
    low, high = np.log([1e-8, 0.01] + [0.03] * len(sizes)), np.log([3e-5, 2.0] + [1.3] * len(sizes))
    p = with_forward(_solve(with_forward, forward, hw, first, low, high, prior=2))

    def with_backward(x: Array) -> AttentionParameters:
        return replace(p, backward_efficiency=float(np.exp(x[0])), backward_cta_overhead=float(np.exp(x[1])) * clock)

    first, low, high = np.log([0.8, 6e-6]), np.log([0.2, 1e-8]), np.log([1.3, 1e-4])
    return with_backward(_solve(with_backward, backward, hw, first, low, high, prior=2))


def _solve(
    make: Callable[[Array], AttentionParameters], d: pd.DataFrame, hw: Hardware, first: Array, low: Array, high: Array,
    *, prior: int,
) -> Array:  # fmt: skip
    """Least squares; a weak pull holds the first `prior` values, which few points determine badly."""

    def residuals(x: Array) -> Array:
        errors = np.log(published_time(d, hw, make(x)) / column(d, "seconds"))
        return np.append(errors, 0.02 * (x - first)[:prior])

    return np.asarray(least_squares(residuals, first, bounds=(low, high)).x)


def filled(p: AttentionParameters, shape: AttentionParameters) -> AttentionParameters:
    """Efficiencies for the head sizes that only `shape` knows, by its ratio to the nearest known size."""
    known, other = dict(p.efficiency), dict(shape.efficiency)
    for size in other:
        if size not in dict(p.efficiency):
            near = min(dict(p.efficiency), key=lambda k, size=size: abs(np.log(k / size)))  # type: ignore[misc]
            if near in other:
                known[size] = known[near] * other[size] / other[near]
    return replace(p, efficiency=tuple(sorted(known.items())))


def published_fit(slug: str, hw: Hardware, p: AttentionParameters) -> Fit:
    """A device whose rows are published figures alone, enough of them to leave some out."""
    d = flash_papers.flash_rows(slug)
    out = d[d.left_out]
    slices = {str(name): published_errors(part, hw, p) for name, part in out.groupby("direction")}
    software = "FlashAttention-2, fp16"
    return Fit(p, flash_papers.SOURCES[slug], software, int((~d.left_out).sum()), int(d.left_out.sum()),
               published_errors(out, hw, p), slices)  # fmt: skip


def few_rows_fit(slug: str, hw: Hardware, base: AttentionParameters, p: AttentionParameters) -> Fit:
    """A device with too few rows to leave a third out: errors by leaving out one mask and head size at a time."""
    d = flash_papers.flash_rows(slug)
    errors = []
    for (causal, size), part in d.groupby(["causal", "head_dim"]):
        others = d[(d.causal != causal) | (d.head_dim != size)]
        errors.append(published_errors(part, hw, fit_published(others, hw, base)))
    note = "Too few rows to leave a third out: residuals by leaving out one mask and head size at a time."
    return Fit(
        p, flash_papers.SOURCES[slug], "FlashAttention-2, fp16", len(d), 0, FitErrors.average(errors), notes=note
    )


def served_fit(slug: str, rows: pd.DataFrame, served: Served, p: AttentionParameters, note: str) -> Fit:
    """A device with serving rows; its backward is borrowed."""
    found = errors(rows[rows.left_out], hardware(slug), served)
    _, framework, version, kernel = SERVING[slug]
    return Fit(p, AICONFIGURATOR, f"{framework} {version} {kernel}, causal prefill", int((~rows.left_out).sum()),
               int(rows.left_out.sum()), found["long"], {"below_512_tokens": found["short"]}, note)  # fmt: skip


@dataclass(frozen=True)
class AttentionResults:
    """Fits by device (rtx-a5000 among them), class defaults by family, errors of leaving a device out."""

    fits: dict[str, Fit]
    classes: dict[str, Fit]
    left_out_device: dict[str, FitErrors]


def fit_attention(folder: Path) -> AttentionResults:
    """Every device and class: they borrow from each other, and all takes seconds."""
    rows = {slug: attention_rows(folder, slug) for slug in SERVING}
    served = {slug: fit_served({slug: d}) for slug, d in rows.items()}
    ampere_base, ada_base = served["a100-80gb-sxm"].training(), served["l40s"].training()
    points = {slug: flash_papers.flash_rows(slug) for slug in flash_papers.SOURCES}
    hopper = fit_published(points["h100-sxm"], hardware("h100-sxm"), ampere_base)
    ada = fit_published(points["rtx-4090"], hardware("rtx-4090"), ada_base)
    b200 = filled(fit_published(points["b200"], hardware("b200"), ampere_base), hopper)
    a5000 = filled(fit_published(points["rtx-a5000"], RTX_A5000, ampere_base), hopper)
    a100 = replace(
        filled(ampere_base, hopper),
        backward_efficiency=flash_papers.A100_BACKWARD_EFFICIENCY,
        backward_cta_overhead=hopper.backward_cta_overhead,
    )
    l40s = replace(
        ada_base, backward_efficiency=ada.backward_efficiency, backward_cta_overhead=ada.backward_cta_overhead
    )
    a100_note = (
        f"Backward: {flash_papers.A100_BACKWARD} and the H100's overhead in clocks; no row of its own."
        " Head sizes other than 128: by their ratio on H100."
    )
    l40s_note = "Backward: ratios of the RTX 4090; no row of its own."
    fits = {
        "a100-80gb-sxm": served_fit("a100-80gb-sxm", rows["a100-80gb-sxm"], served["a100-80gb-sxm"], a100, a100_note),
        "l40s": served_fit("l40s", rows["l40s"], served["l40s"], l40s, l40s_note),
        "h100-sxm": published_fit("h100-sxm", hardware("h100-sxm"), hopper),
        "rtx-4090": few_rows_fit("rtx-4090", hardware("rtx-4090"), ada_base, ada),
        "b200": published_fit("b200", hardware("b200"), b200),
        "rtx-a5000": published_fit("rtx-a5000", RTX_A5000, a5000),
    }
    left_out = leave_out_each(rows, served, fits)
    return AttentionResults(fits, class_defaults(rows, fits, left_out), left_out)


def leave_out_each(
    rows: dict[str, pd.DataFrame], served: dict[str, Served], fits: dict[str, Fit]
) -> dict[str, FitErrors]:
    """Each device priced with the parameters of the other one of its family."""
    found = {}
    for slug, other in (("a100-80gb-sxm", "l40s"), ("l40s", "a100-80gb-sxm")):
        full = fits[other].parameters
        assert isinstance(full, AttentionParameters)
        donor = replace(served[other], parameters=replace(served[other].parameters, efficiency=full.efficiency))
        found[slug] = errors(rows[slug], hardware(slug), donor)["long"]
    for slug, other in (("h100-sxm", "b200"), ("b200", "h100-sxm")):
        p = fits[other].parameters
        assert isinstance(p, AttentionParameters)
        moved = carried(p, hardware(other), hardware(slug))
        found[slug] = published_errors(flash_papers.flash_rows(slug), hardware(slug), moved)
    return found


def carried(p: AttentionParameters, origin: Hardware, target: Hardware) -> AttentionParameters:
    """Parameters for a like device, where FA2's mma.sync does not reach the newer tensor instructions' peak.

    An SM does the same FLOPs a clock in it on Hopper and on Blackwell, so the share of peak goes with 1 / that peak.
    """
    ratio = _peak_per_clock(origin) / _peak_per_clock(target)
    return replace(p, efficiency=tuple((size, share * ratio) for size, share in p.efficiency))


def _peak_per_clock(hw: Hardware) -> float:
    return hw.peak("bf16") / (hw.sm_count * hw.clock_hz)


def class_defaults(
    rows: dict[str, pd.DataFrame], fits: dict[str, Fit], left_out: dict[str, FitErrors]
) -> dict[str, Fit]:
    """sync_mma from A100 and L40S together, wgmma from H100, tcgen05 from B200, half_rate from RTX 4090."""
    a100, hopper = fits["a100-80gb-sxm"].parameters, fits["h100-sxm"].parameters
    assert isinstance(a100, AttentionParameters)
    assert isinstance(hopper, AttentionParameters)
    joint = replace(
        filled(fit_served(rows).training(), hopper),
        backward_efficiency=a100.backward_efficiency,
        backward_cta_overhead=a100.backward_cta_overhead,
    )
    sync = FitErrors.average([left_out["a100-80gb-sxm"], left_out["l40s"]])
    newer = FitErrors.average([left_out["h100-sxm"], left_out["b200"]])
    sync_fit = Fit(
        parameters=joint,
        source=f"{AICONFIGURATOR} (A100 SXM, L40S)",
        software="SGLang 0.5.10 and vLLM 0.24, FlashAttention-2",
        rows_fitted=sum(fits[slug].rows_fitted for slug in SERVING),
        rows_left_out=sum(fits[slug].rows_left_out for slug in SERVING),
        errors=sync,
        notes="Backward as on A100.",
    )
    alone = "No second such card to leave out: residuals of the other mma.sync devices."
    return {
        "sync_mma": sync_fit,
        "half_rate": replace(fits["rtx-4090"], errors=sync, slices={}, notes=f"RTX 4090. {alone}"),
        "wgmma": replace(fits["h100-sxm"], errors=newer, slices={}, notes="H100 SXM."),
        "tcgen05": replace(fits["b200"], errors=newer, slices={}, notes="B200."),
    }
