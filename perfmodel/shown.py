"""What a notebook shows of a result, and its rows as a frame. Results know nothing of it: the face says who draws."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from .errors import UserError


class Shown:
    """A result that a notebook shows as HTML, once somebody draws it.

    Attributes:
        draw: makes the HTML of a result; set by `perfmodel/__init__.py`.
    """

    draw: ClassVar[Callable[[Any], str] | None] = None

    def _repr_html_(self) -> str | None:
        return Shown.draw(self) if Shown.draw else None


def frame(columns: Mapping[str, Any]) -> Any:
    """Columns of equal length as a `pandas.DataFrame`.

    Raises:
        UserError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise UserError("to_frame needs pandas: pip install pandas") from None
    return pd.DataFrame(columns)
