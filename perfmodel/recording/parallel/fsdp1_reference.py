"""A reference model under FSDP1, cut into blocks like the one that trains; it is never gone backward through."""

from collections.abc import Callable, Sequence
from typing import Any

from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, COMPUTE
from ...setup import Setup
from ...tape.tensor import Parameter, Tensor
from .collectives import wait_event
from .fsdp1 import FlatShard
from .units import ShardedUnit, Survey


class FlatFrozen(FlatShard):
    """The hooks around a reference model, whose blocks are units, too.

    A root is freed behind its backward pass alone (`_post_forward_reshard`), and this one has none: it is gathered once
    in a training and stays. So does all of it under SHARD_GRAD_OP.

    Source: trl/models/utils.py (1.8: `prepare_fsdp`).
    """

    def begin(self) -> None:
        """The root is there."""
        wait_event(COMPUTE, COMMUNICATION)

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block between its hooks."""
        return run(x) if self.keeps else super().block(path, run, x)


def flat_shards(
    units: Sequence[ShardedUnit],
    survey: Survey,
    parameters: Sequence[Parameter],
    ranks: Ranks,
    across: Ranks | None,
    setup: Setup,
) -> FlatShard:
    """The hooks around the model that trains, whose units are given, with those around a reference of its own.

    Args:
        survey: what was found as all passes were run, of `parameters`.
        across: as of `FlatShard`.
    """
    frozen, keeps = None, not setup.reshard
    if survey.frozen is not None:
        frozen = FlatFrozen(survey.frozen.units(parameters, ranks.size, setup, tied=False), ranks, keeps=keeps)
    offloads = setup.offload != "none"
    holds = setup.checkpoint == "block-reentrant" and setup.stack.checkpoints_around_blocks
    return FlatShard(
        units, ranks, across, offloads=offloads, keeps=keeps, holds=holds, frozen=frozen, amp=setup.amp,
        reduce_dtype=setup.reduce_dtype,
    )  # fmt: skip
