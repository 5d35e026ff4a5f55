"""A reference model under DeepSpeed's ZeRO-3: an engine of its own, cut as well, which only gathers.

It has no optimizer, so no masters, and its trace of modules holds: they are the same in every pass. What stays whole of
it follows DeepSpeed's default even where the config of the model that trains says "auto": TRL hands over values of its
own under names that DeepSpeed does not read, before transformers fills the "auto" in.

Source: trl/models/utils.py (1.8: `prepare_deepspeed`); deepspeed 0.19.8, runtime/engine.py
(`_configure_zero_optimizer`), runtime/config_utils.py ("auto" is left out).
"""

from collections.abc import Sequence

from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.tensor import Parameter
from ..parallel.units import ROOT, ShardedUnit, Survey
from .module_trace import trace_coverage
from .zero3 import CutWeights

SMALL = 10**5  # elements of a weight that stays whole (`stage3_param_persistence_threshold`)


class FrozenCut(CutWeights):
    """The hooks around a reference model."""

    def begin(self) -> None:
        """What is outside of blocks is gathered."""
        self.place = (self.place + 1) % len(self.passes)
        self._gather(ROOT)


def cut_weights(
    units: Sequence[ShardedUnit],
    survey: Survey,
    parameters: Sequence[Parameter],
    ranks: Ranks,
    hidden: int,
    setup: Setup,
) -> CutWeights:
    """The hooks around the model that trains, whose units are given, with those around a reference of its own.

    Args:
        survey: what was found as all passes were run, of `parameters`.
        hidden: hidden size of the model.
    """
    frozen = None
    if survey.frozen is not None:
        cut = survey.frozen.units(parameters, ranks.size, setup, tied=False, flat=True)
        frozen = FrozenCut(
            cut, ranks, 0, "none", passes=trace_coverage(survey.frozen.passes, trained=False), small=SMALL
        )
    passes = trace_coverage(survey.passes)
    return CutWeights(
        units, ranks, hidden, setup.checkpoint, setup.offload, passes=passes, frozen=frozen, wide=setup.shares_heads
    )
