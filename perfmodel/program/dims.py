"""Dims are ints or NumPy integer arrays: one tape answers for a whole grid of setups.

Shape logic sometimes branches on sizes (is this dim 1? is this tensor contiguous?). On an array the answer must be
the same at every point of the grid; where it is not, `decide` raises `MixedStructure`, and the caller splits the grid
along the mask and records each part on its own (see `perfmodel.prediction.grid.over_grid`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from math import prod
from threading import local
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .formulas import Formula

Dim = Any  # int | np.ndarray[int64]; spelled Any because NumPy's operators defeat static narrowing
Shape = tuple[Dim, ...]
Array = NDArray[np.float64]  # figures over a grid, as seconds and bytes
Index = NDArray[np.intp]
R = TypeVar("R")
VARIES = (np.ndarray, Formula)


class MixedStructure(Exception):
    """A structural question has different answers within one grid; `mask` says where it is true."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__("the points of this grid do not share one program")
        self.mask = mask


class _Formed(local):
    """What was made of the dims of a grid: made, and of what, by the operation and the identities of its operands."""

    known: dict[tuple[str, int, Any, bool], tuple[Any, Any, Any]] | None = None


_formed = _Formed()


@contextmanager
def formed_once() -> Iterator[None]:
    """Within, what is made of the same dims is the same object: a tape forms the same products over and over."""
    before = _formed.known
    _formed.known = {} if before is None else before
    try:
        yield
    finally:
        _formed.known = before


class Axis(np.ndarray):
    """An array dim. What is `formed_once` of it is mostly one array for equal dims, which nobody may write to."""

    __slots__ = ()

    def __mul__(self, other: Any) -> Any:
        if type(other) is int and other == 1:
            return self
        if type(other) is Axis and id(other) < id(self):  # the same whichever comes first
            return other._once("*", self, np.ndarray.__mul__)
        return self._once("*", other, np.ndarray.__mul__)

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        if type(other) is int and other == 0:
            return self
        return self._once("+", other, np.ndarray.__add__)

    __radd__ = __add__

    def __floordiv__(self, other: Any) -> Any:
        return self._once("//", other, np.ndarray.__floordiv__)

    def __neg__(self) -> Any:
        return self._once("-", 0, lambda x, _: np.ndarray.__neg__(x))

    def same(self, other: Any) -> bool:
        """Whether two dims are equal at every point of the grid."""
        return bool(self._once("=", other, lambda x, y: decide(np.equal(x, y))))

    def exceeds(self, other: Any) -> bool:
        """Whether a dim is greater than another at every point of the grid."""
        return bool(self._once(">", other, lambda x, y: decide(np.greater(x, y))))

    def _once(self, operation: str, other: Any, make: Callable[[Any, Any], Any]) -> Any:
        known = _formed.known
        if known is None:
            return make(self, other)
        if type(other) is int:
            key = operation, id(self), other, True
        elif type(other) is Axis:
            key = operation, id(self), id(other), False  # both stay what they are: the entry keeps them alive
        else:
            return make(self, other)
        found = known.get(key)
        if found is None:
            made = make(self, other)
            if isinstance(made, np.ndarray):
                made.flags.writeable = False
            found = known[key] = made, self, other
        return found[0]


def remembered(rule: Callable[..., R]) -> Callable[..., R]:
    """A pure function of shapes that answers for ints what it answered before; arrays cannot be looked up."""
    known = lru_cache(maxsize=8192)(rule)

    @wraps(rule)
    def ask(*args: Any) -> R:
        try:
            return known(*args)
        except TypeError:
            return rule(*args)

    return ask


def decide(condition: Any) -> bool:
    """Reduce a condition over the grid to one truth value, or raise `MixedStructure`."""
    if not isinstance(condition, np.ndarray):
        return bool(condition)
    true = np.count_nonzero(condition)
    if true == condition.size:
        return True
    if not true:
        return False
    raise MixedStructure(condition.view(np.ndarray))


def only(dim: Dim) -> int:
    """The one value of a dim that decides how many ops there are.

    Raises:
        MixedStructure: it has several over the grid.
    """
    if type(dim) is int:
        return dim
    if type(dim) is Formula:
        return int(dim)
    first = int(dim.flat[0])
    decide(np.equal(dim, first))
    return first


def same(a: Dim, b: Dim) -> bool:
    """Whether two dims are equal at every point of the grid."""
    if a is b:
        return True
    if type(a) is int and type(b) is int:
        return a == b
    if type(a) is Axis:
        return a.same(b)
    return b.same(a) if type(b) is Axis else decide(np.equal(a, b))


def same_shape(a: Shape, b: Shape) -> bool:
    """Whether two shapes are equal at every point of the grid."""
    return a is b or (len(a) == len(b) and all(map(same, a, b)))


def exceeds(a: Dim, b: Dim) -> bool:
    """Whether a dim is greater than another at every point of the grid."""
    if type(a) is int and type(b) is int:
        return a > b
    return a.exceeds(b) if type(a) is Axis else decide(np.greater(a, b))


def is_one(dim: Dim) -> bool:
    """Whether a dim is 1."""
    return dim == 1 if type(dim) is int else same(dim, 1)


def product(dims: Sequence[Dim]) -> Dim:
    """Number of elements of a shape."""
    return prod(dims)


