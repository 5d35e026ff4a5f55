"""How many tokens a router sends to each expert of a mixture: given as a value, since data decides it in a real run."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, as_given
from .dims import only

BALANCED = 0.0  # exponent of a router that treats all experts alike


class Routing(NamedTuple):
    """The load of `experts` experts when every token goes to `top_k` of them.

    The share of the i-th busiest expert falls as 1 / i^exponent (Zipf); 0 is balanced.

    >>> Routing(4, 2).counts(10).tolist()
    [3, 3, 2, 2]
    >>> Routing(4, 2, 1.0).counts(20).tolist()
    [10, 5, 3, 2]
    """

    experts: int
    top_k: int = 1
    exponent: float = BALANCED

    def counts(self, rows: Any) -> np.ndarray:
        """Rows of each expert, busiest first: int64 (experts, *grid) for `rows` = tokens · top_k, which is their sum.

        What does not divide goes to the experts with the largest remainders; no expert gets more than all tokens, since
        a token goes to different experts.
        """
        rows = np.asarray(rows, dtype=np.int64)
        shares = self._shares(float(self.top_k)).reshape(-1, *[1] * rows.ndim)
        exact = shares * (rows / self.top_k)
        counts = np.minimum(np.floor(exact + 1e-9), rows // self.top_k).astype(np.int64)
        left = rows - counts.sum(axis=0)
        room = counts < rows // self.top_k
        order = np.argsort(np.where(room, counts - exact, np.inf), axis=0, kind="stable")
        rank = np.argsort(order, axis=0, kind="stable")
        return np.asarray(counts + (rank < left))

    def groups(self, rows: Any) -> list[tuple[Any, Any]]:
        """The load as (rows of an expert, how many experts have as many), without those that have none.

        >>> Routing(4, 2).groups(10)
        [(3, 2), (2, 2)]
        """
        if self.exponent == BALANCED:
            even, more = rows // self.experts, rows % self.experts
            found = [(even + 1, more), (even, (self.experts - more) * (even > 0))]
        elif isinstance(rows, np.ndarray):
            found = [(count, (count > 0).astype(np.int64)) for count in self.counts(rows)]
        else:
            found = list(Counter(self.counts(rows).tolist()).items())
        return [(count, times) for count, times in found if np.any(count * times)]

    def turns(self, rows: Any) -> list[tuple[Any, int]]:
        """`groups` of which the number of experts is a plain one: how often a loop over experts takes each turn.

        >>> Routing(4, 2).turns(10)
        [(3, 2), (2, 2)]

        Raises:
            MixedStructure: a grid on whose points they differ.
        """
        if isinstance(rows, np.ndarray):
            only(np.count_nonzero(self.counts(rows), axis=0))  # those that are hit
            if self.exponent == BALANCED:
                only(rows % self.experts)  # those that get a row more
        return [(count, only(times)) for count, times in self.groups(rows)]

    def _shares(self, total: float) -> np.ndarray:
        """Share of the tokens that each expert gets, at most 1, all of them `total`."""
        free = np.arange(1, self.experts + 1) ** -self.exponent
        shares = np.zeros(self.experts)
        full = 0
        while True:
            rest = free[full:] * (total - full) / free[full:].sum()
            over = int(np.count_nonzero(rest > 1.0))
            if not over:
                shares[:full], shares[full:] = 1.0, rest
                return shares
            full += over


def exponent_of(text: str) -> float:
    """The exponent that `balanced` or `zipf:EXPONENT` names.

    >>> exponent_of("zipf:1.1")
    1.1

    Raises:
        UserError: neither of them.
    """
    kind, _, value = text.partition(":") if isinstance(text, str) else ("", "", "")
    if kind == text == "balanced":
        return BALANCED
    try:
        exponent = float(value) if kind == "zipf" else np.nan
    except ValueError:
        exponent = np.nan
    if not 0 < exponent <= 10:
        raise UserError(
            f"routing {as_given(text)} is unknown: write balanced, or zipf:1.1 (an exponent above 0, up to 10)"
        )
    return exponent
