"""How long documents are: what the data decides in a real run, given as a value.

A distribution is kept as equally likely lengths, each the mean of a slice of the distribution, so that means are exact.
A log-normal one follows from its mean m and 95th percentile p: with z the 95th percentile of the standard normal,
m = exp(μ + σ²/2) and p = exp(μ + zσ), so σ = z - √(z² - 2 ln(p/m)); the mean of the part of it below a quantile u is
m·Φ(Φ⁻¹(u) - σ) (Aitchison and Brown, The Lognormal Distribution, 1957, chapter 2).
"""

import json
import re
from dataclasses import field
from functools import lru_cache
from math import exp, log, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..resources import is_file, parsed, read_text
from ..values import immutable
from .dims import Dim

DIGITS = 12  # of a number that could be a length
LONGEST = 2**24  # tokens; beyond this it is a typing error
SLICES = 256  # equally likely lengths that a distribution is kept as
KINDS = 32  # lengths of documents that an attention kernel is priced for
BATCHES = 16  # kinds of micro-batches that stand for all of them
MOST_SORTED = 256  # samples of a micro-batch, from where on its size hardly changes what sorting leaves
MEGA_BATCHES = 50  # of which a sampler by length sorts the samples (transformers' `get_length_grouped_indices`)
COLUMNS = ("length", "lengths", "num_tokens", "n_tokens", "tokens", "input_ids")  # of a file, the first that it has
P95 = 1.6448536269514722  # 95th percentile of the standard normal distribution
WIDEST = exp(P95**2 / 2)  # most that the 95th percentile of a log-normal distribution is above its mean


@immutable
class Lengths:
    """A distribution of the lengths of documents in tokens.

    Attributes:
        spec: what it was given as.
        values: equally likely lengths, ascending.
        longest: the longest document; None where there is no longest.
        given: every length in the order in which it was given; empty for a distribution.

    >>> lengths_of("400:1200").mean(2048) < lengths_of("400:1200").mean(4096) < 400.001
    True
    """

    spec: str
    values: tuple[float, ...]
    longest: int | None
    given: tuple[int, ...] = field(default=(), repr=False, compare=False)

    def __hash__(self) -> int:
        return hash(self.spec)

    def cut(self, seq: Dim) -> np.ndarray:
        """The equally likely lengths where documents are cut to `seq` tokens: (values, *grid)."""
        seq = np.asarray(seq)
        return np.minimum(np.reshape(self.values, (-1, *(1,) * seq.ndim)), seq)

    def mean(self, seq: Dim) -> Any:
        """Mean length of documents cut to `seq` tokens."""
        return _plain(self.cut(seq).mean(axis=0))

    def squares(self, seq: Dim) -> Any:
        """Mean square of it: what a document's attention within itself follows."""
        return _plain((self.cut(seq) ** 2).mean(axis=0))

    def most(self, seq: Dim) -> Any:
        """The longest document where they are cut to `seq` tokens."""
        return seq if self.longest is None else _plain(np.minimum(self.longest, seq))

    def vary(self, seq: int) -> bool:
        """Whether documents cut to `seq` tokens differ in their lengths."""
        return min(self.values[0], seq) != min(self.values[-1], seq)

    def described(self, seq: Dim) -> str:
        """In words, where they are cut to `seq` tokens."""
        return f"documents of {np.mean(self.mean(seq)):,.0f} tokens on average ({self.spec}, cut to the row's length)"


def _plain(value: Any) -> Any:
    return value if value.ndim else value.item()


def lengths_of(given: Any) -> Lengths | None:
    """The distribution that MEAN:P95, a file or a sequence of lengths stands for.

    Raises:
        UserError: none of these, or lengths that no documents have.
    """
    if given is None or isinstance(given, Lengths):
        return given
    if not isinstance(given, (str, Path)):
        return _of_values("given lengths", list(np.asarray(given).reshape(-1).tolist()))
    text = str(given)
    numbers = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*:\s*(\d+(?:\.\d*)?)\s*", text)
    if numbers:
        return _log_normal(float(numbers[1]), float(numbers[2]))
    if not is_file(text):
        raise UserError(f"lengths {text!r}: no such file; give one with a length a line, or MEAN:P95 such as 400:1200")
    return _of_values(text, _in_file(Path(text)))


