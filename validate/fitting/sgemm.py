"""NeuSight's fp32 GEMMs (https://github.com/sitar-lab/NeuSight): what was run, on which GPU, by which library.

It multiplies (B, M, N) by (B, N, K): its N is summed over and its K are the columns of C. Its floors of 25-80 us
contain the host's launch. Two campaigns measured the linear layers: `test` the shapes of networks, `train` random ones,
here called collected. The boards of the second ran at another clock (a T4 at 0.8 of the first), and the P4 with another
library, as the kernels' names tell. Alignment to 16 bytes, which goes with the campaigns, changes less than 5 %.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from perfmodel.devices.gemm import GemmParameters, Tiles
from perfmodel.devices.hardware import Hardware

from .common import Array, Errors, column, table

NEUSIGHT = "https://github.com/sitar-lab/NeuSight"
GPUS = {
    "p4": "Tesla P4",
    "p100": "Tesla P100-PCIE-16GB",
    "v100-32gb-pcie": "Tesla V100-PCIE-32GB",
    "t4": "Tesla T4",
    "a100-40gb-pcie": "NVIDIA A100-PCIE-40GB",
    "a100-80gb-pcie": "NVIDIA A100 80GB PCIe",
    "l4": "NVIDIA L4",
    "h100-sxm": "NVIDIA H100 80GB HBM3",
}

# Tiles by the kernels' names.
SGEMM_TILES: Tiles = ((128, 128), (64, 128), (32, 128), (128, 32), (64, 64), (32, 64), (32, 32))
SMALL_TILES: Tiles = ((128, 32), (32, 128), (64, 64))
SIMT = GemmParameters(launch_clocks=5e4, k_step=8, long_row=0.1, tile_balance=6.0, tiles=SGEMM_TILES)
PASCAL = replace(SIMT, tile_balance=10.0, math_efficiency=0.8, tiles=SMALL_TILES, batched_tiles=((64, 128),))
VOLTA = replace(SIMT, tile_balance=8.0, batched_tiles=((64, 128), (64, 64), (32, 128)))
AMPERE = replace(SIMT, batched_tiles=((128, 128),))
HOPPER = replace(SIMT, math_efficiency=0.8, launch_clocks=4e4, tiles=((256, 128), (128, 256), *SGEMM_TILES))
STARTS = {
    "p4": replace(PASCAL, tiles=((128, 128), (128, 64), (64, 128))),
    "p100": PASCAL,
    "v100-32gb-pcie": VOLTA,
    "t4": VOLTA,
    "a100-40gb-pcie": AMPERE,
    "a100-80gb-pcie": AMPERE,
    "l4": AMPERE,
    "h100-sxm": HOPPER,
}
COLLECTED_TILES = {"p4": SMALL_TILES}  # where that campaign's library was another one


def load(folder: Path, slug: str) -> pd.DataFrame:
    """m, n, k, b, seconds, group, a_copies, b_copies, collected: one row a measurement."""
    measured = table(folder, "kernels_fp32_neusight.parquet")
    measured = measured[measured.op.isin(["linear", "bmm"]) & (measured.gpu == GPUS[slug])]
    return pd.DataFrame(
        {
            "m": measured.M,
            "n": measured.K,
            "k": measured.N,
            "b": measured.B.astype(float),
            "seconds": measured.latency_ms * 1e-3,
            "group": measured.op,
            "a_copies": 1.0,
            "b_copies": 1.0,
            "collected": measured.file.str.startswith("train"),
        }
    ).reset_index(drop=True)


def collected_on(slug: str, hw: Hardware, p: GemmParameters, clock: float) -> tuple[Hardware, GemmParameters]:
    """The board and the library of the collected rows; `clock` is theirs over that of the others."""
    slower = replace(hw, clock_hz=hw.clock_hz * clock, fp32_flops=hw.fp32_flops * clock)
    return slower, replace(p, tiles=COLLECTED_TILES.get(slug, p.tiles))


def scatter(rows: pd.DataFrame, least_seconds: float = 5e-4) -> Errors | None:
    """Scatter of batched products between neighbouring batch sizes: what no smooth model can explain.

    The time of one product hardly changes from one batch size to the next, once a launch lasts for `least_seconds`.
    What a batch size deviates from the line (in logarithms) between its two neighbours is noise of three measurements;
    divided by the root of its three weights squared, that of one. None if there are fewer than 20 such triples.
    """
    found: list[Array] = []
    for _, series in rows[(rows.group == "bmm") & (rows.seconds > least_seconds)].groupby(["m", "n", "k"]):
        ordered = series.sort_values("b")
        x, y = np.log(column(ordered, "b")), np.log(column(ordered, "seconds") / column(ordered, "b"))
        if len(x) >= 3:
            w = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
            found.append((y[1:-1] - (1.0 - w) * y[:-2] - w * y[2:]) / np.sqrt(1.0 + w**2 + (1.0 - w) ** 2))
    noise = np.exp(np.concatenate(found)) if found else np.empty(0)
    return Errors.of(noise, noise, np.ones_like(noise)) if len(noise) >= 20 else None
