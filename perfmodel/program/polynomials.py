"""Numbers of a program for any batch and length: polynomials in the two, solved from a few recordings.

A dim of a training step is linear in the batch and in the length (tokens, b·s), the bytes of attention scores are
quadratic in the length. So its numbers are taken as Σ cᵢⱼ·bⁱ·sʲ with i ≤ 1 and j ≤ 2: recordings at two batches and
three lengths solve the coefficients. Those of dims are whole numbers, or else the program is none of this kind.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from .dims import Dim

Size = tuple[int, int]  # batch and length
POWERS = 6  # 1, s, s², b, b·s, b·s²


class NoPolynomial(ValueError):
    """Numbers that no polynomial of this kind goes through."""


@dataclass(frozen=True, slots=True)
class Polynomial:
    """c₀ + c₁·s + c₂·s² + b·(c₃ + c₄·s + c₅·s²), for a batch b and a length s."""

    coefficients: tuple[Any, ...]  # ints; floats where rounding by the allocator comes in

    def at(self, batch: Dim, seq: Dim) -> Dim:
        """Its value, at every point of a grid where batch or seq is an array.

        >>> Polynomial((0, 0, 0, 0, 64, 0)).at(4, 512)
        131072
        """
        values = _monomials(batch, seq)
        return sum(c * value for c, value in zip(self.coefficients, values, strict=True) if c)

    def below(self, other: "Polynomial") -> bool:
        """Whether it is at most another wherever batch and length are positive, as far as coefficients tell."""
        return all(a <= b for a, b in zip(self.coefficients, other.coefficients, strict=True))


def _monomials(batch: Dim, seq: Dim) -> tuple[Dim, ...]:
    return (1, seq, seq * seq, batch, batch * seq, batch * seq * seq)


def value(number: Any, batch: Dim, seq: Dim) -> Dim:
    """A number of a recorded program at a batch and a length: a polynomial's value, or the number itself."""
    return number.at(batch, seq) if isinstance(number, Polynomial) else number


def solver(batches: Sequence[int], lengths: Sequence[int]) -> Callable[..., Any]:
    """What finds the polynomial through the numbers that a program has at each of some batches with each length.

    With one batch, or one length, it is a polynomial in the other alone. It takes the numbers, and whether their
    coefficients have to be `whole` (by default they do); a constant stays what it is.

    Raises (the function that is returned):
        NoPolynomial: none with whole coefficients goes through them.

    >>> solve = solver((2, 3), (5, 7, 11))
    >>> solve((2 * 5 * 8, 2 * 7 * 8, 2 * 11 * 8, 3 * 5 * 8, 3 * 7 * 8, 3 * 11 * 8))
    Polynomial(coefficients=(0, 0, 0, 0, 8, 0))
    """
    used = [3 * i + j for i in range(len(batches)) for j in range(len(lengths))]
    inverse = _inverse([[Fraction(_monomials(b, s)[k]) for k in used] for b in batches for s in lengths])

    @cache
    def solve(numbers: tuple[int, ...], *, whole: bool = True) -> Any:
        if len(set(numbers)) == 1:
            return numbers[0]
        found: list[Any] = [0] * POWERS
        for k, row in zip(used, inverse, strict=True):
            c = sum((a * n for a, n in zip(row, numbers, strict=True)), Fraction(0))
            if whole and c.denominator != 1:
                raise NoPolynomial(f"{numbers} at {batches} x {lengths}")
            found[k] = int(c) if c.denominator == 1 else float(c)
        return Polynomial(tuple(found))

    return solve


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """Gauss and Jordan, exactly."""
    n = len(matrix)
    rows = [[*row, *(Fraction(int(i == j)) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(n):
            if r != i and rows[r][i]:
                factor = rows[r][i]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[i], strict=True)]
    return [row[n:] for row in rows]


def highest(numbers: Iterable[Any]) -> list[Any]:
    """Those of many numbers that may be the largest at some size; of a number without polynomials the one largest.

    >>> low, high = Polynomial((1, 0, 0, 0, 2, 0)), Polynomial((1, 1, 0, 0, 2, 0))
    >>> highest([low, high, 0]) == [high]
    True
    """
    found: list[Polynomial] = []
    for number in dict.fromkeys(map(_lifted, numbers)):
        if not any(number.below(other) for other in found):
            found = [*(other for other in found if not other.below(number)), number]
    return [_lowered(number) for number in found]


def _lifted(number: Any) -> Polynomial:
    return number if isinstance(number, Polynomial) else Polynomial((number, *(0,) * (POWERS - 1)))


def _lowered(number: Polynomial) -> Any:
    return number if any(number.coefficients[1:]) else number.coefficients[0]
