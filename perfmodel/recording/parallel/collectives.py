"""Collectives as ops of a rank, and the events by which streams wait for one another."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from ...program.dims import Dim, Shape, contiguous_strides, product
from ...program.op import Attrs, Op, Spec
from ...program.ranks import Ranks
from ...program.streams import COMMUNICATION, COMPUTE, Run
from ...tape.core import new_tensor, record, tape
from ...tape.tensor import Tensor

EVENT = Attrs(host=True)
SENT = Run(COMMUNICATION, after=(COMPUTE,))
ACROSS = "communication across"  # the stream of NCCL's other communicator, between groups of GPUs

P = ParamSpec("P")
R = TypeVar("R")


def travelling(run: Callable[P, R]) -> Callable[P, R]:
    """A function that copies to and from what travels between GPUs, and has nothing else to record."""

    @wraps(run)
    def copying(*args: P.args, **kwargs: P.kwargs) -> R:
        with tape().belonging_to("exchange"):
            return run(*args, **kwargs)

    return copying


def empty(numel: object, dtype: str) -> Tensor:
    """`torch.empty(numel)`: a buffer."""
    made = new_tensor((numel,), dtype)
    record("empty.memory_format", (), (made,))
    return made


def in_buffer(buffer: Tensor | None, shape: Shape, dtype: str) -> Tensor:
    """A contiguous view of a part of a buffer."""
    assert buffer is not None
    return Tensor(shape, dtype, contiguous_strides(shape), product(shape), buffer.storage)


def exchange(
    name: str, given: Tensor, into: Tensor, ranks: Ranks, after: tuple[str, ...] = (COMPUTE,), on: str = COMMUNICATION
) -> None:
    """A collective that reads one buffer and writes another (or the same)."""
    record(name, (given,), (into,), Attrs(ranks=ranks), runs=Run(on, after))


def set_event(name: str, after: str) -> None:
    """`event.record()` on a stream: what waits for the event waits for all that is queued there up to now."""
    record("cuda::record_event", (), (), EVENT, view=True, runs=Run(name, (after,)))


def wait_event(name: str, stream: str = COMPUTE) -> None:
    """`stream.wait_event(event)`."""
    record("cuda::wait_event", (), (), EVENT, view=True, runs=Run(stream, (name,)))


def all_reduce(elements: Dim, dtype: str, ranks: Ranks) -> Op:
    """The all-reduce of a buffer in place."""
    buffer = (Spec(dtype, (elements,)),)
    return Op(
        "c10d::allreduce_", buffer, buffer, buffer[0].nbytes, buffer[0].nbytes, attrs=Attrs(ranks=ranks), runs=SENT
    )


def cast_gradient(elements: Dim, given: str, made: str) -> Op:
    """A gradient, or a rank's part of it, in another dtype on its way into a message or out of it."""
    before, behind = Spec(given, (elements,)), Spec(made, (elements,))
    runs = Run(COMMUNICATION)
    return Op("_to_copy", (before,), (behind,), before.nbytes, behind.nbytes, owner="accumulation", runs=runs)
