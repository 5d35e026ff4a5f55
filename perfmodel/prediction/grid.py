"""A grid of setups as one prediction: array dims go through the tape once.

Where the points of a grid do not share one program (a batch of 1 beside others, a window that binds only here and
there), the grid is split along the tape's question and put back together afterwards.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np

from ..errors import UserError
from ..methods import Method
from ..program.dims import Axis, MixedStructure, formed_once
from ..setup import Setup

P = TypeVar("P")
Compute = Callable[[Setup, Method], P]
CHUNK = 16_384  # points that go through the tape together: bounds the memory of a large grid
MERGED = (
    "total_params", "trainable_params", "active_params", "flops", "bytes", "kernels", "dispatches", "time", "memory",
    "fits", "mfu", "periodic", "padding",
)  # fmt: skip


def over_grid(compute: Compute[P], setup: Setup, method: Method) -> P:
    """Run a prediction over array dims, splitting the grid where its points do not share one program."""
    if not _arrays(setup, method):
        try:
            return compute(setup, method)
        except OverflowError:  # one call's sizes are beyond what NumPy's prices take
            raise _too_large(setup, "counts") from None
    shape = grid_shape(setup, method)
    return _merge(list(_pieces(compute, setup, method, shape)), setup, (math.prod(shape),), shape)


def over_devices(computes: Sequence[tuple[list[int], Compute[P]]], setup: Setup, method: Method) -> P:
    """Run a prediction over array dims on several devices, shape (devices, *grid).

    Args:
        computes: each with the places of the devices that it is of; its figures have shape (devices, points), or
            broadcast to it.
    """
    shape = grid_shape(setup, method)
    parts: list[tuple[Any, P]] = [
        (np.ix_(np.array(devices), index), piece)
        for devices, compute in computes
        for index, piece in _pieces(compute, setup, method, shape)
    ]
    devices = sum(len(devices) for devices, _ in computes)
    return _merge(parts, setup, (devices, math.prod(shape)), (devices, *shape))


def grid_shape(setup: Setup, method: Method) -> tuple[int, ...]:
    """The shape of a grid, () for a single setup.

    Raises:
        UserError: its arrays do not broadcast together.
    """
    arrays = _arrays(setup, method)
    try:
        return np.broadcast_shapes(*(a.shape for a in arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {a.shape}" for (_, name), a in arrays.items())
        raise UserError(f"the arrays of a grid must broadcast together, got {shapes}") from None


def _check_size(setup: Setup, method: Method) -> None:
    """Refuse grids whose counts would not fit 64-bit integers: an upper bound of the FLOPs of their largest point.

    What a reference adds is less than is left to 2^63.
    """
    a = method.architecture
    assert a is not None
    seq = np.asarray(setup.seq, np.float64)
    weights = a.layers * (4 * a.hidden * max(a.hidden, a.heads * a.head_dim) + 3 * a.hidden * a.intermediate)
    weights += 2 * a.vocab * a.hidden
    per_token = 8 * 2 * weights + 24 * a.layers * a.heads * a.head_dim * seq
    if np.max(per_token * setup.sequences * seq * setup.grad_accum) > 2.0**62:
        raise _too_large(setup, f"counts of a grid of {a.name}")


def _too_large(setup: Setup, what: str) -> UserError:
    batch, seq = int(np.max(setup.batch)), int(np.max(setup.seq))
    return UserError(f"batch {batch} x seq {seq} is too large: {what} exceed 64-bit integers")


def _arrays(setup: Setup, method: Method) -> dict[tuple[str, str], np.ndarray]:
    found = {}
    for kind, source in (("setup", setup), ("method", method)):
        for f in fields(source):
            value = getattr(source, f.name)
            if isinstance(value, np.ndarray):
                found[kind, f.name] = value
    return found


def _pieces(
    compute: Compute[P], setup: Setup, method: Method, shape: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, P]]:
    """Predictions of the points of a grid, which they name by their places."""
    _check_size(setup, method)
    flat = {k: np.broadcast_to(a, shape).reshape(-1) for k, a in _arrays(setup, method).items()}
    points = np.arange(math.prod(shape))
    for start in range(0, len(points), CHUNK):
        yield from _split(compute, setup, method, flat, points[start : start + CHUNK])


def _split(
    compute: Compute[P], setup: Setup, method: Method, flat: dict[tuple[str, str], np.ndarray], index: np.ndarray
) -> Iterator[tuple[np.ndarray, P]]:
    values = {k: _uniform(a[index]) for k, a in flat.items()}
    here = replace(setup, **{name: v for (kind, name), v in values.items() if kind == "setup"})
    ranks = {name: v for (kind, name), v in values.items() if kind == "method"}
    with_rank = replace(method, **ranks) if ranks else method
    try:
        with formed_once():
            found = compute(here, with_rank)
        yield index, found
    except MixedStructure as mixed:
        mask = np.broadcast_to(mixed.mask, index.shape)
        yield from _split(compute, setup, method, flat, index[mask])
        yield from _split(compute, setup, method, flat, index[~mask])


def _uniform(values: np.ndarray) -> Any:
    return int(values[0]) if (values == values[0]).all() else values.view(Axis)


@cache
def _figures(of: type[Any]) -> list[str]:
    """The fields of a dataclass that vary over a grid."""
    return [f.name for f in fields(of) if not f.metadata.get("label")]


def _dtype(value: Any) -> np.dtype[Any]:
    return np.asarray(value).dtype


def _merge(parts: list[tuple[Any, P]], setup: Setup, room: tuple[int, ...], shape: tuple[int, ...]) -> P:
    """Put the pieces of a grid back together, field by field.

    Args:
        parts: each with its place in an array of shape `room`.
        shape: of the figures, as many as there is room for.
    """
    places = [place for place, _ in parts] if len(parts) > 1 else [...]

    def merge(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict) and len(values) == 1:
            return {k: merge([v]) for k, v in first.items()}
        if isinstance(first, dict):
            names = dict.fromkeys(name for v in values for name in v)  # not every point has every component
            return {k: merge([v.get(k, 0.0) for v in values]) for k in names}
        if isinstance(first, list):
            return [merge(list(items)) for items in zip(*values, strict=True)]
        if is_dataclass(first) and not isinstance(first, type):
            return replace(first, **{n: merge([getattr(v, n) for v in values]) for n in _figures(type(first))})
        out = np.empty(room, np.asarray(first).dtype if len(values) == 1 else np.result_type(*map(_dtype, values)))
        for place, value in zip(places, values, strict=True):
            out[place] = value
        return out.reshape(shape)

    first: Any = parts[0][1]
    merged = {name: merge([getattr(p, name) for _, p in parts]) for name in MERGED}
    notes = list(dict.fromkeys(note for _, p in parts for note in getattr(p, "notes", ())))
    result: P = replace(first, setup=setup, recorded=None, notes=notes, choices=[], **merged)
    return result
