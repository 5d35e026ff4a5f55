"""Frozen values are what `@dataclass(frozen=True)` would make, at a third of the cost."""

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from functools import cached_property  # noqa: TID251  # users may have it
from typing import Any

import pytest

from perfmodel.values import immutable


@immutable
class Ours:
    width: int
    label: str = field(default="", compare=False)
    rows: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", int(self.width))

    @cached_property
    def double(self) -> int:
        return 2 * self.width


@dataclass(frozen=True)
class Theirs:
    width: int
    label: str = field(default="", compare=False)
    rows: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", int(self.width))


@immutable
class Wider(Ours):
    height: int = 1


def of(kind: Any) -> list[Any]:
    return [kind(1), kind(1, "a"), kind(1, rows=(1,)), kind(2.0)]


def test_values_are_equal_hashed_and_shown_as_those_of_the_standard_library() -> None:
    """They are keys of caches, and what a notebook prints."""
    ours, theirs = of(Ours), of(Theirs)
    assert [[a == b for b in ours] for a in ours] == [[a == b for b in theirs] for a in theirs]
    assert [hash(x) for x in ours] == [hash(x) for x in theirs]
    assert [repr(x) for x in ours] == [repr(x).replace("Theirs", "Ours") for x in theirs]
    assert ours[0] != theirs[0]
    assert Ours(1) != Wider(1)


@pytest.mark.parametrize("value", [Ours(1), Wider(1, height=2)])
def test_a_value_never_changes(value: Any) -> None:
    """Answers share devices, hosts and setups: a field that is set would change another one's answer."""
    for name in ("width", "unknown"):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, 3)
    with pytest.raises(FrozenInstanceError):
        del value.width
    assert value.double == 2
    assert not hasattr(value, "unknown")


def test_a_value_is_replaced_copied_and_pickled() -> None:
    """Sweeps make setups of setups, and calibration sends values to its processes."""
    value = Wider(1, "a", height=2)
    assert replace(value, width=5) == Wider(5, "a", height=2)
    assert [f.name for f in fields(value)] == ["width", "label", "rows", "height"]
    assert copy.deepcopy(value) == pickle.loads(pickle.dumps(value)) == value
