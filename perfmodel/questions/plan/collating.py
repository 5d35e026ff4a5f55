"""What collators make of a data set: rows of packed documents, tokens of padded micro-batches. Counts, no averages.

Packing is TRL's (`trl/data_utils.py`, `pack_dataset`): `wrapped` for documents under one mask, best-fit decreasing
(`bfd`) where each attends within itself. It maps over the data set by `datasets`' default of 1,000 samples, and each
thousand is packed by itself. Padding is that of transformers' `DataCollatorWithPadding`: to the longest of a
micro-batch.
"""

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from ...program.lengths import MEGA_BATCHES

Counts = NDArray[np.int64]
MAPPED = 1000  # samples that `Dataset.map(batched=True)` hands over at once
FEWEST_MEGA_BATCHES = 4  # that `get_length_grouped_indices` makes of a small data set


def wrapped_rows(lengths: Counts, seq: int) -> int:
    """Rows of documents behind one another that are cut up every `seq` tokens, whatever lies there.

    >>> wrapped_rows(np.array([5, 2, 3, 1]), 4)
    3
    """
    starts = np.arange(0, len(lengths), MAPPED)
    return int((-(-np.add.reduceat(lengths, starts) // seq)).sum())


def best_fit_rows(lengths: Counts, seq: int) -> int:
    """Rows of whole documents, cut to `seq` tokens: the longest first, each where it leaves least room.

    >>> best_fit_rows(np.array([5, 2, 3, 1]), 4)
    3
    """
    cut = np.minimum(lengths, seq)
    return sum(_best_fit(cut[start : start + MAPPED], seq) for start in range(0, len(cut), MAPPED))


def _best_fit(lengths: Counts, seq: int) -> int:
    """Rows alike in the room that they have left are one: `room` has each such figure once, `rows` how many have it."""
    room: list[int] = []
    rows: dict[int, int] = {}
    made = 0
    for length in np.sort(lengths)[::-1].tolist():
        at = bisect_left(room, length)
        if at == len(room):
            made += 1
            left = seq - length
        else:
            found = room[at]
            left = found - length
            rows[found] -= 1
            if not rows[found]:
                del room[at]
        if left:
            if not rows.get(left):
                insort(room, left)
            rows[left] = rows.get(left, 0) + 1
    return made


def length_grouped(lengths: Counts, batch: int) -> Counts:
    """Lengths in the order of transformers' sampler by length, from a random one (`get_length_grouped_indices`).

    Mega-batches are sorted, the longest sample first, and the longest of all comes first of all. `batch` is that of an
    optimizer step on a GPU, all micro-batches of it (`Trainer._get_train_sampler`).
    """
    several = max(1, min(len(lengths) // (batch * FEWEST_MEGA_BATCHES), MEGA_BATCHES)) * batch
    found = np.concatenate([np.sort(lengths[at : at + several])[::-1] for at in range(0, len(lengths), several)])
    longest = int(found[::several].argmax()) * several
    found[[0, longest]] = found[[longest, 0]]
    return found


def padded_tokens(lengths: Counts, batch: int) -> int:
    """Tokens of micro-batches of samples in this order, each padded to its longest; the last one may be short.

    >>> padded_tokens(np.array([3, 1, 2, 2, 5]), 2)
    15
    """
    starts = np.arange(0, len(lengths), batch)
    sizes = np.minimum(batch, len(lengths) - starts)
    return int((np.maximum.reduceat(lengths, starts) * sizes).sum())
