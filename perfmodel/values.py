"""Values: frozen dataclasses that are cheap to define, and attributes that are worked out when they are asked for.

Before Python 3.13 `@dataclass(frozen=True)` writes six methods for each class and compiles them one by one, which would
be a fifth of a cold start. Here `__init__` alone is made for each; the others are the same for all.
"""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass, field, fields
from typing import Any, Generic, Self, TypeVar, dataclass_transform, overload

T = TypeVar("T")
V = TypeVar("V")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def immutable(cls: type[T]) -> type[T]:
    """A class whose instances are compared and hashed by their fields, and never change.

    What `dataclasses` has for instances (`replace`, `fields`, `asdict`, `__post_init__`) goes on them.

    >>> @immutable
    ... class Point:
    ...     x: int
    ...     y: int = 0
    >>> Point(1), Point(1) == Point(1, 0)
    (Point(x=1, y=0), True)
    """
    made = dataclass(repr=False, eq=False)(cls)
    for name in ("__eq__", "__hash__", "__repr__", "__setattr__", "__delattr__"):
        if name not in cls.__dict__:
            setattr(made, name, getattr(_Fixed, name))
    return made


class Compared:
    """A dataclass that is compared, hashed and shown by its fields, without methods of its own for it."""

    def __eq__(self, other: object) -> bool:
        return _compared(self) == _compared(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(_compared(self))

    def __repr__(self) -> str:
        known: Any = self
        shown = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(known) if f.repr)
        return f"{type(self).__qualname__}({shown})"


def _compared(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, f.name) for f in fields(self) if f.compare)


class _Fixed(Compared):
    __dataclass_fields__: Any

    def __setattr__(self, name: str, given: Any) -> None:
        """A field is set once, by `__init__`."""
        if name in self.__dict__ or name not in self.__dataclass_fields__:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        self.__dict__[name] = given

    def __delattr__(self, name: str) -> None:
        raise FrozenInstanceError(f"cannot delete field {name!r}")


class once(Generic[V]):
    """An attribute that is worked out when it is asked for first, then kept in the instance.

    `functools.cached_property` holds a lock meanwhile before Python 3.12, one for all instances: a thread that works
    one out and waits to record would stop another that records and asks for the like.
    """

    def __init__(self, work_out: Callable[[Any], V]) -> None:
        self.work_out = work_out
        self.__doc__ = work_out.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> V: ...
    def __get__(self, instance: object | None, owner: type) -> "V | Self":
        if instance is None:
            return self
        found = instance.__dict__[self.name] = self.work_out(instance)
        return found
