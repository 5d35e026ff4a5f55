"""A user's mistake, told in one line."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

import numpy as np

SHOWN = 80  # characters of what was given, in a message


class UserError(ValueError):
    """Bad input: the message says what is wrong and how to put it right; the command line exits with 2."""


def escaped(text: str) -> str:
    """A text for a terminal: control characters, which a file may hold to rewrite the screen, as Python writes them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def nearest(name: str, choices: Iterable[str], also: Iterable[str] = (), otherwise: str = "") -> str:
    """A clause that names the closest valid choice, or else lists the choices.

    Args:
        also: valid too, but not listed: other names of the choices.
        otherwise: said where none is close, instead of a list that would be long.
    """
    import difflib

    options = sorted(choices)
    by_lower = {option.lower(): option for option in (*also, *options)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    if close:
        return f"did you mean {by_lower[close[0]]!r}?"
    return otherwise or "choose one of: " + ", ".join(options)


def as_given(value: object) -> str:
    """What was given, for a message: as Python writes it, but in one line that is not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise `UserError` unless an argument is of one of these kinds, which `wanted` says in words."""
    if not isinstance(value, kinds):
        raise UserError(f"{name} must be {wanted}, got {as_given(value)}")


def check_number(name: str, value: Any, *, whole: bool = False) -> None:
    """Raise `UserError` unless an argument is one number that is no truth value; how large is for others to check."""
    if isinstance(value, bool) or not isinstance(value, Real) or (whole and value % 1 != 0):
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number, got {as_given(value)}")


def number_array(name: str, value: Any, least: int, *, whole: bool = False) -> np.ndarray:
    """One number or several as an array of float64.

    Raises:
        UserError: something else, rows of different lengths, or a number below the least.
    """
    try:
        array = np.asarray(value)
        right = np.issubdtype(array.dtype, np.number) and (array >= least) & np.isfinite(array)
    except ValueError:
        right = False
    if not np.all(right) or (whole and np.any(array % 1)):
        raise UserError(f"{name} must be {'whole numbers ' if whole else ''}from {least}, got {as_given(value)}")
    return array.astype(np.float64)


def one_or_several(name: str, value: Any, one: type | tuple[type, ...]) -> list[Any]:
    """What may be given alone or as a sequence, as a list.

    Raises:
        UserError: neither.
    """
    if isinstance(value, one):
        return [value]
    try:
        return list(None if isinstance(value, bytes) else value)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{name} must be one or a list of several, got {as_given(value)}") from None


def one_of(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `UserError` unless the value is one of the choices."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} {as_given(value)} is unknown: {nearest('' if value is None else str(value), known)}")
