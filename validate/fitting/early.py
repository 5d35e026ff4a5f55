"""Products of cuBLAS before CUDA 12.6 Update 2 on Hopper, from vidur (https://github.com/microsoft/vidur).

That update brought a "broad performance improvement on all Hopper GPUs for FP8, FP16 and BF16 matmuls" (CUDA 12.9.1's
release notes, cuBLAS 12.6 Update 2; https://github.com/pytorch/pytorch/issues/138440). vidur profiled vLLM's linear
layers on an H100 in May 2024, in fp16, with the PyTorch 2.2 or 2.3 for CUDA 12.1 of its serving framework
(https://github.com/microsoft/sarathi-serve, branch vidur). They are up to 27 % slower than the device's price, most
where few waves fill the SMs; its A40, of the same campaign, is within 1 % of its price in the median, its A100 of large
products 7 % above.

Two figures are fitted on top of the device's: what each step of k costs beside loads and math, and how much of the last
wave stays idle. Rows of whole models are left out; of those below 10 us, whose times are told to 1 us, none is used.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from perfmodel.devices.gemm import GemmParameters, gemm_time
from perfmodel.devices.gemm_parameters import EarlyGemmParameters
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array

from .gemm import BOUNDS, least
from .judging import Fit, FitErrors, column, hardware, measured_table, settled

H100 = "h100-sxm"
VIDUR = "https://github.com/microsoft/vidur"
FITTED = ("k_bubble", "wave_tail")
LEFT_OUT = ("Qwen/Qwen-72B", "codellama/CodeLlama-34b-Instruct-hf", "meta-llama/Llama-2-7b-hf")
SHORTEST = 1e-5  # s
OF_FIT = 4  # every so many-th row is fitted


def linear_rows(folder: Path) -> pd.DataFrame:
    """m, n, k, seconds, model: the linear layers of one GPU of a tensor-parallel group."""
    d = measured_table(folder, "kernels_vidur.parquet")
    d = d[(d.gpu == "h100") & (d.n_kv_head >= d.tp)]
    h, keys, width = d.n_embd, 2 * (d.n_kv_head // d.tp), d.n_ffn // d.tp
    heads, size = d.n_head // d.tp, d.n_embd // d.n_head
    sides = {
        "attn_pre_proj": ((heads + keys) * size, h), "attn_post_proj": (h, heads * size),
        "mlp_up_proj": (width * np.where(d.gated, 2, 1), h), "mlp_down_proj": (h, width),
    }  # fmt: skip
    parts = [
        pd.DataFrame({"m": d.num_tokens, "n": n, "k": k, "seconds": d[f"{name}_ms"] / 1e3, "model": d.model})
        for name, (n, k) in sides.items()
    ]  # fmt: skip
    rows = pd.concat(parts, ignore_index=True).dropna()
    return rows[rows.seconds >= SHORTEST].reset_index(drop=True)


def priced_linears(rows: pd.DataFrame, hw: Hardware, p: GemmParameters) -> Array:
    """Seconds of every row; weights of other layers were read since."""
    m, n, k = (column(rows, name) for name in ("m", "n", "k"))
    return gemm_time(m, n, k, hardware=hw, parameters=p, dtype="fp16")


def fit_linears(folder: Path, base: GemmParameters) -> Fit:
    """What the older kernels have in place of the device's own figures, `base`."""
    rows, hw = linear_rows(folder), hardware(H100)
    left_out = np.asarray(rows.model.isin(LEFT_OUT))
    used, seen = rows[~left_out].iloc[::OF_FIT], rows[left_out]
    seconds = column(used, "seconds")

    def parameters(z: Array) -> EarlyGemmParameters:
        return EarlyGemmParameters(*map(float, np.exp(z)))

    def price(z: Array) -> Array:
        return priced_linears(used, hw, parameters(z).on(base))

    usual = np.log([getattr(base, name) for name in FITTED])
    low, high = np.log(np.array([BOUNDS[name] for name in FITTED])).T
    end = least(lambda z: np.asarray(np.log(price(z) / seconds)), usual, low, high).x
    z, caveats = settled(FITTED, end, usual, (low, high), price)
    found = parameters(z).on(base)
    cuts = {
        "as_current": (seen, base), "m_from_2048": (seen[seen.m >= 2048], found),
        "m_from_256": (seen[seen.m >= 256], found), "m_below_256": (seen[seen.m < 256], found),
    }  # fmt: skip
    return Fit(
        parameters=parameters(z),
        source=VIDUR,
        software="PyTorch 2.2 or 2.3 for CUDA 12.1, fp16",
        rows_fitted=len(used),
        rows_left_out=len(seen),
        errors=_errors(seen, hw, found),
        slices={name: _errors(part, hw, p) for name, (part, p) in cuts.items()},
        notes="cuBLAS before CUDA 12.6 Update 2. as_current: the rows left out at the price of current kernels.",
        caveats=caveats,
    )


def _errors(rows: pd.DataFrame, hw: Hardware, p: GemmParameters) -> FitErrors:
    m, n, k, seconds = (column(rows, name) for name in ("m", "n", "k", "seconds"))
    plain = np.maximum(2 * m * n * k / hw.peak("fp16"), 2 * (m * k + k * n + m * n) / hw.memory_bandwidth)
    return FitErrors.of(priced_linears(rows, hw, p), plain, seconds)
