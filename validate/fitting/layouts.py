"""Backward layouts and the rate that a board sustains, from SimuMax (https://github.com/MooreThreads/SimuMax).

aiconfigurator's bursts do not throttle; SimuMax's boards ran long enough to. Both sets hold the same GEMMs in forward
(TN), input-gradient (NN) and weight-gradient (NT, fp32 accumulation) layout.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from perfmodel.devices.gemm import GemmParameters, Layout, gemm_time
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array

from .gemm import least, roofline_seconds
from .judging import Fit, FitErrors, column, hardware, measured_table, settled, shape_hash, unsearched

SIMUMAX = "https://github.com/MooreThreads/SimuMax"
BOARDS = {"a100-80gb-pcie": "a100_pcie_bf16", "b200": "b200_bf16_ceperm"}
OF_A_BOARD = {"sustained": (0.4, 1.5), "nn_slowdown": (0.8, 1.5), "nt_slowdown": (0.8, 1.5)}  # fitted here, and limits


def priced_layouts(rows: pd.DataFrame, hw: Hardware, p: GemmParameters) -> Array:
    """Seconds of every row, in its layout."""
    out = np.empty(len(rows))
    for (layout, dtype, accumulate), part in rows.groupby(["layout", "out_dtype", "accumulate"]):
        m, n, k = (column(part, c) for c in ("m", "n", "k"))
        out[np.asarray(part.index)] = gemm_time(
            m, n, k, hardware=hw, parameters=p, output_itemsize=4 if dtype == "fp32" else 2,
            accumulate=bool(accumulate), layout=cast(Layout, str(layout).lower()), b_copies=1.0,
        )  # fmt: skip
    return out


def fit_board(folder: Path, slug: str, base: GemmParameters) -> Fit:
    """The parameters `OF_A_BOARD` on top of burst parameters of its chip."""
    measured = measured_table(folder, "gemm_layouts_simumax.csv")
    rows = measured[(measured.op == "matmul") & (measured.gpu == BOARDS[slug])].reset_index(drop=True)
    hw, seconds = hardware(slug), column(rows, "implied_ms") * 1e-3
    left_out = shape_hash(np.ones(len(rows)), rows.m, rows.n, rows.k) % np.uint64(3) == 0

    def parameters(z: Array) -> GemmParameters:
        values: dict[str, Any] = dict(zip(OF_A_BOARD, map(float, np.exp(z)), strict=True))
        return replace(base, **values)

    def price(z: Array) -> Array:
        return np.asarray(priced_layouts(rows, hw, parameters(z))[~left_out])

    usual = np.log([getattr(base, name) for name in OF_A_BOARD])
    low, high = np.log(np.array(list(OF_A_BOARD.values()))).T
    end = least(lambda z: np.asarray(np.log(price(z) / seconds[~left_out])), np.zeros(3), low, high).x
    z, caveats = settled(tuple(OF_A_BOARD), end, usual, (low, high), price)
    p = parameters(z)
    predicted = priced_layouts(rows, hw, p)
    plain = roofline_seconds(rows.assign(b=1, dtype="bf16"), hw)
    slices = {str(name).lower(): left_out & np.asarray(rows.layout == name) for name in ("TN", "NN", "NT")}
    return Fit(
        parameters=p,
        source=SIMUMAX,
        software="matmul in three layouts, versions not stated",
        rows_fitted=int((~left_out).sum()),
        rows_left_out=int(left_out.sum()),
        errors=FitErrors.of(predicted[left_out], plain[left_out], seconds[left_out]),
        slices={name: FitErrors.of(predicted[c], plain[c], seconds[c]) for name, c in slices.items()},
        caveats=caveats.but_kept(unsearched(p, OF_A_BOARD)),
    )
