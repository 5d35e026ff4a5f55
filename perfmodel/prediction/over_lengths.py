"""The answer where samples differ in length: the mean over the micro-batches that a sampler makes of them.

Without packing each micro-batch is padded to its longest sample. The kinds of micro-batches and their shares
(`program.lengths.padded_batches`) are one more axis of a grid, over which time and counts are averaged; the peak is
that of the longest. A step of several micro-batches takes on average what steps of micro-batches of one kind each take.
Several ranks wait for the one with the longest (`program.stragglers`): time is that of such micro-batches.
"""

from dataclasses import fields, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import units
from ..methods import Method
from ..program.dims import decide
from ..program.lengths import Batches, Lengths, padded_batches
from ..program.part import PHASES
from ..program.stragglers import fullest_rank, waited_batches
from ..setup import Setup
from .communication import Communication
from .grid import Compute, grid_shape, over_grid
from .times import Time

if TYPE_CHECKING:
    from .pipeline import Pipelined

COUNTS = ("flops", "bytes", "kernels", "dispatches")
SENT = ("nbytes", "calls")  # of a rank's communication: counts, no times
GATHERED = ("fsdp1", "fsdp2", "zero2", "zero3")  # forms in which every micro-batch has collectives of all ranks


def over_lengths(compute: Compute[Any], setup: Setup, method: Method) -> Any:
    """The prediction of a setup, its lengths and packing taken into account.

    Args:
        compute: predicts micro-batches of one shape.

    Raises:
        MixedStructure: a part of the grid has padding.
    """
    lengths = setup.lengths
    if lengths is None or setup.packing == "dense":
        plain = lengths is None and not setup.group_by_length
        found = compute(setup if plain else replace(setup, lengths=None, group_by_length=False), method)
        as_asked = plain and found.setup.parallel == setup.parallel
        return found if as_asked else replace(found, setup=_asked(setup, found))
    if setup.packing == "flat":
        longest = compute(replace(setup, seq=lengths.most(setup.seq), lengths=None), method)
        return _flat(compute, setup, method, longest)
    return compute(setup, method) if setup.packing == "varlen" else _mean(compute, setup, method, lengths)


def drawn(setup: Setup) -> list[tuple[float, Setup]]:
    """The kinds of micro-batches whose time the steps of a single setup take, with their shares: where rows are full
    all are alike."""
    if setup.lengths is None or setup.packing not in ("none", "flat"):
        return [(1.0, setup)]
    batch, seq, ranks = int(setup.batch), int(setup.seq), int(setup.replicas)
    if setup.packing == "flat":
        more, part = _fuller(setup, batch, seq, ranks)
        return [(1 - part, setup), (part, replace(setup, batch=more))] if part else [(1.0, setup)]
    plain = _one_length(setup, pads=_pads(setup, batch, seq))
    return [(share, replace(plain, seq=length)) for length, share in _waited(setup, batch, seq, ranks)]


def longest_drawn(setup: Setup) -> Setup:
    """The micro-batches of a single setup that are padded to the most, which decide its peak."""
    if setup.lengths is None or setup.packing != "none":
        return setup
    plain = _one_length(setup, pads=_pads(setup, int(setup.batch), int(setup.seq)))
    return replace(plain, seq=setup.lengths.most(setup.seq))


def _mean(compute: Compute[Any], setup: Setup, method: Method, lengths: Lengths) -> Any:
    """The mean over kinds of micro-batches at every point of a grid: counts of a rank, time of the one waited for."""
    shape = grid_shape(setup, method)
    points = _points(setup, shape)
    pads = np.array([_pads(setup, batch, seq) for batch, seq, _ in points]).reshape(shape)
    plain = _one_length(setup, pads=decide(pads))
    longest = compute(replace(plain, seq=lengths.most(setup.seq)), method)

    def priced(kinds: list[Batches]) -> tuple[Any, np.ndarray, np.ndarray]:
        padded, shares = _table(kinds, shape)
        return over_grid(compute, replace(plain, seq=padded.astype(np.int64)), method), padded, shares

    of_rank = [_kinds(setup, batch, seq) for batch, seq, _ in points]
    waited = [_waited(setup, *point) for point in points]
    own, padded, shares = priced(of_rank)
    slow, _, weights = (own, padded, shares) if waited == of_rank else priced(waited)
    time = _mean_time(slow.time, weights, own.time.communication, shares)
    mfu = _mean_over(own.mfu * own.time.phases["total"], shares) / time.phases["total"]
    padding = np.maximum(0.0, 1 - lengths.mean(setup.seq) / _mean_over(padded, shares)) * decide(pads)  # if not rounded
    counts = {name: _mean_over(getattr(own, name), shares) for name in COUNTS}
    if longest.pipeline is not None:
        counts["pipeline"] = _mean_pipeline(longest.pipeline, time, [
            (share, compute(replace(plain, seq=length), method).pipeline) for length, share in waited[0]
        ])  # fmt: skip
    asked = _asked(setup, longest)
    return replace(longest, setup=asked, time=time, mfu=mfu, padding=padding if shape else float(padding), **counts)


