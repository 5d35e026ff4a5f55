"""A number that knows how it was made from the sizes of a setup, so that a step recorded once answers for other sizes.

A `Formula` stands where an int stands: it has a value, and every sum, product or comparison that it takes part in is
written down in its `Formulas`. What a program asks of it (`if batch == 1`) becomes a condition. Sizes at which all
conditions turn out as they did make the same program; its numbers are then worked out anew (`Formulas.at`). A program
that goes by the number itself (`range(batch)`) is one for that size alone.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

# ufunc -> what does the same with Python's ints, which never overflow; of two numbers, or the same one twice
ON_NUMBERS: dict[Any, Callable[[Any, Any], Any]] = {
    np.add: operator.add, np.subtract: operator.sub, np.multiply: operator.mul, np.floor_divide: operator.floordiv,
    np.true_divide: operator.truediv, np.remainder: operator.mod, np.power: operator.pow, np.maximum: max,
    np.minimum: min, np.equal: operator.eq, np.not_equal: operator.ne, np.greater: operator.gt,
    np.greater_equal: operator.ge, np.less: operator.lt, np.less_equal: operator.le,
    np.negative: lambda a, _: -a,
}  # fmt: skip
OPERATORS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide, "truediv": np.true_divide,
    "mod": np.remainder, "pow": np.power, "eq": np.equal, "ne": np.not_equal, "gt": np.greater,
    "ge": np.greater_equal, "lt": np.less, "le": np.less_equal,
}  # fmt: skip
COMMUTE = (np.add, np.multiply, np.maximum, np.minimum, np.equal, np.not_equal)
NEUTRAL = {np.add: 0, np.subtract: 0, np.multiply: 1, np.floor_divide: 1}  # on the right
ITSELF = (np.max, np.min, np.any, np.all)  # of one number
ALONE = -1  # in the place of a second number: the function takes a list


class NotTraceable(Exception):
    """Something was done with a number that no formula follows."""


class Formulas:
    """What was made of some sizes, step by step, and what was asked on the way.

    Attributes:
        values: of every number, at the sizes that it was recorded with: the sizes first.
        conditions: number -> what its truth has to be.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.values: list[Any] = list(sizes)
        self.sizes = len(self.values)
        self.conditions: dict[int, bool] = {}
        self._steps: dict[int, tuple[Callable[..., Any], Any, int]] = {}  # number -> function and what it takes
        self._known: dict[Any, int] = {}
        self._open = True
        self._lost = ""
        self._code: list[tuple[int, Callable[..., Any], Any, int]] = []

    def symbols(self) -> list["Formula"]:
        """The sizes themselves."""
        return [Formula(self, number) for number in range(self.sizes)]

    def close(self, wanted: Iterable[int]) -> None:
        """From here on nothing more is made of its numbers; those that nobody wants are forgotten.

        Raises:
            NotTraceable: something was made of them that no formula follows.
        """
        self._open = False
        if self._lost:
            raise NotTraceable(self._lost)
        used: set[int] = set()
        left = [*wanted, *self.conditions]
        while left:
            number = left.pop()
            if number not in used:
                used.add(number)
                left += self._takes(number)
        self._code = [(number, *self._steps[number]) for number in sorted(used & self._steps.keys())]
        self._steps.clear()
        self._known.clear()

    def at(self, sizes: Sequence[int]) -> list[Any] | None:
        """All numbers that are wanted at other sizes; None where the program is another one there."""
        values = self.values.copy()
        values[: self.sizes] = sizes
        for number, function, a, b in self._code:
            values[number] = function(values[a], values[b]) if b >= 0 else function([values[i] for i in a])
        for number, wanted in self.conditions.items():
            if values[number] != wanted:
                return None
        return values

    def make(self, function: Any, a: Any, b: Any) -> Any:
        """What a function of two numbers gives; where no formula follows, its value.

        That never raises: a tensor's memory is counted as it dies, where no exception arrives.
        """
        if function in NEUTRAL and type(b) is int and b == NEUTRAL[function]:
            return a
        if self._open and function in ON_NUMBERS:
            first, second = self._number(a), self._number(b)
            if first is not None and second is not None:
                if function in COMMUTE and first > second:
                    first, second = second, first
                return self._made(function, ON_NUMBERS[function], first, second)
        self.lose(f"{function.__name__} of {type(a).__name__} and {type(b).__name__}")
        return function(*(x.value if type(x) is Formula else x for x in (a, b)[: function.nin]))

    def of_list(self, function: Callable[[list[Any]], Any], numbers: Sequence[Any]) -> Any:
        """What a pure function of a list of numbers gives."""
        at = [self._number(x) for x in numbers]
        if not self._open or None in at:
            self.lose("a list")
            return function([x.value if type(x) is Formula else x for x in numbers])
        return self._made(function, function, tuple(at), ALONE)

    def must(self, number: int) -> bool:
        """The truth of a number; other sizes make the same program only where it is the same."""
        truth = bool(self.values[number])
        if self._open:
            self.conditions[number] = truth
        return truth

    def lose(self, what: str) -> None:
        """Something was done that no formula follows."""
        self._lost = self._lost or what

    def _made(self, name: Any, function: Callable[..., Any], a: Any, b: int) -> "Formula":
        number = self._known.get((name, a, b))
        if number is None:
            values = self.values
            value = function(values[a], values[b]) if b >= 0 else function([values[i] for i in a])
            number = self._add((name, a, b), value)
            self._steps[number] = function, a, b
        return Formula(self, number)

    def _takes(self, number: int) -> list[int]:
        """Of which numbers one is made."""
        if number not in self._steps:
            return []
        _, a, b = self._steps[number]
        return list(a) if b == ALONE else [a, b]

    def _number(self, x: Any) -> int | None:
        """The number that a value is here; None of an array, or of a formula of another program."""
        if type(x) is Formula:
            return x.number if x.of is self else None
        x = x.item() if isinstance(x, np.generic) else x
        if type(x) not in (int, float, bool):
            return None
        return self._known.get((type(x), x)) or self._add((type(x), x), x)

    def _add(self, key: Any, value: Any) -> int:
        self._known[key] = len(self.values)
        self.values.append(value)
        return len(self.values) - 1


