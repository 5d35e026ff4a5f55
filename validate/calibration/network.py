"""A node's file for the machine at hand: collectives timed by the processes that torchrun started, and a fit.

    torchrun --nproc-per-node 8 -m perfmodel calibrate --network --device cuda

Every kind that the backend has runs at message sizes from 512 B up, a factor of 4 apart, in groups of 2, 4, … of the
GPUs of a node and, over several nodes, in the group of all. A time is that of calls back to back in the slowest
process.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.distributed as dist

from perfmodel.devices import own, profile
from perfmodel.errors import UserError
from perfmodel.network import files, price
from perfmodel.network.files import BETWEEN
from perfmodel.network.parameters import CollectiveParameters, Nics, Protocol
from perfmodel.network.price import KINDS, Links
from perfmodel.resources import write_text

from ..fitting.collectives.fit import USUAL, fit_kind, fit_links_between
from ..fitting.collectives.rows import grouped_rows
from ..fitting.judging import Fit
from ..fitting.write import block_text
from ..measuring import environment
from ..measuring.team import Team, join, under_torchrun

SMALLEST, LARGEST, FACTOR = 512, 2**30, 4  # bytes of a message
CALLS, ROUNDS = 5, 5  # back to back, and how often; the median of the rounds counts
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}
CHANNELS = 24  # thread blocks that NCCL takes at most where nobody looked
SWITCH = 150e9  # B/s in one direction that only links through a switch, or a bridge, reach
COMMAND = "torchrun --nproc-per-node N -m perfmodel calibrate --network --device"


@dataclass(frozen=True)
class NetworkCalibration:
    """The file that was written, and its blocks with their errors on sizes that the fit did not see."""

    path: Path
    fits: dict[str, Fit]


def calibrate_network(device: str, name: str, *, seconds: float) -> NetworkCalibration | None:
    """Measure the links between the processes of this group, and write a node's file.

    Args:
        device: cuda (NCCL) or cpu (gloo).
        name: of the file.
        seconds: to take, roughly.

    Returns:
        None in all processes but the first, which writes.

    Raises:
        UserError: not started by torchrun, one process alone, a name that is none or a bundled node's.
    """
    target = own.path(name, files.OWN)
    if name in files.names():
        raise UserError(f"{name!r} is a bundled node: give the calibration another --name")
    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) < 2:
        raise UserError(f"--network needs several processes: {COMMAND} {device}")
    environment.check_device(device)
    team = join("network", device)
    rows = measured_collectives(team, device, seconds)
    if not team.first:
        return None
    each = int(os.environ["LOCAL_WORLD_SIZE"])
    text, fits = node_text(rows, each, _makers_name(device), device, f"PyTorch {torch.__version__}, {team.backend}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    files.forget()
    return NetworkCalibration(target, fits)


def measured_collectives(team: Team, device: str, seconds: float) -> pd.DataFrame:
    """Rows as `validate.fitting.collectives.rows` has them, the same in every process."""
    each = int(os.environ["LOCAL_WORLD_SIZE"])
    sizes = sorted({min(2**i, each) for i in range(1, each.bit_length() + 1)} - {1})
    groups = [(n, 1) for n in sizes] + ([(team.size, team.size // each)] if team.size > each else [])
    found: list[dict[str, Any]] = []
    budget = seconds / (len(groups) * len(KINDS))
    for gpus, nodes in groups:
        group = dist.new_group(list(range(gpus)))  # all processes take part in making it
        for kind in KINDS:
            if team.rank < gpus:
                found += _times(kind, gpus, nodes, group, device, budget)
        dist.barrier()
    rows: list[dict[str, Any]] = team.agree(found)
    return grouped_rows(pd.DataFrame(rows))


def node_text(rows: pd.DataFrame, gpus: int, gpu: str, device: str, software: str) -> tuple[str, dict[str, Fit]]:
    """The text of a node's file and its fitted blocks.

    Args:
        rows: measurements of one kind of node.
        gpus: of a node.
        gpu: the device that it has.
        device: cuda or cpu.
        software: that ran the collectives.
    """
    inside, outside = rows[rows.nodes == 1], rows[rows.nodes > 1]
    wire = _fastest(inside)
    sizes = sorted({int(n) for n in inside.gpus})
    cards = Nics("ethernet", 1, _fastest(outside)) if len(outside) else None
    links = Links(gpus, tuple((size, wire) for size in sizes), cards)
    fits = {kind: fit_kind(of, kind, links, _usual(of)) for kind in KINDS if len(of := inside[inside.kind == kind])}
    if cards is not None:
        within = {kind: _parameters(fits[kind]) for kind in fits}
        fits[BETWEEN] = fit_links_between(outside[outside.kind.isin(fits)], links, within)
    fits = {kind: replace(fit, software=software) for kind, fit in fits.items()}
    link = "none" if device == "cpu" else "nvswitch" if wire > SWITCH else "pcie"
    head = [f'name = "{gpus} x {gpu}, measured"', f'gpu = "{gpu}"', f"gpus = {gpus}", f'link = "{link}"']
    head += [f"channels = {CHANNELS if device == 'cuda' else 1}"]
    head += [f"\n[[tiers]]\ngpus = {size}\nbandwidth = {rate:.4g}" for size, rate in links.tiers]
    if cards is not None:
        head += [f'\n[nics]\nkind = "{cards.kind}"\ncount = {cards.count}\nbandwidth = {cards.bandwidth:.4g}']
    head += ['\n[source]\ntiers = "the best rate that perfmodel calibrate --network measured"\n']
    today = date.today().isoformat()
    return "\n".join([*head, *(block_text(f"fitted.{k}", fit, today) for k, fit in fits.items())]), fits


def _times(kind: str, gpus: int, nodes: int, group: Any, device: str, seconds: float) -> list[dict[str, Any]]:
    """Seconds of a kind in a group by message size, none where the backend lacks it; until the time is over."""
    found: list[dict[str, Any]] = []
    begin, size = time.perf_counter(), SMALLEST
    while size <= LARGEST:
        try:
            call = _call(kind, size, gpus, group, device)
            call()
        except (RuntimeError, NotImplementedError, ValueError):  # gloo has no all_to_all, or memory is full
            break
        took = _slowest(_seconds(call, device, group), group, device)
        found.append(
            {
                "node": "here", "kind": kind, "message": float(size), "gpus": float(gpus), "nodes": float(nodes),
                "reduces": False, "seconds": took, "source": "measured by perfmodel calibrate",
                "version": "", "launch": "back to back",
            }
        )  # fmt: skip
        if _slowest(time.perf_counter() - begin + FACTOR * CALLS * ROUNDS * took, group, device) > seconds:
            break
        size *= FACTOR
    return found


def _call(kind: str, nbytes: int, gpus: int, group: Any, device: str) -> Callable[[], Any]:
    """One collective over buffers that are there already; `nbytes` of the whole message."""
    dtype = DTYPES[device]
    whole = torch.zeros(nbytes // dtype.itemsize // gpus * gpus, dtype=dtype, device=device)
    part, rank = torch.zeros_like(whole[: len(whole) // gpus]), dist.get_rank(group)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
        "broadcast": lambda: dist.broadcast(whole, 0, group=group),
        "send_recv": lambda: _pair(whole, rank, gpus),
    }
    return calls[kind]


def _pair(message: torch.Tensor, rank: int, gpus: int) -> None:
    """From the first process of the group to its last."""
    if rank == 0:
        dist.send(message, gpus - 1)
    elif rank == gpus - 1:
        dist.recv(message, 0)


def _seconds(call: Callable[[], Any], device: str, group: Any) -> float:
    """Seconds of one of several calls back to back."""
    rounds = []
    for _ in range(ROUNDS):
        dist.barrier(group)
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        rounds.append((time.perf_counter() - begin) / CALLS)
    return sorted(rounds)[ROUNDS // 2]


def _slowest(seconds: float, group: Any, device: str) -> float:
    """The most that a process of the group says, so that all decide alike."""
    told = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(told, op=dist.ReduceOp.MAX, group=group)
    return float(told)


def _fastest(rows: pd.DataFrame) -> float:
    """The best rate through a link in B/s: what its fitted shares are of."""
    message, gpus, took = (rows[name].to_numpy() for name in ("message", "gpus", "seconds"))
    through = [price.moved(kind, n) for kind, n in zip(rows.kind, gpus, strict=True)]
    return float((message * through / took).max())


def _usual(rows: pd.DataFrame) -> CollectiveParameters:
    """The usual figures, their seconds scaled to the fastest call: gloo's are a hundred times those of NVLink."""
    scale = float(rows.seconds.min()) / (USUAL.ll.start + USUAL.ll.step)
    ll, ll128, simple = (Protocol(p.start * scale, p.step * scale, p.share) for p in USUAL.protocols)
    return replace(USUAL, ll=ll, ll128=ll128, simple=simple)


def _parameters(fit: Fit) -> CollectiveParameters:
    assert isinstance(fit.parameters, CollectiveParameters)
    return fit.parameters


def _makers_name(device: str) -> str:
    """The device's profile by name, if there is one."""
    if device == "cpu":
        return own.CALIBRATED
    name = torch.cuda.get_device_name()
    known = profile.by_makers_name(name)
    return known.slug if known is not None else name
