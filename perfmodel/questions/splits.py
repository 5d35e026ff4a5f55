"""How a model may be cut over GPUs, and which cuts a search need not try."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Protocol, Self

import numpy as np

from ..architectures import Architecture
from ..architectures.llama import SHARING_TOKENS
from ..errors import UserError
from ..setup import Setup

NEAR = 1.1  # times the best: what shares tokens and is slower is not overtaken by what does not


@dataclass(frozen=True)
class Split:
    """What GPUs have of layers: a part of each, or some of them, or both."""

    tp: int
    sequence_parallel: bool
    pp: int

    @classmethod
    def of(cls, setup: Setup) -> Self:
        """That of a setup."""
        return cls(setup.tp, setup.sequence_parallel, setup.pp)


@dataclass(frozen=True)
class Load:
    """What a GPU holds of a model that is cut."""

    cut: Split
    batch: int
    checkpoint: str

    def behind(self, tried: Mapping["Load", "Tried | None"], best: float) -> bool:
        """Whether this is not to be better than what was tried, all else being equal.

        What is heavier than what does not fit does not either; recomputing adds to the time of what fits without it;
        micro-batches larger than such as are slower already are slower still; that ranks share tokens changes a time
        by little.

        Args:
            tried: None where it is refused.
            best: seconds of the best that fits.
        """
        sharing = replace(self, cut=replace(self.cut, sequence_parallel=True))
        if sharing != self and any(other.cut == sharing.cut for other in tried):
            like = tried.get(sharing)
            if sharing not in tried or (like and like.seconds > best * NEAR):
                return True
        alike = {o: at for o, at in tried.items() if at and (o.cut.tp, o.cut.pp) == (self.cut.tp, self.cut.pp)}
        if any(not at.fits and other.lighter(self) for other, at in alike.items()):
            return True
        own = {o: at for o, at in alike.items() if at.fits and o.cut == self.cut}
        if Load(self.cut, self.batch, "none") in own:
            return True
        return any(
            less.batch < more.batch < self.batch
            and more.checkpoint == self.checkpoint
            and less.checkpoint in ("none", self.checkpoint)
            and own[less].seconds <= own[more].seconds
            for less, more in product(own, own)
        )

    def lighter(self, other: Self) -> bool:
        """Whether it takes no more memory than another one on as many ranks."""
        return (
            self.cut.sequence_parallel >= other.cut.sequence_parallel
            and self.batch <= other.batch
            and other.checkpoint in ("none", self.checkpoint)
        )


class Tried(Protocol):
    """What is known of a setup."""

    @property
    def fits(self) -> bool:
        """Whether it runs."""

    @property
    def seconds(self) -> float:
        """Its step time."""


def micro_batches(setup: Setup, samples: int) -> Iterator[tuple[int, int]]:
    """(batch, accumulation) with so many samples: as it is, and every power of two that divides them."""
    if setup.batch * setup.grad_accum == samples:
        yield setup.batch, setup.grad_accum
    batch = 1
    while batch <= samples:
        if samples % batch == 0 and (batch, samples // batch) != (setup.batch, setup.grad_accum):
            yield batch, samples // batch
        batch *= 2
    if samples != batch // 2 and (samples, 1) != (setup.batch, setup.grad_accum):
        yield samples, 1


def ways_to_cut(architecture: Architecture, setup: Setup) -> Iterator[Split]:
    """As it is, then powers of two in the place of either number or of both, where that is modelled; where ranks may
    share tokens, those that do come before those that do not."""
    gpus, tps, pps = setup.gpus, [setup.tp], [setup.pp]
    others = [n for n in (1, 2, 4, 8) if isinstance(gpus, int) and gpus > 1 and gpus % n == 0]
    with suppress(UserError):
        tps.extend(tp for tp in others if tp != setup.tp and (tp == 1 or architecture.part_of(tp)))
    with suppress(UserError):
        architecture.staged()
        pps += [pp for pp in others if pp != setup.pp]
    shares = architecture.of_megatron or architecture.model_type in SHARING_TOKENS
    yield Split.of(setup)
    for tp, pp in sorted(product(tps, pps), key=lambda cut: (cut[0] != setup.tp) + (cut[1] != setup.pp)):
        if np.all(np.asarray(gpus) % (tp * pp) == 0):
            sharing = (False,) if tp == 1 else (True, False) if shares else (setup.sequence_parallel,)
            yield from (cut for each in sharing if (cut := Split(tp, each, pp)) != Split.of(setup))
