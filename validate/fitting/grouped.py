"""Fits products by expert to aiconfigurator's layers of a mixture (https://github.com/ai-dynamo/aiconfigurator).

A row is the forward pass of TensorRT-LLM's CUTLASS layer in bf16, not torch's `_grouped_mm`: rows are copied in the
order of their experts, one grouped product, gate, another product, and the sum by token. What the copies, gate and sum
take is two figures of each board that stay here; what the products take goes into its file. Loads are balanced or
drawn from a power law (`PowerLawRouting`). Half of the models are left out.

The layer picks its kernels by trying them before the rows are timed. Where that went wrong a row takes several times as
long as one of the same model with as many tokens or more and experts as wide or wider, which no load explains: such
rows are in the slice `with_mistuned` alone.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perfmodel.devices import profile
from perfmodel.devices.gemm import GemmParameters
from perfmodel.devices.gemm_parameters import GroupedParameters
from perfmodel.devices.grouped import grouped_time
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array
from perfmodel.program.routing import BALANCED, Routing

from .gemm import AICONFIGURATOR, least
from .judging import Fit, FitCaveats, FitErrors, column, hardware, measured_table, settled

FILE = "moe_kernels.parquet"
# Device -> its name there, and the kernels.
ROWS_OF = {
    "a100-80gb-sxm": ("a100_sxm", "moe_torch_flow"),
    "l40s": ("l40s", "moe_torch_flow_cutlass"),
    "h100-sxm": ("h100_sxm", "moe_torch_flow_cutlass"),
    "b200": ("b200_sxm", "moe_torch_flow_cutlass"),
    "b300": ("b300_sxm", "moe_torch_flow_cutlass"),
    "gb200": ("gb200", "moe_torch_flow_cutlass"),
}
LEAST_TOKENS = 256  # fewer are decoding
MISTUNED = 2.5  # times what a row with as much work or more takes, of whatever load
OF_FIT = 3  # every so many-th of the rows that may be fitted is: more change no digit that counts
MODEL = ["hidden_size", "inter_size", "topk", "num_experts"]
# What is searched, and its limits: `GroupedParameters`, then the rest of a layer: the share of the bandwidth that
# copies, gate and sum reach, and the seconds that launching them and the router takes.
BOUNDS: dict[str, tuple[float, float]] = {
    "main_loop": (0.5, 2.5), "epilogue": (0.02, 1.0), "memory": (0.8, 1.25), "overlap_loss": (0.005, 1.0),
    "stream": (0.1, 1.2), "fixed": (1e-6, 1e-4),
}  # fmt: skip
STREAM, FIXED = 0.5, 1e-5


class PowerLawRouting(Routing):
    """The loads of the source's power law, whose exponent is `exponent`; `experts` quantiles instead of draws.

    Each expert draws from a density that falls as x^-exponent between 1 and 0.8 of the tokens; the draws are scaled to
    the rows and rounded, no expert gets more than all tokens, and what is left over goes to those with the fewest
    (collector/helper.py, `_generate_power_law_distribution`).
    """

    def groups(self, rows: Any) -> list[tuple[Any, Any]]:
        """As `Routing.groups`."""
        loads = [_drawn(self.experts, self.top_k, self.exponent, int(n) // self.top_k) for n in np.ravel(rows)]
        return [(count, 1) for count in np.stack(loads, axis=-1)]


@lru_cache(maxsize=4096)
def _drawn(experts: int, top_k: int, exponent: float, tokens: int) -> np.ndarray:
    """Rows of each expert."""
    power = 1.0 - exponent
    quantiles = (np.arange(experts) + 0.5) / experts
    drawn = (((0.8 * tokens) ** power - 1.0) * quantiles + 1.0) ** (1.0 / power)
    counts: np.ndarray = np.minimum(np.rint(drawn / drawn.sum() * tokens * top_k).astype(np.int64), tokens)
    for _ in range(tokens * top_k - int(counts.sum())):
        counts[np.argmin(counts)] += 1
    for _ in range(int(counts.sum()) - tokens * top_k):
        counts[np.argmax(counts)] -= 1
    return counts


def layer_rows(folder: Path, slug: str) -> pd.DataFrame:
    """The rows of a device and of each its `seconds`, whether it is `mistuned` and whether it is `left_out`."""
    gpu, source = ROWS_OF[slug]
    d = measured_table(folder, FILE)
    d = d[(d.gpu == gpu) & (d.kernel_source == source) & (d.moe_ep_size == 1) & (d.num_tokens >= LEAST_TOKENS)]
    d = d.sort_values([*MODEL, "moe_tp_size", "distribution", "num_tokens"]).reset_index(drop=True)
    fastest = d.pivot_table("latency_s", [*MODEL, "moe_tp_size"], "num_tokens", aggfunc="min")
    of_more = fastest.iloc[:, ::-1].cummin(axis=1).groupby(MODEL).cummin().stack()  # more tokens, wider experts
    bound = np.asarray(of_more.reindex(pd.MultiIndex.from_frame(d[[*MODEL, "moe_tp_size", "num_tokens"]])))
    seconds = column(d, "latency_s")
    left_out = np.asarray(d.groupby(MODEL).ngroup()) % 2 == 1
    return d.assign(seconds=seconds, mistuned=seconds > MISTUNED * bound, left_out=left_out)


def priced_layers(rows: pd.DataFrame, slug: str, dense: GemmParameters, figures: Mapping[str, float]) -> Array:
    """Seconds of every row, on a board that does not throttle: a pass or six are over before it does."""
    burst = replace(dense, derating=0.0, sustained=1.0, power_share=0.0)
    own = {f.name: figures[f.name] for f in fields(GroupedParameters)}
    on = replace(profile.load(slug), gemm={"bf16": burst}, grouped=GroupedParameters(**own))
    out = np.empty(len(rows))
    for _, part in rows.groupby(["num_experts", "topk", "distribution"]):
        experts, top_k, load = (part[name].iloc[0] for name in ("num_experts", "topk", "distribution"))
        hidden, width, tokens = _sizes(part)
        exponent = BALANCED if load == "balanced" else float(str(load).rpartition("_")[2])
        routing = (PowerLawRouting if exponent else Routing)(int(experts), int(top_k), exponent)
        products = ((hidden, 2 * width), (width, hidden))
        each = [grouped_time(on, "bf16", "tn", routing, False, tokens * int(top_k), *sizes) for sizes in products]
        moved = tokens * int(top_k) * (6 * width + 4 * hidden) + 4 * tokens * hidden
        streamed = moved / (on.hardware.memory_bandwidth * figures["stream"])
        out[np.asarray(part.index)] = sum(each) + streamed + figures["fixed"]
    return out


def fit_layers(folder: Path, slug: str, dense: GemmParameters) -> Fit:
    """What products by expert take on top of a device's dense products."""
    rows = layer_rows(folder, slug)
    fitted = rows[~rows.left_out & ~rows.mistuned].iloc[::OF_FIT].reset_index(drop=True)
    seconds = column(fitted, "seconds")

    def figures(z: Array) -> dict[str, float]:
        return dict(zip(BOUNDS, map(float, np.exp(z)), strict=True))

    def price(z: Array) -> Array:
        return priced_layers(fitted, slug, dense, figures(z))

    usual = np.log([*(getattr(GroupedParameters(), f.name) for f in fields(GroupedParameters)), STREAM, FIXED])
    low, high = np.log(np.array(list(BOUNDS.values()))).T
    low[0] = np.log(dense.math_efficiency)  # the main loop is no faster than the peak
    end = least(lambda z: np.asarray(np.log(price(z) / seconds)), usual, low, high).x
    z, caveats = settled(tuple(BOUNDS), end, usual, (low, high), price)
    found = figures(z)
    own = {f.name: found.pop(f.name) for f in fields(GroupedParameters)}
    errors, slices = _judged(rows[rows.left_out].reset_index(drop=True), slug, dense, own | found)
    return Fit(
        parameters=GroupedParameters(**own),
        source=f"{AICONFIGURATOR}, {ROWS_OF[slug][1]}",
        software=f"TensorRT-LLM {', '.join(sorted(set(rows.version)))}, CUTLASS layer of a mixture; bf16, forward",
        rows_fitted=len(fitted),
        rows_left_out=errors.rows,
        errors=errors,
        slices=slices,
        notes=f"Not torch's kernel. The layer's copies, gate and sum, fitted too: {found['stream']:.2f} of the "
        f"bandwidth and {found['fixed'] * 1e6:.0f} us. Residuals: whole layers of models that the fit did not see.",
        caveats=FitCaveats(*(tuple(n for n in names if n in own) for names in (caveats.kept, caveats.at_bound))),
    )


