"""Fits the attention model: FlashAttention-2 on every GPU, cuDNN's kernel where PyTorch prefers it.

PyTorch's flash kernel (and the flash-attn package below version 3) is FlashAttention-2 on every GPU: serving
frameworks' on A100 and L40S, papers, issues and NVIDIA's benchmark on the others. What stands for cuDNN's kernels says
`serving`; their maker's benchmark has part in it and alone tells their backward pass. What serving frameworks do beside
a kernel is left out of the profile. Backward has published rows only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from perfmodel.devices.attention import WIDE, AttentionParameters
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array

from ..judging import Fit, FitErrors, FittedParameters, column, hardware, settled, unsearched
from . import flash_papers, serving
from .flash_papers import published_errors, published_time
from .serving import (
    AICONFIGURATOR,
    KernelTimes,
    ServedKernel,
    ServingFit,
    attention_rows,
    fit_served,
    serving_errors,
    shares_of,
)

# GA102 with full-rate tensor cores: https://www.nvidia.com/en-us/design-visualization/rtx-a5000/
RTX_A5000 = Hardware(64, 1.695e9, 24 * 2**30, 768e9, 6 * 2**20, 27.8e12, 55.6e12, 111.1e12, 111.1e12)
# cuDNN's own figures by the device whose kernel they are: forward, and backward with those of a sibling
CUDNN_FORWARD = {"h100-sxm": ("h200",), "b200": ("b200", "gb200")}
CUDNN_BACKWARD = {"h100-sxm": "h200", "b200": "gb200"}
NOTES = {  # which kernel stands for cuDNN's, and why
    "h100-sxm": "FlashAttention-3 stands for cuDNN's kernel.",
    "b200": "TensorRT-LLM's kernel stands for cuDNN's, whose own figures weigh as much as its.",
}
OF_BACKWARD = ("backward_efficiency", "backward_cta_overhead", "backward_wide")


def fit_published(d: pd.DataFrame, hw: Hardware, base: AttentionParameters) -> FittedParameters[AttentionParameters]:
    """Efficiencies and overheads of forward, then of backward, from the few published rows; the rest from `base`."""
    train = d[~d.left_out]
    forward, backward = train[train.direction == "forward"], train[train.direction == "backward"]
    sizes = sorted(int(s) for s in forward.head_dim.unique())
    clock = hw.clock_hz

    def with_forward(x: Array) -> AttentionParameters:
        efficiency = tuple((s, float(e)) for s, e in zip(sizes, np.exp(x[2:]), strict=True)) or base.efficiency
        overhead, exposed = float(np.exp(x[0])) * clock, float(np.exp(x[1]))
        return replace(base, cta_overhead=overhead, exposed_memory=exposed, efficiency=efficiency)

    first = np.log([1e-6, 0.3] + [0.4] * len(sizes))
    low, high = np.log([1e-8, 0.01] + [0.03] * len(sizes)), np.log([3e-5, 2.0] + [1.3] * len(sizes))
    names = ("cta_overhead", "exposed_memory", *shares_of(sizes))
    usual = np.log([base.cta_overhead / clock, base.exposed_memory, *base.efficiency_at(sizes)])
    seen = _solve(names, with_forward, usual, forward, hw, first, (low, high))
    found = fit_backward(backward, hw, seen.parameters)
    caveats = seen.caveats.but_kept(unsearched(seen.parameters, (*names, *OF_BACKWARD)))
    return FittedParameters(found.parameters, caveats.but(OF_BACKWARD, found.caveats))


def fit_backward(
    backward: pd.DataFrame, hw: Hardware, base: AttentionParameters
) -> FittedParameters[AttentionParameters]:
    """What is backward's in the parameters, from published rows; the rate of wide heads if there are any."""
    clock = hw.clock_hz
    wide = bool((backward.head_dim > WIDE).any())
    names = OF_BACKWARD if wide else OF_BACKWARD[:2]

    def with_backward(x: Array) -> AttentionParameters:
        efficiency, overhead, *rest = (float(v) for v in np.exp(x))
        p = replace(base, backward_efficiency=efficiency, backward_cta_overhead=overhead * clock)
        return replace(p, backward_wide=rest[0]) if wide else p

    first, low, high = (np.log(v[: len(names)]) for v in ((0.8, 6e-6, 0.8), (0.2, 1e-8, 0.2), (1.3, 1e-4, 1.3)))
    usual = np.log([base.backward_efficiency, base.backward_cta_overhead / clock, base.backward_wide][: len(names)])
    found = _solve(names, with_backward, usual, backward, hw, first, (low, high))
    return FittedParameters(found.parameters, found.caveats.but_kept(OF_BACKWARD[len(names) :]))


