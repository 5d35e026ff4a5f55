"""Checks of a method's options, given to `option`: of (how an error names the option, its value) the value to keep."""

from collections.abc import Callable, Iterable

from ...errors import UserError
from ...program.sizes import positive

__all__ = ["choice", "float_dtype", "fraction", "not_negative", "positive", "storage_dtype"]


def fraction(where: str, p: float) -> float:
    """A dropout rate.

    Raises:
        UserError: outside 0 to below 1.
    """
    if not 0 <= p < 1:
        raise UserError(f"{where} must be from 0 to below 1, got {p}")
    return p


def not_negative(where: str, number: int) -> int:
    """An integer from 0.

    Raises:
        UserError: below 0.
    """
    if number < 0:
        raise UserError(f"{where} must be from 0, got {number}")
    return number


def choice(among: Iterable[str]) -> Callable[[str, str], str]:
    """The check that a value is one of these few; it raises `UserError`."""
    *most, last = among

    def check(where: str, value: str) -> str:
        if value != last and value not in most:
            raise UserError(f"{where} {value!r} is unknown: use {', '.join(most)} or {last}")
        return value

    return check


float_dtype = choice(("bf16", "fp16", "fp32"))
storage_dtype = choice(("u8", "bf16", "fp16", "fp32"))
