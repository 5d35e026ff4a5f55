"""What ranks wait for: the slowest GPU; of samples that differ in length the longest micro-batch, or the largest sum.

GPUs of one kind differ in clocks and power. Those of a job take as long as the slowest of them, whenever they meet: the
largest of n normal figures, in the mean, by Blom's approximation (Statistical Estimates and Transformed Beta-Variables,
1958).

Ranks meet in every collective. Those that gather weights from one another layer by layer, or exchange gradients each
time, go through every micro-batch together, which takes as long as that of the rank with the longest one: the longest
of n micro-batches is distributed as that of one with n times the samples. Ranks that meet once a step wait for the
largest sum over a step's micro-batches, whose distribution is a convolution (of independent draws).
"""

from functools import lru_cache
from typing import Any

import numpy as np

from .lengths import Batches, Lengths, longest_chances, padded_batches

BINS = 4096  # that the distribution of a sum has
FEWEST = 64  # bins of one of its terms

# Relative standard deviation of the seconds of GPUs of one kind, by the "8% (max 22%) average performance variation"
# in five clusters, mostly of V100 (https://arxiv.org/abs/2208.11035, abstract). Taken for a range between whiskers of
# box plots, which of a normal distribution are 5.4 standard deviations: how the paper has it could not be looked up
SPREAD = 0.015


def slowest_of(gpus: Any) -> Any:
    """Seconds of the slowest of so many GPUs over those of the mean one; 1 for one alone.

    Args:
        gpus: from 1; may be an array.
    """
    from statistics import NormalDist  # few ask for several

    if np.ndim(gpus):
        numbers, places = np.unique(gpus, return_inverse=True)
        return np.array([slowest_of(int(n)) for n in numbers])[places].reshape(np.shape(gpus))
    return 1.0 + SPREAD * NormalDist().inv_cdf((float(gpus) - 0.375) / (float(gpus) + 0.25))


@lru_cache(maxsize=4096)
def waited_batches(
    lengths: Lengths, batch: int, seq: int, *, ranks: int, lockstep: int, micro_batches: int, grouped: int = 0
) -> Batches:
    """The lengths of the micro-batches whose time the steps of several ranks take, each with its share.

    Sums of micro-batches are answered as a mixture of what one group of ranks waits for and of what all would in
    lockstep, whose mean length is that of the largest sum.

    Args:
        batch, seq, grouped: as of `padded_batches`. A sampler by length hands the micro-batches that follow one another
            to one rank after the other, so that always the same one has the longest.
        lockstep: ranks of a group that goes through every micro-batch together; groups meet once a step.
    """
    every = padded_batches(lengths, batch, seq, grouped=grouped, ranks=ranks)
    if ranks == lockstep or grouped or micro_batches == 1 or not lengths.vary(seq):
        return every
    own = padded_batches(lengths, batch, seq, ranks=lockstep)
    shares = np.diff(longest_chances(lengths, batch, ranks=lockstep))
    waited = _mean_of_largest(lengths.cut(seq), shares, micro_batches, ranks // lockstep)
    shortest, longest = (sum(length * share for length, share in kinds) for kinds in (own, every))
    part = min(1.0, max(0.0, (waited - shortest) / (longest - shortest))) if longest > shortest else 1.0
    found: dict[int, float] = {}
    for weight, kinds in ((1 - part, own), (part, every)):
        for length, share in kinds:
            found[length] = found.get(length, 0.0) + weight * share
    return tuple(sorted(found.items()))


@lru_cache(maxsize=4096)
def fullest_rank(lengths: Lengths, batch: int, seq: int, *, ranks: int, lockstep: int, micro_batches: int) -> float:
    """Tokens of the rank that is waited for over those of the mean one, where samples are laid out without padding.

    Args:
        lockstep, micro_batches: as of `waited_batches`; of groups that meet once a step what each waits for inside is
            left out, unless it is more.
    """
    if ranks == 1 or not lengths.vary(seq):
        return 1.0
    values = lengths.cut(seq)
    shares = np.full(len(values), 1 / len(values))
    largest = _mean_of_largest(values, shares, batch, lockstep)
    if lockstep < ranks:
        largest = max(largest, _mean_of_largest(values, shares, batch * micro_batches, ranks))
    return float(max(1.0, largest / values.mean()))


def _mean_of_largest(values: np.ndarray, shares: np.ndarray, terms: int, sums: int) -> float:
    """The mean of the largest of so many sums of so many independent terms, over the number of terms.

    Args:
        values: that a term may have, ascending, with their shares; on the bins each is split between its neighbours, so
            that means stay.
    """
    bins = max(FEWEST, BINS // terms)
    low, width = values[0], (values[-1] - values[0]) / (bins - 1)
    at = (values - low) / width
    left = np.minimum(at.astype(np.int64), bins - 2)
    of_term = np.bincount(left, shares * (1 - at + left), bins) + np.bincount(left + 1, shares * (at - left), bins)
    size = terms * (bins - 1) + 1
    of_sum = np.fft.irfft(np.fft.rfft(of_term, size) ** terms, size)
    no_larger = np.clip(np.cumsum(of_sum), 0.0, 1.0) ** sums
    no_larger[-1] = 1.0
    return float(low + width * (np.diff(no_larger, prepend=0.0) @ np.arange(size)) / terms)
