"""What ranks wait for whose samples differ in length, against draws and by its laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.program.lengths import lengths_of, padded_batches
from perfmodel.program.stragglers import fullest_rank, waited_batches

few = settings(max_examples=25, derandomize=True)
powers = st.sampled_from((1, 2, 4, 8, 32))


def mean(kinds: tuple[tuple[int, float], ...]) -> float:
    """Of lengths with their shares."""
    return sum(length * share for length, share in kinds)


@pytest.mark.parametrize(
    ("ranks", "lockstep", "micro_batches"), [(8, 8, 4), (8, 1, 4), (64, 1, 16), (8, 2, 4), (2, 1, 2), (16, 16, 1)]
)
def test_it_is_what_draws_show(ranks: int, lockstep: int, micro_batches: int) -> None:
    """Micro-batches drawn at random: the longest of a group in each, and of groups the largest sum."""
    lengths, batch, seq = lengths_of("400:1200"), 2, 2048
    assert lengths is not None
    drawn = np.random.default_rng(0).choice(lengths.cut(seq), (4000, micro_batches, ranks // lockstep, lockstep, batch))
    waited = drawn.max(axis=(3, 4)).sum(axis=1).max(axis=1).mean() / micro_batches
    found = waited_batches(lengths, batch, seq, ranks=ranks, lockstep=lockstep, micro_batches=micro_batches)
    assert mean(found) == pytest.approx(waited, rel=0.01)
    assert sum(share for _, share in found) == pytest.approx(1.0)
    if lockstep in (1, ranks):
        behind = drawn.sum(axis=4)  # without padding
        most = behind.max(axis=3).sum(axis=1) if lockstep == ranks else behind.sum(axis=(1, 3))
        ratio = most.max(axis=1).mean() / behind.mean() / micro_batches
        told = fullest_rank(lengths, batch, seq, ranks=ranks, lockstep=lockstep, micro_batches=micro_batches)
        assert told == pytest.approx(ratio, rel=0.01)


@few
@given(batch=st.integers(1, 8), seq=st.integers(64, 4096), ranks=powers, more=powers, micro_batches=powers)
def test_more_ranks_wait_longer_and_meeting_once_a_step_less(
    batch: int, seq: int, ranks: int, more: int, micro_batches: int
) -> None:
    """One rank waits for none; nobody waits longer than the longest sample takes."""
    lengths = lengths_of("300:900")
    assert lengths is not None

    def waited(n: int, lockstep: int) -> float:
        return mean(waited_batches(lengths, batch, seq, ranks=n, lockstep=lockstep, micro_batches=micro_batches))

    own = mean(padded_batches(lengths, batch, seq))
    slack = 1.005  # lengths are rounded
    assert waited(1, 1) == pytest.approx(own)
    assert own <= waited(ranks, 1) * slack
    assert waited(ranks, 1) <= waited(ranks, ranks) * slack
    assert waited(ranks, ranks) <= waited(ranks * more, ranks * more) * slack
    assert waited(ranks, 1) <= waited(ranks * more, 1) * slack
    assert waited(ranks * more, 1) <= seq


def test_sorted_ranks_wait_little() -> None:
    """A sampler by length hands what is nearly alike to the ranks of a step (accelerate's `BatchSamplerShard`)."""
    lengths, batch, ranks = lengths_of("300:900"), 4, 8
    assert lengths is not None
    found = waited_batches(lengths, batch, 2048, ranks=ranks, lockstep=ranks, micro_batches=1, grouped=1)
    drawn = np.random.default_rng(0).choice(lengths.cut(2048), (4000, 50 * batch))
    first = -np.sort(-drawn, axis=1)[:, :: batch * ranks]  # the longest sample of every step
    assert mean(found) == pytest.approx(first.mean(), rel=0.01)
    at_random = waited_batches(lengths, batch, 2048, ranks=ranks, lockstep=ranks, micro_batches=1)
    assert mean(found) < 0.4 * mean(at_random)
