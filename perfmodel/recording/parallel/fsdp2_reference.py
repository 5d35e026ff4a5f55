"""A reference model under FSDP2: one unit, or blocks like the model that trains; it is never gone backward through."""

from collections.abc import Callable, Sequence
from typing import Any

from ... import objectives
from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.tensor import Parameter, Tensor
from .fsdp2 import FullyShard
from .fsdp2_blocks import CutModules, ShardedBlocks, ShardedHalves
from .gathered import Gathered
from .units import ROOT, ShardedUnit, Survey, whole_reference


class FrozenBlocks(FullyShard):
    """The hooks around a reference model that is cut like the one that trains.

    What its backward pass would free nothing frees, for it has none: it is gathered once in a training.

    Source: llamafactory/train/sft/trainer.py (0.9.5), by accelerate's `fsdp2_prepare_model`.
    """

    def _unshard(self, state: Gathered, *, forward: bool) -> None:
        if not state.unit.stays:
            super()._unshard(state, forward=forward)


class FrozenShard(FrozenBlocks):
    """The hooks around one that is a unit, gathered whole before its pass and freed behind it.

    Source: trl/models/utils.py (1.8: `prepare_fsdp`), which wraps no block.
    """

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block runs as it would alone."""
        return run(x)

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Its parameters are there."""
        return run(x)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What was gathered goes."""
        self.units[ROOT].whole.clear()
        return super().end(outputs)


def full_shards(
    units: Sequence[ShardedUnit],
    survey: Survey,
    parameters: Sequence[Parameter],
    ranks: Ranks,
    across: Ranks | None,
    setup: Setup,
    tied: bool,
    by_function: bool,
) -> FullyShard:
    """The hooks around the model that trains, whose units are given, with those around a reference of its own.

    Args:
        survey: what was found as all passes were run, of `parameters`.
        across: as of `FullyShard`.
        tied: whether the words and the head are one weight.
        by_function: as of `ShardedHalves`.
    """
    frozen: FrozenBlocks | None = None
    if survey.frozen is not None and objectives.found(setup.objective).reference_by_blocks:
        alike = survey.frozen.units(parameters, ranks.size, setup, tied=tied)
        alike[-1].stays = True  # the root
        frozen = FrozenBlocks(alike, ranks, setup.amp)
    elif survey.frozen is not None:
        frozen = FrozenShard([whole_reference(parameters, ranks.size, setup)], ranks, setup.amp)
    options: dict[str, Any] = {"offloads": setup.offload != "none", "reduce_dtype": setup.reduce_dtype}
    if setup.fsdp_units != "accelerate":
        options["hooks_words"] = setup.checkpoint != "none" or setup.tp > 1
    if setup.fsdp_units == "adapters":
        return ShardedHalves(units, ranks, setup.amp, frozen, across, by_function=by_function, **options)
    if setup.fsdp_units == "blocks":
        return ShardedBlocks(units, ranks, setup.amp, frozen, across, **options)
    hooks = CutModules if setup.tp > 1 else FullyShard
    return hooks(units, ranks, setup.amp, frozen, across, **options)
