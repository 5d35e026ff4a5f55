"""NeuSight's fp32 GEMMs (https://github.com/sitar-lab/NeuSight): what was run, on which GPU, by which library.

It multiplies (B, M, N) by (B, N, K): its N is summed over and its K are the columns of C. Its floors of 25-80 us
contain the host's launch. `bmm` and `linear` hold the shapes of networks, `collected` random linear layers. The boards
of the last ran at another clock (a T4 at 0.8 of the first), and the P4 with another library, as the kernels' names
tell. Alignment to 16 bytes, which goes with the campaigns, changes less than 5 %. The clock within a campaign:
`validate.fitting.campaigns`. Thin products read DRAM at 750 GB/s on both A100s (1,555 and 1,935 GB/s): so many loads do
their kernels keep in flight, and that is what `memory_efficiency` says there.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from perfmodel.devices.gemm import GemmParameters, Tiles, gemm_time
from perfmodel.devices.hardware import Hardware
from perfmodel.program.dims import Array, Index

from .campaigns import Campaign, board_campaign, boosts, entries
from .judging import Shapes, measured_table

NEUSIGHT = "https://github.com/sitar-lab/NeuSight"
FILE = "kernels_fp32_neusight.parquet"
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


def limited(p: GemmParameters) -> GemmParameters:
    """With the power limit fitted: of boards that may draw less than their chip could, and of what boards share."""
    return replace(p, power_share=0.5, load_energy=1.0, derating=0.05)  # what is left beside the limit


STARTS = {
    "p4": limited(replace(PASCAL, tiles=((128, 128), (128, 64), (64, 128)))),
    "p100": limited(PASCAL),
    "v100-32gb-pcie": limited(VOLTA),
    "t4": limited(VOLTA),
    "a100-40gb-pcie": limited(AMPERE),
    "a100-80gb-pcie": limited(AMPERE),
    "l4": limited(replace(AMPERE, tiles=((256, 128), (128, 256), *SGEMM_TILES))),
    "h100-sxm": HOPPER,
}
COLLECTED = "collected"
COLLECTED_TILES = {"p4": SMALL_TILES}  # where that campaign's library was another one


def sgemm_rows(folder: Path, slug: str) -> pd.DataFrame:
    """m, n, k, b, seconds, group, a_copies, b_copies, campaign, entry of it: one row a measurement."""
    measured = measured_table(folder, FILE)
    measured = measured[measured.op.isin(["linear", "bmm"]) & (measured.gpu == GPUS[slug])]
    rows = pd.DataFrame(
        {
            "m": measured.M,
            "n": measured.K,
            "k": measured.N,
            "b": measured.B.astype(float),
            "seconds": measured.latency_ms * 1e-3,
            "group": measured.op,
            "a_copies": 1.0,
            "b_copies": 1.0,
            "campaign": measured.op.where(~measured.file.str.startswith("train"), COLLECTED),
        }
    ).reset_index(drop=True)
    shapes = rows[["b", "m", "k", "n"]].astype(int)
    for name, part in shapes.groupby(rows.campaign):
        rows.loc[part.index, "entry"] = entries(str(name), [tuple(x) for x in part.to_numpy().tolist()])
    return rows.astype({"entry": int})


def board(slug: str, name: str, hw: Hardware, p: GemmParameters, clock: float) -> tuple[Hardware, GemmParameters]:
    """The board and the library of a campaign; `clock` is that of the collected rows over that of the others.

    At a lower clock throughout: the highest one and the one that the power allows.
    """
    if name != COLLECTED:
        return hw, p
    power = None if hw.board_power is None else hw.board_power - hw.working_power * (1.0 - clock)
    slower = replace(hw, clock_hz=hw.clock_hz * clock, fp32_flops=hw.fp32_flops * clock, board_power=power)
    return slower, replace(p, tiles=COLLECTED_TILES.get(slug, p.tiles))


class Board:
    """The rows of one board, campaign by campaign, and a replay of each: how far the clock was from the sustained one.

    Args:
        rows: measurements on one device.
        hw: its datasheet.
        p: price parameters that the replay takes.
        clock: of the board in the collected rows, over that in the others.
    """

    def __init__(self, rows: pd.DataFrame, hw: Hardware, p: GemmParameters, clock: float = 1.0) -> None:
        self.slug = str(rows["device"].iloc[0])
        self.parts = [
            (str(name), np.flatnonzero(rows.campaign == name), Shapes.of(part))
            for name, part in rows.groupby("campaign")
        ]
        self.runs: list[tuple[Campaign, Array, float, Index, Index]] = []
        for name, chosen, _ in self.parts:
            entry = np.asarray(rows.entry)[chosen]
            if entry[0] < 0:  # the order is not known
                continue
            own, q = board(self.slug, name, hw, p, clock)
            run = board_campaign(name, hw.memory_bytes, hw.memory_bandwidth)
            at_limit, at_highest = (
                gemm_time(run.m, run.n, run.k, run.batch, hardware=own, parameters=x, dtype="fp32", b_copies=1.0)
                for x in (q, replace(q, power_share=0.0))
            )
            gain = float(np.median(np.log(at_limit / at_highest)))
            self.runs.append((run, at_limit, gain, chosen, entry))

    def boosts(self, reaction: float) -> Array:
        """Of every row: 0 at the sustained clock, 1 at the highest."""
        out = np.zeros(sum(len(chosen) for _, chosen, _ in self.parts))
        for run, seconds, gain, chosen, entry in self.runs:
            if gain > 0.0:
                out[chosen] = boosts(run, seconds, gain, reaction)[entry]
        return out

    def predict(self, hw: Hardware, p: GemmParameters, clock: float, boost: Array) -> Array:
        """Seconds of every row.

        Args:
            hw: datasheet of the device.
            p: price parameters.
            clock: of the board in the collected rows, over that in the others.
            boost: of every row, from the replay.
        """
        out = np.empty(len(boost))
        for name, chosen, shapes in self.parts:
            own, q = board(self.slug, name, hw, p, clock)
            seconds = shapes.price(own, q)
            if boost[chosen].any():
                highest = shapes.price(own, replace(q, power_share=0.0))
                seconds = seconds * (highest / seconds) ** boost[chosen]
            out[chosen] = seconds
        return out


def replay_notes(rows: pd.DataFrame, clock: float) -> str:
    """What the rows are judged with besides the price."""
    replay = "power_share lowered to that of products in a step; residuals: of products alone, each at the clock that "
    replay += "what ran before it had left."
    return f"{replay} Collected rows at {clock:.2f} of the clock." if (rows.campaign == COLLECTED).any() else replay