def _mean_over(value: Any, shares: np.ndarray) -> Any:
    """The means of figures of kinds of micro-batches, (kinds, *grid), by shares of that shape."""
    if isinstance(value, dict):
        of_phases = {name: _mean_over(entry, shares) for name, entry in value.items()}
        if set(of_phases) == {*PHASES, "total"}:  # numbers are rounded phase by phase
            of_phases["total"] = sum(of_phases[phase] for phase in PHASES)
        return of_phases
    value = np.broadcast_to(value, shares.shape)
    average = (value * shares).sum(axis=0) / shares.sum(axis=0)
    average = np.rint(average).astype(np.int64) if np.issubdtype(value.dtype, np.integer) else average
    return average if average.ndim else average.item()


def _mean_time(time: Time, weights: np.ndarray, of_rank: Communication, shares: np.ndarray) -> Time:
    """The mean of times by their weights, of what is sent by shares of a rank's kinds."""
    given = time.communication
    sent = {name: _mean_over(getattr(of_rank, name), shares) for name in SENT}
    told = {f.name: _mean_over(getattr(given, f.name), weights) for f in fields(given) if f.name not in sent}
    found = {f.name: _mean_over(getattr(time, f.name), weights) for f in fields(time) if f.name != "communication"}
    waits = _mean_over(time.launch_bound_share, time.phases["total"] * weights)
    return replace(time, **{**found, "launch_bound_share": waits, "communication": replace(given, **told, **sent)})


def _mean_pipeline(longest: "Pipelined", time: Time, kinds: "list[tuple[Any, Pipelined]]") -> "Pipelined":
    """A pipeline's ranks on average; what they hold is that of the longest micro-batches."""

    def mean(i: int, name: str) -> float:
        return float(sum(share * getattr(of.stages[i], name) for share, of in kinds))

    stages = [
        replace(stage, forward=mean(i, "forward"), backward=mean(i, "backward"), waiting=mean(i, "waiting"))
        for i, stage in enumerate(longest.stages)
    ]
    return replace(longest, time=time, stages=stages)


def _flat(compute: Compute[Any], setup: Setup, method: Method, longest: Any) -> Any:
    """Where samples lie behind one another: the mean rank's counts, the time of the rank that is waited for, and the
    memory of micro-batches as long as they may be."""
    found = compute(setup, method)
    more, between = _fuller_points(setup, method)
    kinds: list[tuple[Any, Any]] = [(1.0, found.pipeline)]
    changed: dict[str, Any] = {}
    if between.any():
        larger = compute(replace(setup, batch=more if more.ndim else more.item()), method)
        kinds = [(1 - between, found.pipeline), (between, larger.pipeline)]
        changed["time"] = _on_the_way(found.time, larger.time, between)
        changed["mfu"] = found.mfu * found.time.phases["total"] / changed["time"].phases["total"]
    if longest.pipeline is not None:
        changed["pipeline"] = _mean_pipeline(longest.pipeline, changed.get("time", found.time), kinds)
    return replace(found, **changed, memory=longest.memory, fits=longest.fits)


def _on_the_way(a: Any, b: Any, part: np.ndarray) -> Any:
    """Figures of a time so far on the way to another's; what is sent is that of the first."""
    if isinstance(a, dict):
        return {name: _on_the_way(a.get(name, 0.0), b.get(name, 0.0), part) for name in {**a, **b}}
    if isinstance(a, (Time, Communication)):
        names = [f.name for f in fields(a) if f.name not in SENT]
        return replace(a, **{name: _on_the_way(getattr(a, name), getattr(b, name), part) for name in names})
    value = a + (b - a) * part
    return value if np.ndim(value) else float(value)