@lru_cache(maxsize=64)
def _log_normal(mean: float, p95: float) -> Lengths:
    spec = f"{mean:g}:{p95:g}"
    if not 1 <= mean <= LONGEST:
        raise UserError(f"lengths {spec}: the mean must be from 1 to {LONGEST} tokens")
    if not mean <= p95 <= WIDEST * mean:
        raise UserError(
            f"lengths {spec}: the 95th percentile of a log-normal distribution is 1 to {WIDEST:.2f} times its mean"
        )
    from statistics import NormalDist  # slow to load

    normal = NormalDist()
    sigma = P95 - sqrt(max(0.0, P95**2 - 2 * log(p95 / mean)))
    if sigma == 0:
        return Lengths(spec, (mean,), round(mean))
    inner = [mean * normal.cdf(normal.inv_cdf(i / SLICES) - sigma) for i in range(1, SLICES)]
    below = np.array([0.0, *inner, mean])
    return Lengths(spec, tuple(np.maximum(1.0, np.diff(below) * SLICES).tolist()), None)


def _of_values(spec: str, values: list[Any]) -> Lengths:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LONGEST:
            raise UserError(f"lengths {spec}: a length must be an integer from 1 to {LONGEST}, got {value!r}")
    if not values:
        raise UserError(f"lengths {spec}: holds no lengths")
    found = np.sort(np.array(values, dtype=np.float64))
    if len(found) > SLICES:  # the means of slices of equal share; a length that straddles two counts in both
        below = np.concatenate(([0.0], np.cumsum(found)))
        at = np.linspace(0, len(found), SLICES + 1)
        found = np.diff(np.interp(at, np.arange(len(found) + 1), below)) / (len(values) / SLICES)
    return Lengths(spec, tuple(found.tolist()), max(values), tuple(values))


