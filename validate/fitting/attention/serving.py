"""Attention as serving frameworks run it: causal prefill rows of aiconfigurator, and fits to them.

Which measured kernel stands for which of PyTorch's:

- FlashAttention-2 (PyTorch's flash kernel, and the flash-attn package below version 3) on A100 and L40S: theirs.
- cuDNN on Hopper: FlashAttention-3 of SGLang and vLLM. cuDNN's own figures on an H200 lie within a few per cent of it.
- cuDNN on data-centre Blackwell: TensorRT-LLM's kernel in SGLang and vLLM, which is a tenth to a fifth slower than
  cuDNN's own figures of up to 16k tokens, and as fast at 32k, where the board throttles. Both weigh alike in the fit.

Left out: FlashInfer's and TensorRT-LLM's own attention layers (Hopper: an older kernel; Blackwell: with copies beside
it), older versions, and rows that would beat the peak (SGLang 0.5.10 on B200, 0.5.12 on L40S).

Frameworks copy k and v into a paged cache beside the kernel, and launch more than it: `append` (bytes moved per byte of
k and v) and the floor are each framework's own in a fit and stay out of the profile.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from perfmodel.devices.attention import AttentionParameters, attention_flops, attention_forward_time, seconds_per_byte
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array

from ..judging import (
    FitCaveats,
    FitErrors,
    FittedParameters,
    column,
    fold,
    hardware,
    measured_table,
    settled,
    unsearched,
)
from .flash_papers import published_time

AICONFIGURATOR = "https://github.com/ai-dynamo/aiconfigurator"
SHAPE = ["batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim"]
LAUNCH_FLOOR = 4e-6  # s: serving frameworks' floors contain more than the kernel
LARGEST_HEAD = 256  # of PyTorch's kernels
SCALARS = ("cta_overhead", "alone", "p", "exposed_memory", "l2_ratio")
START = (3000.0, 0.7, 1.6, 0.5, 1.5)
LOW = (1.0, 0.2, 1.02, 0.02, 1.0)
HIGH = (4e4, 3.0, 8.0, 3.0, 6.0)
BESIDE = ("launch_floor", "append")  # of each framework
BESIDE_START, BESIDE_LOW, BESIDE_HIGH = (6e-6, 1.5), (1e-6, 0.02), (3e-5, 6.0)


class ServedKernel(NamedTuple):
    """Measurements of one kernel in one framework, by their names there."""

    gpu: str
    framework: str
    version: str
    kernel: str

    @property
    def software(self) -> str:
        """The framework, its version and the kernel."""
        return f"{self.framework} {self.version} {self.kernel}"


FLASH = {
    "a100-80gb-sxm": (ServedKernel("a100_sxm", "SGLang", "0.5.10", "flash_attention"),),
    "l40s": (ServedKernel("l40s", "VLLM", "0.24.0", "vllm_flash_attn_fa2"),),
}
CUDNN = {
    "h100-sxm": (
        ServedKernel("h100_sxm", "SGLang", "0.5.14", "fa3"),
        ServedKernel("h100_sxm", "VLLM", "0.24.0", "vllm_flash_attn_fa3"),
    ),
    "b200": (
        ServedKernel("b200_sxm", "SGLang", "0.5.14", "trtllm_mha"),
        ServedKernel("b200_sxm", "VLLM", "0.24.0", "vllm_flashinfer_trtllmprefill"),
    ),
}
# Blocks of 128 query rows a CTA, of heads up to 128: on Blackwell two, whose softmax two groups of warps do by turns
# (https://arxiv.org/abs/2603.05451; NVIDIA/cutlass examples/python/CuTeDSL/blackwell/fmha.py)
ROW_TILES = {"b200": 2}


@dataclass(frozen=True)
class ServingFit:
    """A kernel inside a serving framework: the kernel, and its cache copy in bytes per byte of k and v."""

    parameters: AttentionParameters
    append: float
    caveats: FitCaveats = field(default_factory=FitCaveats)

    def training(self) -> FittedParameters[AttentionParameters]:
        """The kernel alone."""
        return FittedParameters(self.parameters, self.caveats).borrowed(launch_floor=LAUNCH_FLOOR)


class KernelTimes(NamedTuple):
    """Published times of the kernel itself, in no framework, by the device that they are of."""

    rows: dict[str, pd.DataFrame]

    def seen(self) -> "KernelTimes":
        """Those that a fit may see."""
        return KernelTimes({slug: d[~d.left_out] for slug, d in self.rows.items()})

    def ratios(self, p: AttentionParameters) -> Array:
        """Predicted over measured."""
        return np.concatenate(
            [published_time(d, hardware(slug), p) / column(d, "seconds") for slug, d in self.rows.items()]
        )


def attention_rows(folder: Path, campaign: ServedKernel) -> pd.DataFrame:
    """Full-causal rows of a campaign (no window), the median of repeated shapes."""
    d = measured_table(folder, "attention_forward_bf16.parquet")
    gpu, framework, version, kernel = campaign
    d = d[(d.gpu == gpu) & (d.framework == framework) & (d.version == version) & (d.kernel_source == kernel)]
    d = d[(d.window_size.isna() | (d.window_size == 0)) & (d.head_dim <= LARGEST_HEAD)]
    d = d.groupby(SHAPE)["latency_ms"].median().reset_index()
    left_out = [fold(*(int(v) for v in row)) == 0 for row in d[SHAPE].itertuples(index=False)]
    return d.assign(seconds=d.latency_ms * 1e-3, left_out=left_out)


def priced_serving(d: pd.DataFrame, hw: Hardware, served: ServingFit) -> Array:
    """Seconds of serving rows, the cache copy included."""
    b, s, h, kv, dim = (column(d, c) for c in SHAPE)
    copied = 2.0 * b * s * kv * dim * 2.0  # bytes of k and v
    per_byte = seconds_per_byte(copied + 2.0 * b * s * h * dim * 2.0, hw, served.parameters.l2_ratio)
    kernel = attention_forward_time(b, s, s, h, kv, dim, hardware=hw, parameters=served.parameters)
    return kernel + served.append * copied * per_byte


def serving_errors(parts: Sequence[tuple[pd.DataFrame, ServingFit]], hw: Hardware) -> dict[str, FitErrors]:
    """Errors from 512 tokens up, and below (if there are such rows), of one device's campaigns together."""
    d = pd.concat([rows for rows, _ in parts], ignore_index=True)
    b, s, h, kv, dim = (column(d, c) for c in SHAPE)
    plain = np.maximum(
        attention_flops(b, s, s, h, dim) / hw.peak("bf16"), 4.0 * b * s * dim * (h + kv) / hw.memory_bandwidth
    )
    predicted = np.concatenate([priced_serving(rows, hw, served) for rows, served in parts])
    seconds = column(d, "seconds")
    return {
        name: FitErrors.of(predicted[k], plain[k], seconds[k])
        for name, k in (("long", s >= 512), ("short", s < 512))
        if k.any()
    }


