"""Activation checkpointing: saved tensors are dropped in the forward pass and made again in backward.

Source: torch/utils/checkpoint.py.
"""

import weakref
from collections.abc import Callable, Sequence

from .autograd import differentiate
from .core import tape
from .engine import run_backward
from .tensor import Grads, Holder, Node, Parameter, Tensor


class StopRecompute(Exception):
    """All saved tensors of a checkpoint are back: the rest of its forward is not needed."""


class CheckpointFrame:
    """Non-reentrant checkpoint: remembers the inputs, recomputes on first use, stops at the last saved tensor."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], *, autocast: str | None) -> None:
        self.function = function
        self.inputs = inputs  # held until the last of its saved tensors is released
        self.autocast = autocast
        self.holders: list[weakref.ref[Holder]] = []  # a graph that nobody kept takes its saved tensors along
        self.values: dict[int, Tensor] | None = None

    def pack(self, t: Tensor) -> Holder:
        """Forward: count a saved tensor and let it go."""
        holder = Holder(self, len(self.holders))
        self.holders.append(weakref.ref(holder))
        tape().part.host.hooks += 1
        return holder

    def take(self, index: int) -> Tensor:
        """Backward: hand a recomputed tensor over."""
        if self.values is None:
            self.values = self._recompute()
        tape().part.host.hooks += 1
        return self.values.pop(index)

    def _recompute(self) -> dict[int, Tensor]:
        current = tape()
        recorder = _Recomputation([holder() is not None for holder in self.holders])
        current.frames.append(recorder)
        before = current.grad_enabled, current.autocast
        current.grad_enabled, current.autocast = True, self.autocast
        try:
            with current.recomputation():
                self.function(*self.inputs)
        except StopRecompute as stop:
            stop.__traceback__ = None  # its frames hold the block's local tensors
        finally:
            current.grad_enabled, current.autocast = before
            current.frames.pop()
            if current.autocast is None:
                current.drop_cast_cache(all_layers=False)
        return recorder.values


class _Recomputation:
    """Collects what the recomputed forward saves and backward still asks for."""

    def __init__(self, wanted: list[bool]) -> None:
        self.wanted = wanted
        self.seen = 0
        self.values: dict[int, Tensor] = {}

    def pack(self, t: Tensor) -> Tensor:
        tape().part.host.hooks += 1
        if self.wanted[self.seen]:
            self.values[self.seen] = t.alias()
        self.seen += 1
        if self.seen == len(self.wanted):
            raise StopRecompute
        return t


def _detached(t: Tensor) -> Tensor:
    if isinstance(t, Parameter):
        return t
    copy = t.alias()
    copy.requires_grad = t.requires_grad
    return copy


def checkpoint(function: Callable[..., Tensor], *inputs: Tensor, reentrant: bool = False) -> Tensor:
    """`torch.utils.checkpoint.checkpoint` of a function of tensors with one output."""
    current = tape()
    current.part.host.checkpoints += 1
    if reentrant:
        return _reentrant(function, inputs)
    frame = CheckpointFrame(function, inputs, autocast=current.autocast)
    current.frames.append(frame)
    try:
        return function(*inputs)
    finally:
        current.frames.pop()


def _reentrant(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    current = tape()
    node = differentiate("CheckpointFunctionBackward", inputs, _reentrant_backward, (function, current.autocast))
    with current.no_grad():
        out = function(*inputs)
    if node is not None:
        node.save(*inputs)
        node.produces(out)
    return out


def _reentrant_backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    function, autocast = node.attrs
    inputs = [_detached(t) for t in node.unpack()]
    current = tape()
    before = current.grad_enabled, current.autocast
    current.grad_enabled, current.autocast = True, autocast
    try:
        with current.recomputation():
            out = function(*inputs)
    finally:
        current.grad_enabled, current.autocast = before
        if current.autocast is None:
            current.drop_cast_cache(all_layers=False)
    (grad,) = grads
    assert grad is not None
    run_backward(out, grad)
    return tuple(t.node.saved.pop() if t.node is not None and t.node.saved else None for t in inputs)