def larger(a: Dim, b: Dim) -> Dim:
    """The larger of two dims at every point of the grid."""
    if type(a) is int and type(b) is int:
        return a if a > b else b
    return np.maximum(a, b) if isinstance(a, VARIES) or isinstance(b, VARIES) else max(a, b)


def at(dim: Dim, point: int) -> int:
    """The value at a point of a flat grid."""
    return dim if type(dim) is int else int(dim.flat[point]) if np.size(dim) > 1 else int(dim)


def summed(dims: Iterable[Dim]) -> Dim:
    """The sum of many dims, among which the same array or formula comes again and again."""
    dims = list(dims)
    varying = [dim for dim in dims if isinstance(dim, VARIES)]
    if not varying:
        return sum(dims)
    alike: dict[int, tuple[int, Any]] = {}
    for dim in varying:
        key = dim.number if type(dim) is Formula else id(dim)
        times, _ = alike.get(key, (0, dim))
        alike[key] = times + 1, dim
    numbers = sum([dim for dim in dims if not isinstance(dim, VARIES)])
    return sum((times * dim for times, dim in alike.values()), numbers)


@remembered
def contiguous_strides(shape: Shape) -> Shape:
    """Row-major strides in elements, size-1 dims counted as PyTorch counts them."""
    strides: list[Dim] = []
    step: Dim = 1
    for dim in reversed(shape):
        strides.append(step)
        step = step * dim
    return tuple(reversed(strides))


@remembered
def is_contiguous(shape: Shape, strides: Shape) -> bool:
    """Whether strides are row-major; strides of size-1 dims do not matter."""
    step: Dim = 1
    for dim, stride in zip(reversed(shape), reversed(strides), strict=True):
        if type(dim) is int and dim == 1:
            continue
        if stride is not step and not same(stride, step) and not is_one(dim):
            return False
        step = step * dim
    return True


@remembered
def dense_order(shape: Shape, strides: Shape) -> tuple[int, ...] | None:
    """Dims from outermost to innermost if the tensor is non-overlapping and dense, else None."""
    order = by_stride(shape, [strides])
    step: Dim = 1
    for i in reversed(order):
        if is_one(shape[i]):
            continue
        if not same(strides[i], step):
            return None
        step = step * shape[i]
    return order


def strides_in_order(shape: Shape, order: Sequence[int]) -> Shape:
    """Dense strides when memory runs through the dims in `order`, outermost first."""
    strides: list[Dim] = [0] * len(shape)
    step: Dim = 1
    for i in reversed(order):
        strides[i] = step
        step = step * shape[i]
    return tuple(strides)


def by_stride(shape: Shape, operands: Sequence[Shape]) -> tuple[int, ...]:
    """TensorIterator's dim order, outermost first: the insertion sort of `reorder_dimensions`; stride 0 broadcasts."""
    order = list(range(len(shape) - 1, -1, -1))  # innermost first

    def swap(i: int, j: int) -> int:
        for strides in operands:
            a, b = strides[i], strides[j]
            if (type(a) is int and a == 0) or (type(b) is int and b == 0):
                continue
            if same(a, b):
                if exceeds(shape[i], shape[j]):
                    return 1
                continue
            return 1 if exceeds(a, b) else -1
        return 0

    for k in range(1, len(order)):
        j = k
        for i in range(k - 1, -1, -1):
            verdict = swap(order[i], order[j])
            if verdict > 0:
                order[i], order[j] = order[j], order[i]
                j = i
            elif verdict < 0:
                break
    return tuple(reversed(order))


@remembered
def elementwise_strides(shape: Shape, operands: tuple[tuple[Shape, Shape], ...]) -> Shape:
    """Strides that an elementwise op gives its output (TensorIterator); operands are (shape, strides) pairs.

    Source: ATen/TensorIterator.cpp, `fast_set_up` and `reorder_dimensions`.
    """
    full = [(s, t) for s, t in operands if len(s) == len(shape) and all(map(same, s, shape))]
    if len(full) == len(operands):
        first = full[0][1]
        if all(is_contiguous(s, t) for s, t in full):
            return contiguous_strides(shape)
        if dense_order(shape, first) and all(all(map(same, t, first)) for _, t in full[1:]):
            return first
    aligned = []
    for s, t in operands:
        lead = len(shape) - len(s)
        padded = (0,) * lead + tuple(
            0 if type(d) is int and d == 1 and not is_one(shape[lead + i]) else t[i] for i, d in enumerate(s)
        )
        aligned.append(padded)
    return strides_in_order(shape, by_stride(shape, aligned))


@remembered
def view_strides(shape: Shape, strides: Shape, new_shape: Shape) -> Shape | None:
    """Strides of a view with another shape, or None where a copy is needed (ATen's `computeStride`)."""
    result: list[Dim] = [0] * len(new_shape)
    j = len(new_shape) - 1
    base = strides[-1] if strides else 1
    block: Dim = 1
    for i in range(len(shape) - 1, -1, -1):
        block = block * shape[i]
        ends = i == 0 or (not is_one(shape[i - 1]) and not same(strides[i - 1], block * base))
        if not ends:
            continue
        covered: Dim = 1
        while j >= 0 and (not same(covered, block) or is_one(new_shape[j])):
            if exceeds(covered * new_shape[j], block):
                return None
            result[j] = covered * base
            covered = covered * new_shape[j]
            j -= 1
        if not same(covered, block):
            return None
        if i > 0:
            base = strides[i - 1]
            block = 1
    return tuple(result) if j == -1 else None
