"""Numbers with units, for people; inside the model everything is SI."""

from collections.abc import Sequence
from math import floor, isnan, log10

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


def seconds(value: float) -> str:
    """A time with three digits: 117 ms."""
    if value < 5e-9:  # shows as nothing, and no step is known to a nanosecond
        return "0"
    for factor, unit in _SECONDS:
        if value >= factor or unit == "us":
            return f"{_digits(value / factor)} {unit}"
    raise AssertionError


def signed(value: float) -> str:
    """A difference of times: -178 ms."""
    text = seconds(abs(value))
    return text if text == "0" else f"{'-' if value < 0 else '+'}{text}"


def count(value: float, unit: str = "") -> str:
    """A count with three digits and a decimal prefix: 6.43 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{_digits(value / factor)} {prefix}{unit}"
    return f"{value:.0f} {unit}".strip()


def nbytes(value: float) -> str:
    """Bytes with three digits: 13.1 GB (decimal)."""
    return count(value, "B")


def of_these(n: int, noun: str) -> str:
    """A whole number with its noun: 1 GPU, 1,200 steps."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def alike(values: Sequence[float], digits: int = 3) -> list[str]:
    """Times of one column in one unit and with equally many decimals, so that their points line up; the unit last.

    Args:
        digits: significant ones of the longest time.
    """
    most = max((abs(v) for v in values), default=0.0)
    factor, unit = next(((f, u) for f, u in _SECONDS if most >= f), _SECONDS[-1])
    decimals = max(0, digits - 1 - floor(log10(most / factor))) if most else 0
    return [*(f"{v / factor:,.{decimals}f}" for v in values), unit]


def percent(value: float | None, decimals: int = 0) -> str:
    """A share: 12 %; nothing for one that is unknown (None or NaN)."""
    return "" if value is None or isnan(value) else f"{100 * value:.{decimals}f} %"


def _digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