def _fuller_points(setup: Setup, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """`_fuller` at every point of a grid."""
    shape = grid_shape(setup, method)
    more, part = zip(*(_fuller(setup, *point) for point in _points(setup, shape)), strict=True)
    return np.reshape(more, shape), np.reshape(part, shape)


def _asked(setup: Setup, found: Any) -> Setup:
    """The setup that was asked for, run by the engine that the method brought."""
    return replace(setup, engine=found.setup.engine)


def _one_length(setup: Setup, *, pads: bool) -> Setup:
    """The setup of micro-batches of one length; flash-attn, which takes padding out, must know how much there is."""
    kept = setup.lengths if setup.attention == "flash2" else None
    return replace(setup, lengths=kept, group_by_length=False, padded=setup.padded or pads)


def _pads(setup: Setup, batch: int, seq: int) -> bool:
    """Whether micro-batches have padding at all."""
    assert setup.lengths is not None
    return batch * setup.of_sample > 1 and setup.lengths.vary(seq)


def _points(setup: Setup, shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Batch, length and ranks with samples of their own at every point of a grid."""
    sizes = (np.broadcast_to(size, shape).flat for size in (setup.batch, setup.seq, setup.replicas))
    return [(int(batch), int(seq), int(ranks)) for batch, seq, ranks in zip(*sizes, strict=True)]


def _kinds(setup: Setup, batch: int, seq: int) -> Batches:
    """What micro-batches of so many samples are padded to; sequences of pairs all to one length, as TRL's collator."""
    assert setup.lengths is not None
    sorts = setup.grad_accum if setup.group_by_length else 0
    return padded_batches(setup.lengths, batch * setup.of_sample, seq, grouped=sorts)


def _waited(setup: Setup, batch: int, seq: int, ranks: int) -> Batches:
    """What those are padded to that are waited for."""
    if ranks == 1:
        return _kinds(setup, batch, seq)
    assert setup.lengths is not None
    sorts = setup.grad_accum if setup.group_by_length else 0
    return waited_batches(setup.lengths, batch * setup.of_sample, seq, grouped=sorts, **_meeting(setup, ranks))


def _fuller(setup: Setup, batch: int, seq: int, ranks: int) -> tuple[int, float]:
    """More samples than a rank has on average, and how far on the way to their tokens the one is that is waited for."""
    assert setup.lengths is not None
    times = fullest_rank(setup.lengths, batch * setup.of_sample, seq, **_meeting(setup, ranks))
    more = max(batch + 1, ceil(batch * times))
    return more, batch * (times - 1) / (more - batch)


def _meeting(setup: Setup, ranks: int) -> dict[str, int]:
    """How many ranks there are, how many go through every micro-batch together, and micro-batches of a step."""
    lockstep = 1
    if setup.sync_each_batch or setup.grad_accum == 1:
        lockstep = ranks
    elif setup.parallel in GATHERED:
        lockstep = ranks if setup.shard_group is None else min(ranks, max(1, setup.shard_group // setup.cp))
    return {"ranks": ranks, "lockstep": lockstep, "micro_batches": setup.grad_accum}


def _table(kinds: list[Batches], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and shares of the kinds of micro-batches of every point, each (kinds, *grid)."""
    most = max(map(len, kinds))
    filled = np.array([found + ((found[-1][0], 0.0),) * (most - len(found)) for found in kinds])
    lengths, shares = (np.moveaxis(filled[..., i], 0, -1).reshape(most, *shape) for i in (0, 1))
    return lengths, shares


def lengths_notes(setup: Setup, padding: Any) -> list[str]:
    """What an answer says of the lengths of documents."""
    if setup.lengths is None:
        if setup.packing != "flat" and not (setup.packing == "varlen" and setup.attention == "flash2"):
            return []
        return ["every document is taken to be as long as a row, the dearest case: --lengths says how long they are"]
    of = setup.lengths.described(setup.seq)
    if setup.packing != "none":
        told = "" if setup.packing == "flat" else ", rows full"
        if setup.packing == "flat" and np.max(setup.replicas) > 1:
            told = "; the step is that of the rank with the most tokens, which the others wait for"
        return [f"{of}, packed ({setup.packing}) without padding{told}"]
    share = units.percent(float(np.mean(padding)), 1)
    grouped = ", sorted by length" if setup.group_by_length else ""
    waits = ", of those of the rank that the others wait for" if np.max(setup.replicas) > 1 else ""
    return [
        f"{of}{grouped}: {share} of the tokens are padding, which tokens/s leaves out; the step is the mean over "
        f"micro-batches{waits}, the peak that of the longest"
    ]
