"""Whole numbers that a setup is given: one, or an array of them where it is a grid."""

from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import UserError, as_given
from .dims import Dim
from .formulas import Formula

LARGEST = 2**24  # tokens of a sequence, samples of a batch: beyond this it is a typing error


def positive(name: str, value: Any) -> Dim:
    """An int (or integer array, of any sequence) from 1 to `LARGEST`; arrays of one value stay arrays.

    Raises:
        UserError: anything else.
    """
    if type(value) is Formula or (type(value) is int and 0 < value <= LARGEST):  # nearly all
        return value
    if isinstance(value, (list, tuple, range)) or (hasattr(value, "__array__") and np.ndim(value)):
        with suppress(ValueError):  # rows of different lengths
            value = np.asanyarray(value)
    if isinstance(value, np.ndarray):
        if value.size == 0 or not np.issubdtype(value.dtype, np.integer):
            raise UserError(f"{name} must hold integers, got {value.dtype} of size {value.size}")
        low, high = int(value.min()), int(value.max())
    elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = low = high = int(value)
    else:
        raise UserError(f"{name} must be a positive integer, got {as_given(value)}")
    if low < 1 or high > LARGEST:
        raise UserError(f"{name} must be from 1 to {LARGEST}, got {low if low < 1 else high}")
    return value if isinstance(value, int) else value.astype(np.int64)


def single(name: str, value: Any) -> Dim:
    """The same of what cannot vary over a grid."""
    if isinstance(found := positive(name, value), np.ndarray):
        raise UserError(f"{name} must be one integer, got {as_given(value)}")
    return found
