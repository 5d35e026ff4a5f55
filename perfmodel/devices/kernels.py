"""The memory-bound kernels of an ATen call: what each reads and writes, and which model of a kernel prices it.

Memory moves in sectors of 32 B (CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory"): a kernel that
touches single elements, far from one another, moves a sector for each of them. How many kernels a call launches says
`perfmodel.calls.costs.kernels`; the rules here divide its bytes among them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ..calls import costs
from ..calls.table import WORKS, row
from ..program.dims import Dim, same
from ..program.dtypes import ITEMSIZE
from ..program.op import Op, Spec
from ..registry import add_once
from . import packages

SECTOR = 32  # B
SOFTMAX_IN_REGISTERS = 1024  # longest row that softmax keeps in registers (ATen/native/cuda/PersistentSoftmax.cuh)
RADIX_BITS = 2  # of a digit of topk's radix selection (ATen/native/cuda/SortingRadixSelect.cuh)
GATHERING = 2  # passes that collect what topk selected: above the k-th value, then equal to it (TensorTopK.cu)


class Kernel(NamedTuple):
    """Kernels of one kind, launched in a row.

    Attributes:
        kind: of `perfmodel.devices.pointwise.KINDS`.
        launches: how many share the bytes.
        read, written: distinct bytes.
        elements: processed; dependent steps for kind "serial".
        rows, length: rows, and elements of one, for kinds that give a row to a thread block.
        spread: bytes that memory moves for a byte that is asked for.
    """

    kind: str
    launches: Dim
    read: Dim
    written: Dim
    elements: Dim
    rows: Dim = 1
    length: Dim = 1
    spread: Any = 1.0


NARROW = ("bf16", "fp16")
MOVING = {"cast": "cast", "join": "cat", "permute": "strided"}  # work -> kind of what only moves elements

Rule = Callable[[Op], list[Kernel]]
_RULES: dict[str, Rule] = {}


def of(*works: str) -> Callable[[Rule], Rule]:
    """Register the rule of some works of `calls.table`."""

    def register(rule: Rule) -> Rule:
        for work in works:
            assert work in WORKS, work
            add_once(_RULES, work, rule)
        return rule

    return register


def memory_bound(op: Op) -> list[Kernel]:
    """The kernels of a call that is no matrix product, attention or decomposition."""
    launches = costs.kernels(op)
    if isinstance(launches, int) and launches == 0:
        return []
    return _RULES.get(row(op.name).work, _plain)(op)


def operand_copies(op: Op) -> list[Kernel]:
    """Copies that a matrix product makes of operands without a contiguous dim (`prepare_batch_matrix_for_cublas`).

    A thread writes the next element of the copy and reads one far from its neighbour's.
    """
    copied = [op.inputs[i] for i in op.attrs.copied]
    return [Kernel("strided", 1, x.nbytes, x.nbytes, x.numel, spread=(_sectors(x) + 1) / 2) for x in copied]


def _sectors(x: Spec, together: Dim = 1) -> Any:
    """Bytes moved per byte of a tensor that is touched so many elements at a time, far from the next ones."""
    return np.maximum(1.0, SECTOR / (ITEMSIZE[x.dtype] * together))


def _between(part: Spec, whole: Spec) -> Any:
    """Spread of a kernel between a dense tensor and parts of another: its rows, or single elements.

    A sector moves once, however often it is touched: caches hold the whole or what is walked over in turn.
    """
    rows = len(part.shape) > 1 and len(whole.shape) > 1 and same(part.shape[-1], whole.shape[-1])
    scattered = _sectors(part, part.shape[-1] if rows else 1)
    return (np.minimum(scattered, np.maximum(1.0, whole.nbytes / part.nbytes)) + 1) / 2


def _out(op: Op) -> Spec:
    return op.outputs[0] if op.outputs else op.inputs[0]


def _rows(spec: Spec) -> Dim:
    return spec.numel // spec.shape[-1] if spec.shape else 1


def _by_rows(kind: str, op: Op, spec: Spec) -> list[Kernel]:
    return [Kernel(kind, 1, op.bytes_read, op.bytes_written, spec.numel, _rows(spec), spec.shape[-1])]


def _plain(op: Op) -> list[Kernel]:
    """What streams: pointwise calls, casts, copies, fills."""
    kind = MOVING.get(row(op.name).work, "pointwise")
    if kind == "cast" and op.inputs[0].dtype == "fp32" and _out(op).dtype in NARROW:
        kind = "downcast"
    if kind == "pointwise" and op.attrs.strided:
        kind = "strided"
    return [Kernel(kind, costs.kernels(op), op.bytes_read, op.bytes_written, _out(op).numel)]


@of("package")
def _of_package(op: Op) -> list[Kernel]:
    return [Kernel(*packages.package_kernels(op))]


@of("list")
def _by_lists(op: Op) -> list[Kernel]:
    written = op.bytes_written
    if op.name == "_fused_adamw_":
        written = written * 3 / 4  # the schema's fourth list, the gradients, is only read
    if op.name.startswith("bitsandbytes::optimizer"):  # nor is the schema's first output written, the gradient
        written = written - _out(op).nbytes
    return [Kernel("optimizer", costs.kernels(op), op.bytes_read, written, _out(op).numel)]


@of("fill", "random")
def _fill(op: Op) -> list[Kernel]:
    """Dispatched with a tensor that it does not read."""
    return [Kernel("pointwise", costs.kernels(op), 0, op.bytes_written, _out(op).numel)]


@of("rows")
def _embedding(op: Op) -> list[Kernel]:
    out = _out(op)
    return [Kernel("embedding", 1, out.nbytes, out.nbytes, out.numel, _rows(out), out.shape[-1])]


@of("rows_backward")
def _embedding_backward(op: Op) -> list[Kernel]:
    grad, out, launches = op.inputs[0], _out(op), costs.kernels(op)
    fill = Kernel("pointwise", 1, 0, out.nbytes, out.numel)
    return [
        fill,
        Kernel("embedding", launches - 1, 2 * grad.nbytes, grad.nbytes, grad.numel, _rows(grad), grad.shape[-1]),
    ]


@of("norm")
def _norm(op: Op) -> list[Kernel]:
    return _by_rows("norm", op, _out(op))


@of("norm_backward")
def _norm_backward(op: Op) -> list[Kernel]:
    x, read = op.inputs[1], op.bytes_read
    rows, length = _rows(x), x.shape[-1]
    both = [Kernel("norm_backward", 1, 2 * read, x.nbytes, x.numel, rows, length)]
    if len(op.outputs) > 1:
        both.append(Kernel("column_reduction", 1, read, length * 8, x.numel, rows, length))
    return both


@of("softmax")
def _softmax(op: Op) -> list[Kernel]:
    return _log_sums(op) if op.name == "logsumexp" else _by_rows("softmax", op, _out(op))


def _log_sums(op: Op) -> list[Kernel]:
    """The largest of each row, differences and exponentials in memory, their sums; then a few numbers a row.

    Source: ATen/native/ReduceOps.cpp, `logsumexp_out_impl`.
    """
    x, out, few = op.inputs[0], _out(op), costs.kernels(op) - 4
    reduced = Kernel("reduction", 1, x.nbytes, out.nbytes, x.numel, _rows(x), x.shape[-1])
    passes = Kernel("pointwise", 2, 2 * x.nbytes, 2 * x.nbytes, x.numel)
    return [reduced, passes, reduced, Kernel("pointwise", few, few * out.nbytes, few * out.nbytes, out.numel)]


@of("softmax_backward")
def _softmax_backward(op: Op) -> list[Kernel]:
    """The gradient times the result goes through memory, but for log softmax; then its sums over the rows, and all."""
    out = _out(op)
    if "log" in op.name:
        return [_by_row_sums(op.bytes_read, op.inputs[0].nbytes, op)]
    multiplied = Kernel("pointwise", 1, op.bytes_read, out.nbytes, out.numel)
    return [multiplied, _by_row_sums(2 * out.nbytes, out.nbytes, op)]


def _by_row_sums(read: Dim, summed: Dim, op: Op) -> Kernel:
    """A kernel that sums a part of what it reads over rows, and reads all again where they are too long to be kept."""
    out = _out(op)
    longer = np.greater(out.shape[-1], SOFTMAX_IN_REGISTERS)
    return Kernel("pointwise", 1, read + summed * longer, out.nbytes, out.numel)


@of("reduction")
def _sum(op: Op) -> list[Kernel]:
    if op.attrs.dims is None:
        return _plain(op)
    return _by_rows("reduction" if costs.along_rows(op) else "column_reduction", op, op.inputs[0])


@of("part")
def _part_of_zeros(op: Op) -> list[Kernel]:
    """Zeros, then a copy into a part of them: a slice's rows, or single elements where the last dim was selected."""
    part, out = op.inputs[0], _out(op)
    elements = op.name == "select_backward" and all(map(same, part.shape, out.shape[:-1]))
    spread = _between(part, out) if elements else 1.0
    fill = Kernel("pointwise", 1, 0, out.nbytes, out.numel)
    return [fill, Kernel("strided", 1, part.nbytes, part.nbytes, part.numel, spread=spread)]