class Formula:
    """One number of `Formulas`; what it takes part in is written down there."""

    __slots__ = ("number", "of")
    __hash__ = None  # type: ignore[assignment]  # what is remembered by numbers must not be by formulas

    def __init__(self, of: Formulas, number: int) -> None:
        self.of = of
        self.number = number

    @property
    def value(self) -> Any:
        """At the sizes that it was recorded with."""
        return self.of.values[self.number]

    def __array_ufunc__(self, function: Any, method: str, *operands: Any, **options: Any) -> Any:
        """NumPy's functions make formulas, too."""
        if method != "__call__" or options or function.nout != 1:
            raise self._lost(f"{function.__name__}.{method}")
        return self.of.make(function, operands[0], operands[-1])

    def __array_function__(self, function: Any, kinds: Any, operands: Any, options: Any) -> Any:
        """Functions of arrays see one number."""
        if function in ITSELF and not options and len(operands) == 1:
            return self
        raise self._lost(function.__name__)

    def __neg__(self) -> Any:
        return self.of.make(np.negative, self, self)

    def __bool__(self) -> bool:
        asked = self if type(self.value) is bool else self.of.make(np.not_equal, self, 0)
        return self.of.must(asked.number)

    def _lost(self, what: str) -> NotTraceable:
        self.of.lose(what)
        return NotTraceable(what)

    def _by_itself(self, *_: Any, **__: Any) -> Any:
        """A program that goes by the number itself is one for that size alone."""
        raise self._lost("the number itself")

    __array__ = __int__ = __index__ = __float__ = __format__ = __str__ = __round__ = __ceil__ = __floor__ = _by_itself
    __iter__ = __getitem__ = _by_itself

    def __repr__(self) -> str:
        return f"<{self.value}>"


def _both_ways(name: str, function: Any) -> None:
    """An operator of Python's, with a formula on either side."""

    def left(a: Formula, b: Any) -> Any:
        return a.of.make(function, a, b)

    def right(b: Formula, a: Any) -> Any:
        return b.of.make(function, a, b)

    setattr(Formula, f"__{name}__", left)
    setattr(Formula, f"__r{name}__", right)


for _name, _function in OPERATORS.items():
    _both_ways(_name, _function)
