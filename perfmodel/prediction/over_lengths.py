"""The answer where samples differ in length: the mean over the micro-batches that a sampler makes of them.

Without packing each micro-batch is padded to its longest sample. The kinds of micro-batches and their shares
(`program.lengths.padded_batches`) are one more axis of a grid, over which time and counts are averaged; the peak is
that of the longest. A step of several micro-batches takes on average what steps of micro-batches of one kind each take.
"""

from dataclasses import fields, replace
from typing import Any

import numpy as np

from .. import units
from ..methods import Method
from ..program.dims import decide
from ..program.lengths import Batches, Lengths, padded_batches
from ..program.part import PHASES
from ..setup import Setup
from .communication import Communication
from .grid import Compute, grid_shape, over_grid

COUNTS = ("flops", "bytes", "kernels", "dispatches")


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
        return replace(compute(setup, method), memory=longest.memory, fits=longest.fits)
    return compute(setup, method) if setup.packing == "varlen" else _mean(compute, setup, method, lengths)


def drawn(setup: Setup) -> list[tuple[float, Setup]]:
    """The kinds of micro-batches that a single setup without packing has, with their shares; else the setup itself."""
    if setup.lengths is None or setup.packing != "none":
        return [(1.0, setup)]
    kinds = _kinds(setup, setup.batch, setup.seq)
    plain = _one_length(setup, pads=_pads(setup, setup.batch, setup.seq))
    return [(share, replace(plain, seq=length)) for length, share in kinds]


def longest_drawn(setup: Setup) -> Setup:
    """The micro-batches of a single setup that are padded to the most, which decide its peak."""
    if setup.lengths is None or setup.packing != "none":
        return setup
    plain = _one_length(setup, pads=_pads(setup, int(setup.batch), int(setup.seq)))
    return replace(plain, seq=setup.lengths.most(setup.seq))


def _mean(compute: Compute[Any], setup: Setup, method: Method, lengths: Lengths) -> Any:
    """The mean over the kinds of micro-batches at every point of a grid."""
    shape = grid_shape(setup, method)
    batch, seq = (np.broadcast_to(size, shape) for size in (setup.batch, setup.seq))
    points = [(int(b), int(s)) for b, s in zip(batch.flat, seq.flat, strict=True)]
    pads = np.array([_pads(setup, *point) for point in points]).reshape(shape)
    plain = _one_length(setup, pads=decide(pads))
    padded, shares = _table([_kinds(setup, *point) for point in points], shape)
    longest = compute(replace(plain, seq=lengths.most(setup.seq)), method)
    over = over_grid(compute, replace(plain, seq=padded.astype(np.int64)), method)

    def mean(value: Any, weights: np.ndarray = shares) -> Any:
        if isinstance(value, dict):
            of_phases = {name: mean(entry, weights) for name, entry in value.items()}
            if set(of_phases) == {*PHASES, "total"}:  # numbers are rounded phase by phase
                of_phases["total"] = sum(of_phases[phase] for phase in PHASES)
            return of_phases
        if isinstance(value, Communication):
            return replace(value, **{f.name: mean(getattr(value, f.name), weights) for f in fields(value)})
        value = np.broadcast_to(value, shares.shape)
        average = (value * weights).sum(axis=0) / weights.sum(axis=0)
        average = np.rint(average).astype(np.int64) if np.issubdtype(value.dtype, np.integer) else average
        return average if average.ndim else average.item()

    by_time = over.time.phases["total"] * shares
    time = replace(over.time, **{f.name: mean(getattr(over.time, f.name)) for f in fields(over.time)})
    time = replace(time, launch_bound_share=mean(over.time.launch_bound_share, by_time))
    padding = np.maximum(0.0, 1 - lengths.mean(setup.seq) / mean(padded)) * decide(pads)  # rounded lengths are none
    counts = {name: mean(getattr(over, name)) for name in COUNTS}
    mfu = mean(over.mfu, by_time)
    asked = _asked(setup, longest)
    return replace(longest, setup=asked, time=time, mfu=mfu, padding=padding if shape else float(padding), **counts)


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


def _kinds(setup: Setup, batch: int, seq: int) -> Batches:
    """What micro-batches of so many samples are padded to; sequences of pairs all to one length, as TRL's collator."""
    assert setup.lengths is not None
    sorts = setup.grad_accum if setup.group_by_length else 0
    return padded_batches(setup.lengths, batch * setup.of_sample, seq, grouped=sorts)


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
        return [f"{of}, packed ({setup.packing}) without padding" + ("" if setup.packing == "flat" else ", rows full")]
    share = units.percent(float(np.mean(padding)), 1)
    grouped = ", sorted by length" if setup.group_by_length else ""
    return [
        f"{of}{grouped}: {share} of the tokens are padding, which tokens/s leaves out; the step is the mean over "
        "micro-batches, the peak that of the longest"
    ]