def _solve(
    names: Sequence[str], make: Callable[[Array], AttentionParameters], usual: Array, d: pd.DataFrame, hw: Hardware,
    first: Array, limits: tuple[Array, Array],
) -> FittedParameters[AttentionParameters]:  # fmt: skip
    """Least squares; a weak pull holds the first two values, which few points determine badly."""

    def price(x: Array) -> Array:
        return published_time(d, hw, make(x))

    def residuals(x: Array) -> Array:
        return np.append(np.log(price(x) / column(d, "seconds")), 0.02 * (x - first)[:2])

    x, caveats = settled(names, least_squares(residuals, first, bounds=limits).x, usual, limits, price)
    return FittedParameters(make(x), caveats)


def filled(
    told: FittedParameters[AttentionParameters], shape: AttentionParameters
) -> FittedParameters[AttentionParameters]:
    """Efficiencies for the head sizes that only `shape` knows, by its ratio to the nearest known size."""
    own, other = dict(told.parameters.efficiency), dict(shape.efficiency)
    more = {}
    for size in other.keys() - own:
        near = min(own, key=lambda k, size=size: abs(np.log(k / size)))  # type: ignore[misc]
        if near in other:
            more[size] = own[near] * other[size] / other[near]
    p = replace(told.parameters, efficiency=tuple(sorted({**own, **more}.items())))
    return FittedParameters(p, told.caveats.but_kept(shares_of(sorted(more))))


def published_fit(slug: str, hw: Hardware, told: FittedParameters[AttentionParameters]) -> Fit:
    """A device whose rows are published figures alone, enough of them to leave some out."""
    d, p = flash_papers.flash_rows(slug), told.parameters
    out = d[d.left_out]
    slices = {str(name): published_errors(part, hw, p) for name, part in out.groupby("direction")}
    software = "FlashAttention-2, fp16"
    return Fit(p, flash_papers.SOURCES[slug], software, int((~d.left_out).sum()), int(d.left_out.sum()),
               published_errors(out, hw, p), slices, caveats=told.caveats)  # fmt: skip


def few_rows_fit(
    slug: str, hw: Hardware, base: AttentionParameters, told: FittedParameters[AttentionParameters]
) -> Fit:
    """A device with too few rows to leave a third out: errors by leaving out one mask and head size at a time."""
    d = flash_papers.flash_rows(slug)
    errors = []
    for (causal, size), part in d.groupby(["causal", "head_dim"]):
        others = d[(d.causal != causal) | (d.head_dim != size)]
        errors.append(published_errors(part, hw, fit_published(others, hw, base).parameters))
    note = "Too few rows to leave a third out: residuals by leaving out one mask and head size at a time."
    return Fit(told.parameters, flash_papers.SOURCES[slug], "FlashAttention-2, fp16", len(d), 0,
               FitErrors.average(errors), notes=note, caveats=told.caveats)  # fmt: skip


def served_fit(
    slug: str, campaigns: Sequence[ServedKernel], rows: Sequence[pd.DataFrame], served: Sequence[ServingFit],
    told: FittedParameters[AttentionParameters], note: str,
) -> Fit:  # fmt: skip
    """A device with serving rows; what was told beside them, the note says."""
    judged = [(d[d.left_out], s) for d, s in zip(rows, served, strict=True)]
    found = serving_errors(judged, hardware(slug))
    slices = {"below_512_tokens": found["short"]} if "short" in found else {}
    if len(campaigns) > 1:
        each = zip(campaigns, judged, strict=True)
        slices |= {c.framework.lower(): serving_errors([part], hardware(slug))["long"] for c, part in each}
    software = f"{', '.join(c.software for c in campaigns)}, causal prefill"
    left_out = sum(int(d.left_out.sum()) for d in rows)
    return Fit(told.parameters, AICONFIGURATOR, software, sum(map(len, rows)) - left_out, left_out,
               found["long"], slices, note, told.caveats)  # fmt: skip


def fit_cudnn(folder: Path, slug: str) -> Fit:
    """cuDNN's kernels on a device: forward by serving rows and its own figures, backward by its own figures."""
    campaigns = serving.CUDNN[slug]
    rows = [attention_rows(folder, c) for c in campaigns]
    own = KernelTimes(
        {s: d[d.direction == "forward"] for s in CUDNN_FORWARD[slug] for d in [flash_papers.cudnn_rows(s)]}
    )
    served = fit_served([(hardware(slug), d) for d in rows], own, serving.ROW_TILES.get(slug, 1))
    forward, sibling = served[0].training(), CUDNN_BACKWARD[slug]
    d = flash_papers.cudnn_rows(sibling)
    backward = d[d.direction == "backward"]
    seen = fit_backward(backward[~backward.left_out], hardware(sibling), forward.parameters)
    told = FittedParameters(seen.parameters, forward.caveats.but(OF_BACKWARD, seen.caveats).but_kept(("launch_floor",)))
    off = own.ratios(told.parameters) - 1.0
    note = (
        f"{NOTES[slug]} cuDNN's own figures ({flash_papers.CUDNN}: {', '.join(own.rows)}; {len(off)} forward, seen and "
        f"left out) are priced {np.mean(off):+.1%}. Backward: own figures of the {sibling}."
    )
    fit = served_fit(slug, campaigns, rows, served, told, note)
    left = backward[backward.left_out]
    errors = {"backward": published_errors(left, hardware(sibling), told.parameters)} if len(left) else {}
    return replace(fit, source=f"{fit.source}, {flash_papers.CUDNN}", slices={**fit.slices, **errors})


