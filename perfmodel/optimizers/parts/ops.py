"""Ops as an optimizer's Python code calls them on single tensors: in place, into a new tensor, on the host."""

from ...program.op import ON_HOST, PLAIN, STRIDED
from ...tape.core import record
from ...tape.pointwise import elementwise, reads_in_order
from ...tape.tensor import Tensor


def in_place(name: str, x: Tensor, *others: Tensor) -> Tensor:
    """An op that overwrites its first operand; returns it."""
    strided = not all(reads_in_order(t.shape, t.strides, x.shape) for t in (x, *others))
    record(name, (x, *others), (x,), STRIDED if strided else PLAIN)
    return x


def new(name: str, *operands: Tensor, dtype: str | None = None) -> Tensor:
    """An elementwise op with a new result."""
    return elementwise(name, operands, dtype=dtype)


def read_item(x: Tensor) -> None:
    """`x.item()`: the host waits for the device."""
    record("_local_scalar_dense", (x,), ())


def advance_counter(counter: Tensor) -> Tensor:
    """`step_t += 1` on a counter that lives on the host; returns it."""
    record("add_.Tensor", (counter,), (counter,), ON_HOST)
    return counter


def read_counter(counter: Tensor) -> None:
    """`step_t.item()` of a counter on the host: no device waits for it."""
    record("_local_scalar_dense", (counter,), (), ON_HOST)
