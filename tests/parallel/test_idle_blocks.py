"""Blocks that no pass runs, as an encoder's of images beside text alone: they stand once and count as often as all."""

import pytest

from perfmodel.program.ranks import Ranks
from perfmodel.recording.deepspeed.stages import CutStates
from perfmodel.recording.deepspeed.zero3_alone import recorded_update
from perfmodel.recording.parallel.fsdp1 import FlatShard
from perfmodel.recording.parallel.units import ROOT, ShardedUnit, shard_of
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.tensor import Parameter

GPUS = 4


def weight(name: str, count: int = 1, *, trains: bool = True) -> Parameter:
    """One of so many like layers."""
    made = Parameter(name, (32, 8), "bf16", kind="weight", trainable=trains)
    made.count = count
    return made


@pytest.mark.parametrize("trains", [True, False])
def test_fsdp1_keeps_all_blocks_that_never_run(trains: bool) -> None:
    """The root had one of eight in it: each rank's part of the weights was too small, and so was their number."""
    root = [weight("embed.weight"), *(weight(f"visual.blocks.0.fc{i}.weight", 8, trains=trains) for i in (1, 2))]
    block = [weight("layers.0.fc1.weight", 3)]
    units = [ShardedUnit(path, those, [shard_of(p, GPUS, "fp32") for p in those])
             for path, those in (("layers.0.", block), (ROOT, root))]  # fmt: skip
    form = FlatShard(units, Ranks(GPUS))
    kept = form.updated([*block, *root])
    assert sum(s.elements * s.count for s in kept) == sum(p.elements * p.count for p in (*block, *root))
    assert sum(s.numel * s.count for s in kept) * GPUS == sum(p.numel * p.count for p in (*block, *root))
    assert form.units[ROOT].parameters == root[:1]  # they have units of their own, which nothing gathers


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_has_masters_of_all_that_trains(stage: int) -> None:
    """Its flat buffers have zeros where no gradient came: what never ran had no masters and no moments."""
    ran, idle, frozen = weight("fc.weight", 3), weight("visual.blocks.0.fc.weight", 8), weight("e", trains=False)
    ran.used = True
    with recording(Tape("cuda", "90")):
        if stage == 3:
            update = recorded_update([ran, idle, frozen], "adamw-fused", clips=False)
        else:
            form = CutStates(Ranks(GPUS), stage, 64, ())
            update = form.own_update([ran, idle, frozen], "adamw-fused", clips=False)
            assert form.gradient_bytes([ran, idle, frozen]) == 2 * 11 * ran.numel // GPUS
    kept = sum(spec.nbytes for spec in update.states)
    assert kept == pytest.approx(12 * 11 * ran.numel // (1 if stage == 3 else GPUS), abs=64)