@dataclass(frozen=True)
class AttentionResults:
    """Fits by device (rtx-a5000 among them), class defaults by family, errors of leaving a device out; cuDNN's fits."""

    fits: dict[str, Fit]
    classes: dict[str, Fit]
    left_out_device: dict[str, FitErrors]
    cudnn: dict[str, Fit]


def fit_attention(folder: Path) -> AttentionResults:
    """Every device and class: they borrow from each other, and all takes seconds."""
    rows = {slug: attention_rows(folder, campaigns[0]) for slug, campaigns in serving.FLASH.items()}
    served = {slug: fit_served([(hardware(slug), d)])[0] for slug, d in rows.items()}
    ampere_base, ada_base = served["a100-80gb-sxm"].training(), served["l40s"].training()
    points = {slug: flash_papers.flash_rows(slug) for slug in flash_papers.SOURCES}
    hopper = fit_published(points["h100-sxm"], hardware("h100-sxm"), ampere_base.parameters)
    ada = fit_published(points["rtx-4090"], hardware("rtx-4090"), ada_base.parameters)
    h100, rtx = hopper.parameters, ada.parameters
    b200 = filled(fit_published(points["b200"], hardware("b200"), ampere_base.parameters), h100)
    a5000 = filled(fit_published(points["rtx-a5000"], RTX_A5000, ampere_base.parameters), h100)
    a100 = filled(ampere_base, h100).borrowed(
        backward_efficiency=flash_papers.A100_BACKWARD_EFFICIENCY, backward_cta_overhead=h100.backward_cta_overhead
    )
    l40s = ada_base.borrowed(
        backward_efficiency=rtx.backward_efficiency, backward_cta_overhead=rtx.backward_cta_overhead
    )
    a100_note = (
        f"Backward: {flash_papers.A100_BACKWARD} and the H100's overhead in clocks; no row of its own."
        " Head sizes other than 128: by their ratio on H100."
    )
    l40s_note = "Backward: ratios of the RTX 4090; no row of its own."
    fits = {
        slug: served_fit(slug, serving.FLASH[slug], [rows[slug]], [served[slug]], told, note)
        for slug, told, note in (("a100-80gb-sxm", a100, a100_note), ("l40s", l40s, l40s_note))
    }
    fits |= {
        "h100-sxm": published_fit("h100-sxm", hardware("h100-sxm"), hopper),
        "rtx-4090": few_rows_fit("rtx-4090", hardware("rtx-4090"), ada_base.parameters, ada),
        "b200": published_fit("b200", hardware("b200"), b200),
        "rtx-a5000": published_fit("rtx-a5000", RTX_A5000, a5000),
    }
    left_out = leave_out_each(rows, served, fits)
    cudnn = {slug: fit_cudnn(folder, slug) for slug in serving.CUDNN}
    return AttentionResults(fits, class_defaults(rows, fits, left_out), left_out, cudnn)


def leave_out_each(
    rows: dict[str, pd.DataFrame], served: dict[str, ServingFit], fits: dict[str, Fit]
) -> dict[str, FitErrors]:
    """Each device priced with the parameters of the other one of its family."""
    found = {}
    for slug, other in (("a100-80gb-sxm", "l40s"), ("l40s", "a100-80gb-sxm")):
        full = fits[other].parameters
        assert isinstance(full, AttentionParameters)
        donor = replace(served[other], parameters=replace(served[other].parameters, efficiency=full.efficiency))
        found[slug] = serving_errors([(rows[slug], donor)], hardware(slug))["long"]
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
    together = fit_served([(hardware(slug), d) for slug, d in rows.items()])[0]
    joint = filled(together.training(), hopper).borrowed(
        backward_efficiency=a100.backward_efficiency, backward_cta_overhead=a100.backward_cta_overhead
    )
    sync = FitErrors.average([left_out["a100-80gb-sxm"], left_out["l40s"]])
    newer = FitErrors.average([left_out["h100-sxm"], left_out["b200"]])
    sync_fit = Fit(
        parameters=joint.parameters,
        caveats=joint.caveats,
        source=f"{AICONFIGURATOR} (A100 SXM, L40S)",
        software="SGLang 0.5.10 and vLLM 0.24, FlashAttention-2",
        rows_fitted=sum(fits[slug].rows_fitted for slug in serving.FLASH),
        rows_left_out=sum(fits[slug].rows_left_out for slug in serving.FLASH),
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