def _judged(
    rows: pd.DataFrame, slug: str, dense: GemmParameters, figures: Mapping[str, float]
) -> tuple[FitErrors, dict[str, FitErrors]]:
    """Errors on rows that are tuned, and those by load and of all rows."""
    predicted, plain = priced_layers(rows, slug, dense, figures), _roofline(rows, hardware(slug))
    seconds, tuned = column(rows, "seconds"), ~np.asarray(rows.mistuned)
    parts = {str(load): tuned & np.asarray(rows.distribution == load) for load in sorted(set(rows.distribution))}
    parts |= {"all": tuned, "with_mistuned": np.ones(len(rows), dtype=bool)}
    errors = {name: FitErrors.of(predicted[part], plain[part], seconds[part]) for name, part in parts.items()}
    return errors.pop("all"), errors


def _roofline(rows: pd.DataFrame, hw: Hardware) -> Array:
    """max(FLOPs / peak, bytes / bandwidth) of the layer, all experts read."""
    hidden, width, tokens = _sizes(rows)
    routed = tokens * column(rows, "topk")
    experts = np.minimum(column(rows, "num_experts"), routed)
    moved = 6 * experts * hidden * width + 4 * routed * (width + hidden)
    return np.maximum(6 * routed * hidden * width / hw.peak("bf16"), moved / hw.memory_bandwidth)


def _sizes(rows: pd.DataFrame) -> tuple[Array, Array, Array]:
    """Width of the tokens, width of an expert, tokens: whole numbers."""
    width = rows.inter_size // rows.moe_tp_size
    return tuple(np.asarray(x, dtype=np.int64) for x in (rows.hidden_size, width, rows.num_tokens))  # type: ignore[return-value]
