"""Small tensors whose values are known although all else is fake: what reads them gets what a real run gets.

A model of images and text looks at where image tokens stand and how large each image is, and splits its work by that.
Whoever makes such inputs gives them their values (`with_value`); calls on known tensors alone, and factories, are
computed beside the fake ones, so that what follows from them is known too.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from operator import ge, gt, le, lt
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
VALUE = "known_value"  # the attribute of a fake tensor that holds its real twin
LARGEST = 2**23  # bytes of a tensor that is worth computing, where no operand is as large
PICKING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def with_value(value: list[Any]) -> torch.Tensor:
    """A fake tensor of int64, under the caller's fake mode, whose value is known: nested lists of numbers."""
    with _disable_current_modes():
        real = torch.tensor(value)
    return _fake(real)


def ones(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A fake tensor of ones, under the caller's fake mode, whose value is known; its twin has one element."""
    with _disable_current_modes():
        real = torch.ones((), dtype=dtype).expand(shape)
    return _fake(real)


def result_of(func: Any, args: Any, kwargs: Any) -> Any:
    """What a call on known tensors gives, or a factory; None if not all of its operands are known."""
    operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    sizes = [a for a in tree_leaves(args) if type(a) is int and a > 0] if not operands else []
    if func.namespace != "aten" or 8 * prod(sizes) > LARGEST or not all(map(_is_known, operands)):
        return None
    with _disable_current_modes():
        made = func(*tree_map(_real, args), **tree_map(_real, kwargs))
    held = (t.untyped_storage().nbytes() for t in tree_leaves(made) if isinstance(t, torch.Tensor))
    largest = max([LARGEST, *(t.nbytes for t in operands)])
    return made if all(nbytes <= largest for nbytes in held) else None


def with_places(func: Any, args: Any) -> Any:
    """The arguments of a call that picks by known flags, with the places of those that are set: they fix its shape."""
    if func.overloadpacket not in PICKING:
        return args
    places: list[Any] = []
    for index in args[1]:
        if index is None or index.dtype != torch.bool or not hasattr(index, VALUE):
            places.append(index)
            continue
        with _disable_current_modes():
            found = getattr(index, VALUE).nonzero(as_tuple=True)
        places += map(_fake, found)
    return (args[0], places, *args[2:])


def note(out: Any, made: Any) -> None:
    """Give the fake results of a call their values."""
    for fake, real in zip(tree_leaves(out), tree_leaves(made), strict=True):
        if isinstance(fake, torch.Tensor):
            setattr(fake, VALUE, real)


def drop_values(tensors: list[torch.Tensor]) -> None:
    """Tensors that were written with what is not known."""
    for t in tensors:
        if hasattr(t, VALUE):
            delattr(t, VALUE)


def like(made: Any) -> Any:
    """Fake tensors of the shapes that a call gives by its values."""
    return tree_map(lambda t: torch.empty(t.shape, dtype=t.dtype) if isinstance(t, torch.Tensor) else t, made)


def _fake(real: torch.Tensor) -> torch.Tensor:
    fake = torch.empty(real.shape, dtype=real.dtype)
    setattr(fake, VALUE, real)
    return fake


def _is_known(t: torch.Tensor) -> bool:
    return hasattr(t, VALUE) or not isinstance(t, FakeTensor)


def _real(value: Any) -> Any:
    return getattr(value, VALUE) if isinstance(value, FakeTensor) else value


@contextmanager
def read_by_factories() -> Iterator[None]:
    """Let `torch.tensor` read lists of known scalars, which it would do past every mode."""
    original = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(tree_map(lambda t: t.item() if isinstance(t, FakeTensor) else t, data), *args, **kwargs)

    with patch.object(torch, "tensor", tensor):
        yield


DRAWS = (aten.rand.default, aten.uniform.default, aten.uniform_.default)
COMPARES = {aten.lt.Scalar: lt, aten.le.Scalar: le, aten.gt.Scalar: gt, aten.ge.Scalar: ge}


class Draws:
    """Whether a random number in [0, 1) is under a probability, as LayerDrop asks: what is likelier."""

    def __init__(self) -> None:
        self.drawn: weakref.ref[torch.Tensor] | None = None
        self.compared: tuple[weakref.ref[torch.Tensor], bool] | None = None

    def watch(self, func: Any, args: Any, out: Any) -> None:
        """Look at a call: a number that is drawn, or compared."""
        if func in DRAWS:
            self.drawn = weakref.ref(out)
        elif func in COMPARES and self.drawn is not None and self.drawn() is args[0]:
            self.compared = weakref.ref(out), bool(COMPARES[func](0.5, args[1]))

    def likelier(self, asked: torch.Tensor) -> bool | None:
        """What a comparison comes to, None where it is of no such number."""
        if self.compared is None or self.compared[0]() is not asked:
            return None
        return self.compared[1]
