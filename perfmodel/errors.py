"""A user's mistake, told in one line."""

from collections.abc import Iterable


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