def _in_file(path: Path) -> list[Any]:
    """The lengths of a file: an integer a line, JSON lines, or the column of a CSV file that holds them."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        return []
    if lines[0][0] in "[{":
        found = [parsed(line, json.loads, "JSON", f"{path}, line {i}") for i, line in enumerate(lines, 1)]
        found = found[0] if len(found) == 1 and isinstance(found[0], list) else found
        return [_of_record(x, path) if isinstance(x, dict) else x for x in found]
    if re.fullmatch(r"[-+.\d]+", lines[0]):
        return [_integer(line) for line in lines]
    import csv

    rows = parsed("\n".join(lines), lambda text: list(csv.DictReader(text.splitlines())), "CSV", str(path), csv.Error)
    return [_integer(_of_record(row, path)) for row in rows]


def _integer(text: Any) -> Any:
    """What a text of digits stands for; anything else as it is."""
    return int(text) if isinstance(text, str) and text.strip().isdecimal() and len(text) < DIGITS else text


def _of_record(record: dict[Any, Any], path: Path) -> Any:
    column = next((name for name in COLUMNS if name in record), next(iter(record)) if len(record) == 1 else None)
    if column is None:
        raise UserError(f"{path}: no column of lengths: call it {COLUMNS[0]} (there are {', '.join(map(str, record))})")
    return len(record[column]) if isinstance(record[column], list) else record[column]


Batches = tuple[tuple[int, float], ...]


@lru_cache(maxsize=4096)
def padded_batches(lengths: Lengths, batch: int, seq: int, *, grouped: int = 0, ranks: int = 1) -> Batches:
    """The lengths that micro-batches of `batch` samples are padded to, each with its share of the micro-batches.

    Args:
        seq: samples are cut to so many tokens.
        grouped: micro-batches of a step, of which a sampler by length sorts `MEGA_BATCHES` times as many and cuts them
            up in that order (transformers' `Trainer._get_train_sampler`); 0: none sorts.
        ranks: of whose micro-batches the longest is meant.
    """
    cut = lengths.cut(seq)
    if not lengths.vary(seq):
        return ((max(1, round(float(cut[0]))), 1.0),)
    no_longer = longest_chances(lengths, batch, grouped=grouped, ranks=ranks)
    found: dict[int, float] = {}
    for length, share in zip(*_sliced(no_longer, cut, BATCHES), strict=True):
        key = max(1, round(float(length)))
        found[key] = found.get(key, 0.0) + float(share)
    return tuple(sorted(found.items()))


def longest_chances(lengths: Lengths, batch: int, *, grouped: int = 0, ranks: int = 1) -> np.ndarray:
    """With what probability the longest sample of a micro-batch is among the shortest i of `lengths.values`, (i,).

    Args:
        grouped, ranks: as of `padded_batches`.
    """
    n = len(lengths.values)
    return _sorted_maximum(n, batch, grouped, ranks) if grouped else (np.arange(n + 1) / n) ** (batch * ranks)


def _sorted_maximum(n: int, batch: int, accumulated: int, ranks: int) -> np.ndarray:
    """With what probability the longest sample of a sorted micro-batch is among the shortest i of n alike in share.

    Of ranks that get one after the other (accelerate's `BatchSamplerShard`) it is that of the first of them.

    That at least k of m draws are is the upper tail of a binomial distribution; k is m, m - batch, … for micro-batches.
    """
    batch = min(batch, MOST_SORTED)
    m = MEGA_BATCHES * batch * max(1, min(accumulated, MOST_SORTED // batch))
    k = np.arange(m + 1)[:, None]
    logs = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, m + 1)))))[:, None]  # of factorials
    share = np.arange(1, n) / n
    chance = np.exp(logs[m] - logs - logs[::-1] + k * np.log(share) + (m - k) * np.log1p(-share))
    fewer = np.cumsum(chance, axis=0)[np.arange(m, 0, -batch * ranks) - 1]  # than k
    return np.concatenate(([0.0], 1 - fewer.mean(axis=0), [1.0]))


def _sliced(no_longer: np.ndarray, values: np.ndarray, slices: int) -> tuple[np.ndarray, np.ndarray]:
    """A distribution as few lengths and their shares: means of slices that have equal shares of the tokens.

    Args:
        no_longer: with what probability a length is among the first i values; `values` ascend.
    """
    tokens = np.concatenate(([0.0], np.cumsum(np.diff(no_longer) * values)))
    edges = np.linspace(0.0, tokens[-1], slices + 1)
    shares = np.diff(np.interp(edges, tokens, no_longer))
    return np.diff(edges) / shares, shares


class Documents(NamedTuple):
    """Documents behind one another that attend within themselves.

    Attributes:
        lengths: None: each has as many tokens as it may.
        longest: tokens that each is cut to.
    """

    lengths: Lengths | None
    longest: Dim

    def number(self, tokens: Dim) -> Dim:
        """How many documents so many tokens are."""
        mean = self.longest if self.lengths is None else self.lengths.mean(self.longest)
        return _whole(np.maximum(1.0, np.rint(tokens / mean)))

    def in_rows(self, rows: Dim) -> Dim:
        """Tokens of as many documents as rows, of which one is as long as a row."""
        if self.lengths is None:
            return rows * self.longest
        return _whole(np.rint(self.longest + (rows - 1) * self.lengths.mean(self.longest)))

    def pairs(self, tokens: Dim, window: int | None = None) -> Dim:
        """Pairs of tokens of one document, a causal mask not deducted: the sum of the squares of the lengths, or of the
        bands of a window."""
        if window is not None:
            lengths, counts = self.groups(tokens, self.longest)
            return _whole(np.rint((counts * band(lengths, window)).sum(axis=0)))
        if self.lengths is None:
            return tokens * self.longest
        return _whole(np.rint(tokens * self.lengths.squares(self.longest) / self.lengths.mean(self.longest)))

    def groups(self, tokens: Any, longest: Any) -> tuple[np.ndarray, np.ndarray]:
        """The documents as (lengths, how many have each), both (kinds, *grid), of slices of the distribution."""
        if self.lengths is None:
            return np.asarray(longest)[None], np.asarray(tokens / longest)[None]
        means, shares = _slices_of(self.lengths)
        means, shares = (x.reshape(-1, *(1,) * np.ndim(longest)) for x in (means, shares))
        cut = np.minimum(means, longest)
        return cut, shares * (tokens / (shares * cut).sum(axis=0))


def band(length: Any, window: Any) -> Any:
    """Pairs of tokens less than a window apart; one as wide as the sequence, or wider, makes all."""
    window = np.minimum(window, length) if np.ndim(length) or np.ndim(window) else min(window, length)
    return length * (2 * window - 1) - window * (window - 1)


@lru_cache(maxsize=64)
def _slices_of(lengths: Lengths) -> tuple[np.ndarray, np.ndarray]:
    n = len(lengths.values)
    if n <= KINDS:
        return np.array(lengths.values), np.full(n, 1 / n)
    return _sliced(np.arange(n + 1) / n, np.array(lengths.values), KINDS)


def _whole(value: Any) -> Dim:
    return value.astype(np.int64) if np.ndim(value) else int(value)
