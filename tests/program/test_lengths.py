"""Lengths of documents as a value: a distribution, what a file holds, and what micro-batches are padded to."""

import random
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from perfmodel.errors import UserError
from perfmodel.program.lengths import Documents, lengths_of, padded_batches


def draws(mean: float, p95: float, n: int) -> np.ndarray:
    """Numbers drawn from the log-normal distribution by its own quantile function."""
    z = NormalDist().inv_cdf(0.95)
    sigma = z - np.sqrt(z**2 - 2 * np.log(p95 / mean))
    return np.exp(np.random.default_rng(0).normal(np.log(mean) - sigma**2 / 2, sigma, n))


def test_a_log_normal_has_the_mean_and_the_percentile_that_it_was_given() -> None:
    """They are all that a user says of the data."""
    found = lengths_of("400:1200")
    assert found is not None
    assert np.mean(found.values) == pytest.approx(400, rel=1e-9)
    assert np.quantile(found.values, 0.95) == pytest.approx(1200, rel=0.02)
    drawn = draws(400, 1200, 400_000)
    assert found.mean(1000) == pytest.approx(np.minimum(drawn, 1000).mean(), rel=0.01)
    assert found.squares(1000) == pytest.approx((np.minimum(drawn, 1000) ** 2).mean(), rel=0.01)


@pytest.mark.parametrize("batch", [1, 2, 8, 64])
@pytest.mark.parametrize("grouped", [0, 1, 4])
def test_micro_batches_are_padded_to_the_longest_of_their_draws(batch: int, grouped: int) -> None:
    """Drawn at random and sorted as transformers' sampler does, the mean of the longest is what the shares say."""
    drawn = np.minimum(draws(400, 1200, 50 * 64 * 300).round(), 2048)
    rows = drawn.reshape(-1, 50 * batch * max(1, grouped))
    rows = (np.sort(rows, axis=1) if grouped else rows).reshape(-1, batch)
    lengths = lengths_of("400:1200")
    assert lengths is not None
    found = padded_batches(lengths, batch, 2048, grouped=grouped)
    assert sum(share for _, share in found) == pytest.approx(1.0)
    assert sum(length * share for length, share in found) == pytest.approx(rows.max(axis=1).mean(), rel=0.01)
    squares = (rows.max(axis=1) ** 2).mean()
    assert sum(length**2 * share for length, share in found) == pytest.approx(squares, rel=0.02)


def test_documents_of_one_length_are_one_kind_of_micro_batch() -> None:
    """What does not vary has no padding."""
    for given in ("300:300", [300] * 5, [700, 300]):
        lengths = lengths_of(given)
        assert lengths is not None
        assert padded_batches(lengths, 4, 300) == ((300, 1.0),)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.txt", "3\n5\n\n10\n"),
        ("lines.jsonl", '{"length": 3}\n{"length": 5}\n{"length": 10}\n'),
        ("ids.jsonl", '{"input_ids": [1, 2, 3]}\n{"input_ids": [1, 2, 3, 4, 5]}\n{"input_ids": [0,1,2,3,4,5,6,7,8,9]}'),
        ("list.json", "[3, 5, 10]"),
        ("table.csv", "id,length\na,3\nb,5\nc,10\n"),
        ("alone.csv", "size\n3\n5\n10\n"),
    ],
)
def test_a_file_holds_a_length_a_line_or_in_a_column(tmp_path: Path, name: str, text: str) -> None:
    """What tokenisers and data libraries write is read as it is."""
    (tmp_path / name).write_text(text)
    found = lengths_of(str(tmp_path / name))
    assert found is not None
    assert (found.values, found.longest) == ((3.0, 5.0, 10.0), 10)


def test_many_lengths_keep_their_sum() -> None:
    """A long file is kept as fewer lengths, of which means must stay exact."""
    random.seed(0)
    values = [random.randint(1, 5000) for _ in range(12_345)]
    found = lengths_of(values)
    assert found is not None
    assert len(found.values) < len(values)
    assert np.mean(found.values) == pytest.approx(np.mean(values), rel=1e-9)
    assert found.longest == max(values)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("nowhere.txt", "no such file"),
        ("400:4000", "1 to 3.87 times its mean"),
        ("400:300", "1 to 3.87 times its mean"),
        ("0:0", "the mean must be"),
        ([], "holds no lengths"),
        ([0], "an integer from 1"),
        ([1.5], "an integer from 1"),
    ],
)
def test_what_no_documents_have_is_refused(given: Any, complaint: str) -> None:
    """One line says what would be right."""
    with pytest.raises(UserError, match=complaint):
        lengths_of(given)


@pytest.mark.parametrize("text", ["3\nx\n", "a,b\n1,2\n", "[3", '{"length": "x"}', "3.5\n4\n"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    """A file that holds no lengths must not become lengths."""
    (tmp_path / "data").write_text(text)
    with pytest.raises(UserError):
        lengths_of(str(tmp_path / "data"))


def test_documents_of_a_row_hold_its_tokens() -> None:
    """Kinds of documents that do not add up to the row would price another row."""
    lengths = lengths_of("400:1200")
    for documents in (Documents(lengths, 2048), Documents(None, 2048), Documents(lengths_of([10]), 2048)):
        of, times = documents.groups(np.array([[8192.0]]), np.array([[2048.0]]))
        assert (of * times).sum() == pytest.approx(8192)
        assert (of**2 * times).sum() == pytest.approx(documents.pairs(8192), rel=0.01)
    assert Documents(None, 2048).number(8192) == 4
    kinds = [len(Documents(lengths_of([*range(1, n + 1)]), 64).groups(64, 64)[0]) for n in (31, 32, 33, 300)]
    assert kinds == [31, 32, 32, 32]  # as many lengths are told apart, more of them in slices
    assert Documents(lengths_of([10]), 2048).pairs(8000) == 8000 * 10