@of("loss")
def _nll(op: Op) -> list[Kernel]:
    return [Kernel("pointwise", 1, 2 * op.inputs[1].nbytes, op.bytes_written, _out(op).numel)]


@of("loss_backward")
def _nll_backward(op: Op) -> list[Kernel]:
    """One logit a row is touched, and the whole gradient is filled with zeros."""
    return [Kernel("pointwise", costs.kernels(op), op.inputs[2].nbytes, op.bytes_written, _out(op).numel)]


@of("take", "pick")
def _taken(op: Op) -> list[Kernel]:
    """Only what is indexed moves; single elements drag their sectors along."""
    out = _out(op)
    spread = _between(out, op.inputs[0])
    return [Kernel("strided", costs.kernels(op), out.nbytes, out.nbytes, out.numel, spread=spread)]


@of("put")
def _placed(op: Op) -> list[Kernel]:
    """Values written behind indices, of a copy of the whole tensor unless the call works in place."""
    if op.attrs.accumulate:
        return _accumulated(op)
    values, out = op.inputs[-1], _out(op)
    moved = Kernel("strided", 1, values.nbytes, values.nbytes, values.numel, spread=_between(values, out))
    return [moved] if op.name == "index_put_" else [Kernel("pointwise", 1, out.nbytes, out.nbytes, out.numel), moved]


