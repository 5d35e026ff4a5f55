"""How predictions are held against measurements: the arithmetic behind every figure of trust."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validate.accuracy import Errors, Pair, beyond, paired


@dataclass(frozen=True)
class Timed:
    """A method's step: measured and predicted seconds."""

    method: str
    seconds: float
    predicted_seconds: float
    slack: float = 0.0


def pair(measured: float, predicted: float, slack: float = 0.0) -> Pair[Timed]:
    """A speed-up of so much."""
    return Pair(Timed("full", measured, predicted, slack), Timed("lora", 1.0, 1.0, slack))


def test_errors_by_hand() -> None:
    """Absolute, whatever their signs; the 90th percentile between the two largest of five."""
    found = Errors.of([-0.1, 0.2, 0.0, -0.4, 0.3])
    assert (found.number, found.mean, found.median, found.worst) == pytest.approx((5, 0.2, 0.2, 0.4))
    assert found.p90 == pytest.approx(0.36)


def test_no_errors_have_no_figures() -> None:
    """A mean of nothing is not a perfect one."""
    none = Errors.of([])
    assert none.number == 0
    assert all(math.isnan(x) for x in (none.mean, none.median, none.p90, none.worst))


@pytest.mark.parametrize(
    ("measured", "decided"), [(0.90, True), (0.92, False), (1.0, False), (1.09, False), (1.11, True), (0.3, True)]
)
def test_a_verdict_counts_from_ten_percent_on(measured: float, decided: bool) -> None:
    """Either way round: 1.1 times faster and 1.1 times slower."""
    assert pair(measured, 1.0).decided == decided


@pytest.mark.parametrize(
    ("measured", "predicted", "right"), [(1.2, 1.06, True), (1.2, 1.04, False), (0.8, 1.2, False), (0.8, 0.7, True)]
)
def test_a_verdict_is_right_if_it_is_the_measured_one(measured: float, predicted: float, right: bool) -> None:
    """Faster, slower or the same within 5 %."""
    assert pair(measured, predicted).right == right


def test_the_rounding_of_both_figures_is_taken_off_a_ratios_error() -> None:
    """Two figures to one digit cannot convict a model of a percent."""
    assert pair(1.0, 1.1).error == pytest.approx(0.1)
    assert pair(1.0, 0.9, slack=0.02).error == pytest.approx(-0.06)
    assert pair(1.0, 1.03, slack=0.02).error == 0.0


@given(off=st.floats(-1, 1), slack=st.floats(0, 1))
def test_rounding_never_turns_an_error_round(off: float, slack: float) -> None:
    """It shrinks, and keeps its sign."""
    left = beyond(off, slack)
    assert abs(left) == max(0.0, abs(off) - slack)
    assert left * off >= 0


def test_pairs_are_with_the_first_full_run_of_a_group() -> None:
    """A method without one has nothing to be compared with."""
    a, again, lora, top = (Timed(m, s, s) for m, s in (("full", 2.0), ("full", 3.0), ("lora", 1.0), ("top_k", 1.0)))
    group = {id(a): "x", id(again): "x", id(lora): "x", id(top): "y"}
    found = paired([lora, a, again, top], lambda o: group[id(o)], lambda o: o.method)
    assert found == [Pair(a, lora)]
