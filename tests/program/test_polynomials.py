"""Numbers for any batch and length: what six recordings say is what the rule behind them says everywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel.program.polynomials import NoPolynomial, Polynomial, highest, solver, value

BATCHES, LENGTHS = (2, 3), (83, 1367, 4099)
coefficients = st.tuples(*[st.integers(0, 2**20)] * 6)


@given(coefficients, st.integers(1, 64), st.integers(1, 2**15))
def test_six_numbers_tell_a_polynomial(found: tuple[int, ...], batch: int, seq: int) -> None:
    """Whatever its coefficients: solved at six sizes, equal at a seventh."""
    rule = Polynomial(found)
    solved = solver(BATCHES, LENGTHS)(tuple(rule.at(b, s) for b in BATCHES for s in LENGTHS))
    assert value(solved, batch, seq) == rule.at(batch, seq)


def test_one_batch_or_one_length_leaves_the_other() -> None:
    """A batch of one is a program of its own, and an image has no length."""
    assert solver((1,), (5, 7, 11))((50, 70, 110)) == Polynomial((0, 10, 0, 0, 0, 0))
    assert solver((2, 3), (512,))((20, 30)) == Polynomial((0, 0, 0, 10, 0, 0))
    assert solver((2, 3), (512,))((20, 20)) == 20


def test_what_is_rounded_up_is_no_polynomial() -> None:
    """A program that pads to multiples must not be taken for one that does not; bytes alone may be off a little."""
    padded = tuple(b * (-(-s // 64) * 64) for b in BATCHES for s in LENGTHS)
    with pytest.raises(NoPolynomial):
        solver(BATCHES, LENGTHS)(padded)
    near = solver(BATCHES, LENGTHS)(padded, whole=False)
    assert near.at(2, 2048) == pytest.approx(2 * 2048, rel=0.05)


@given(st.lists(coefficients, min_size=1, max_size=8), st.integers(1, 64), st.integers(1, 2**15))
def test_the_largest_is_never_dropped(rows: list[tuple[int, ...]], batch: int, seq: int) -> None:
    """A file keeps few of thousands of live bytes; at every size the largest is among them."""
    numbers = [Polynomial(row) for row in rows]
    kept = highest(numbers)
    assert max(value(n, batch, seq) for n in kept) == max(n.at(batch, seq) for n in numbers)


def test_a_grid_is_evaluated_at_once() -> None:
    rule, seq = Polynomial((1, 2, 3, 4, 5, 6)), np.array([8, 16, 32])
    assert rule.at(3, seq).tolist() == [rule.at(3, int(s)) for s in seq]