def _accumulated(op: Op) -> list[Kernel]:
    """Sums of the values with the same index: the indices are sorted with their places, then walked (Indexing.cu)."""
    indices, values, out = op.inputs[1], op.inputs[-1], _out(op)
    n = indices.numel
    arithmetic = Kernel("pointwise", costs.kernels(op) - 2, 32 * n, 32 * n, 4 * n)
    sort = Kernel("strided", 1, 2 * 16 * n, 16 * n, n, spread=_sectors(indices))  # keys and places, each 8 B
    return [arithmetic, sort, Kernel("strided", 1, values.nbytes + out.nbytes, out.nbytes, values.numel)]


@of("select")
def _topk(op: Op) -> list[Kernel]:
    """A thread block a row finds the k-th value digit by digit, collects what is above it, and a second kernel sorts.

    Every digit and either collection is a pass over the row that waits for the one before.
    """
    x, values = op.inputs[0], _out(op)
    passes = ITEMSIZE[x.dtype] * 8 // RADIX_BITS + GATHERING
    found = sum(spec.nbytes for spec in op.outputs)
    return [
        Kernel("serial", 1, x.nbytes, 0, passes, spread=passes),
        Kernel("pointwise", 1, found, found, values.numel),
    ]


@of("transform")
def _fft(op: Op) -> list[Kernel]:
    """A pass over the array a kernel; of a real input the half spectrum, mirrored to the whole by a last kernel.

    PyTorch scales the result in a kernel of its own (ATen/native/cuda/SpectralOps.cpp, `_fft_apply_normalization`).
    """
    out, mirrored = _out(op), costs.mirrors(op)
    nbytes, n = (out.nbytes // 2, out.numel // 2) if mirrored else (out.nbytes, out.numel)
    again = costs.kernels(op) - 1 - mirrored
    kernels = [Kernel("pointwise", 1, op.bytes_read, nbytes, n)]
    if np.any(again):
        kernels.append(Kernel("pointwise", again, nbytes, nbytes, n, spread=again))
    if mirrored:
        kernels.append(Kernel("strided", 1, nbytes, nbytes, n))
    return kernels