def fit_served(
    parts: Sequence[tuple[Hardware, pd.DataFrame]], own: KernelTimes | None = None, row_tiles: int = 1
) -> list[ServingFit]:
    """One kernel for all campaigns, each with what its framework does beside it; campaigns are weighted alike.

    Args:
        parts: rows of a campaign and the hardware that they were measured on.
        own: times of the kernel itself, which weigh as much as all campaigns together.
        row_tiles: blocks of query rows that a CTA has.
    """
    sizes = sorted({int(s) for _, d in parts for s in d.head_dim.unique()})
    used = [(hw, d[~d.left_out]) for hw, d in parts]
    told = own.seen() if own else None
    first_beside = len(SCALARS) + len(sizes)

    def unpack(x: Array) -> list[ServingFit]:
        v = [float(y) for y in np.exp(x)]
        kernel = AttentionParameters(
            **dict(zip(SCALARS, v, strict=False)), row_tiles=row_tiles,
            efficiency=tuple(zip(sizes, v[len(SCALARS) : first_beside], strict=True)),
        )  # fmt: skip
        beside = zip(v[first_beside::2], v[first_beside + 1 :: 2], strict=True)
        return [ServingFit(replace(kernel, launch_floor=floor), append) for floor, append in beside]

    def ratios(x: Array) -> list[Array]:
        """Predicted over measured, by campaign, and of the kernel itself."""
        served = unpack(x)
        found = [priced_serving(d, hw, s) / column(d, "seconds") for (hw, d), s in zip(used, served, strict=True)]
        return [*found, told.ratios(replace(served[0].parameters, launch_floor=LAUNCH_FLOOR))] if told else found

    def residuals(x: Array) -> Array:
        found = ratios(x)
        if len(found) == 1:
            return np.log(found[0])
        shares = [*[1.0] * len(used), float(len(used))]
        return np.concatenate([30.0 * np.sqrt(s / len(r)) * np.log(r) for s, r in zip(shares, found, strict=False)])

    def ends(scalars: Sequence[float], share: float, beside: Sequence[float]) -> Array:
        return np.log([*scalars, *[share] * len(sizes), *[v for _ in used for v in beside]])

    first, limits = ends(START, 0.55, BESIDE_START), (ends(LOW, 0.03, BESIDE_LOW), ends(HIGH, 1.2, BESIDE_HIGH))
    end = least_squares(residuals, first, bounds=limits, loss="soft_l1", f_scale=0.1, max_nfev=100).x
    names = (*SCALARS, *shares_of(sizes), *BESIDE * len(used))
    x, caveats = settled(names, end, first, limits, lambda z: np.concatenate(ratios(z)))
    found = unpack(x)
    caveats = caveats.but(BESIDE, FitCaveats()).but_kept(unsearched(found[0].parameters, (*SCALARS, "launch_floor")))
    return [ServingFit(s.parameters, s.append, caveats) for s in found]


def shares_of(sizes: Iterable[int]) -> tuple[str, ...]:
    """The efficiencies of some head sizes by name."""
    return tuple(f"efficiency.{size}" for size in sizes)
