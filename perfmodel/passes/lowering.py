"""What Inductor makes of each ATen call: pointwise loops, sums along rows or down columns, or a kernel left as it is.

Composite calls (layer norm, softmax, losses, the embedding's gradient) fall into the pieces of their decompositions.
Sources: torch/_inductor/lowering.py, torch/_inductor/decomposition.py, torch/_decomp/decompositions.py (PyTorch 2.13).
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..calls.costs import along_rows
from ..calls.table import row
from ..program.dims import Dim, decide, exceeds, product
from ..program.dtypes import ITEMSIZE
from ..program.part import Part
from ..registry import add_once
from ..tape.tensor import Flow, Parameter
from .graph import Builder, Graph, Prim, Value

# Works that compute each element of the result from the operands' elements.
POINTWISE = frozenset((
    "stream", "divide", "root", "exponential", "sigmoid", "tanh", "cosine", "gelu", "cast", "fill", "permute", "take",
))  # fmt: skip
# The same for Inductor, but AOTAutograd's partitioner neither recomputes nor fuses them (`get_default_op_list`).
ARRANGING = frozenset(("part", "pad", "arrange", "rows", "pick"))
PICKING = ("take", "rows", "pick")  # of the big operand they read what is asked for
UNROLLED = 8  # sums of fewer elements are unrolled into pointwise code (config.unroll_reductions_threshold)
SHORT_ROW = 8192  # elements of a row sum that one program takes where few rows are longer (the same)
FILLING = 216  # rows that are not split, two for each multiprocessor of an A100 (the same)
CHUNK = 128  # rows that one program of a split column sum takes (choices.reduction_split_factor, at 64 to 4096 columns)

Reads = list[tuple[Value, Dim]]
Rule = Callable[[Builder], None]
_RULES: dict[str, Rule] = {}


def lowered(parameters: Sequence[Parameter], parts: list[Part], flow: Flow) -> Graph:
    """The graph of a micro-batch's parts."""
    weights = {p.storage.number: p.part if p.part and p.part.repeat > 1 else None for p in parameters}
    builder = Builder(parts, flow, weights)
    for op in builder.ops():
        name = op.name.partition(".")[0]
        if row(op.name).work == "nothing":
            continue
        if name == "add_" and op.attrs.later:
            _add_later(builder)
        elif name == "add_" and op.writes and builder.existed(op.writes[0]):
            (_eager if flow.apart else _accumulate)(builder)
        elif name == "ones_like" and not op.outputs[0].shape:
            _seed(builder)
        elif flow.apart and builder.region is None:
            _eager(builder)
        elif name in _RULES:
            _RULES[name](builder)
        else:
            _plain(builder, name if name.startswith("_") else name.rstrip("_"))
    graph = builder.graph
    for (storage, _), value in builder.values.items():
        if value.maker is not None and (storage in flow.live or storage in weights):
            graph.results.add(value)
            value.free = storage in weights  # written over a parameter
    _without_dead_code(graph)
    return graph


def _without_dead_code(graph: Graph) -> None:
    needed = graph.outside
    kept = []
    for prim in reversed(graph.prims):
        stays = graph.apart and prim.region is None
        if stays or not prim.outs or not needed.isdisjoint(prim.outs):
            needed.update([value for value, _ in prim.reads])
            kept.append(prim)
    graph.prims = kept[::-1]


def _accumulate(b: Builder) -> None:
    """A gradient joins one that was there before: outside the compiled code."""
    (_, new), index = b.reads(), b.index
    b.graph.tail.append(Prim(b.op.name, "extern", [new], 0, index, True, b.op.owner, op=b.op))


def _add_later(b: Builder) -> None:
    """A gradient that stays, and that a further pass adds to one that was there before."""
    _, new = b.reads()
    b.graph.additions.append(Prim(b.op.name, "extern", [new], 0, b.index, True, b.op.owner, op=b.op.settled()))


def _seed(b: Builder) -> None:
    """The gradient of the loss, which `loss.backward()` makes outside of the compiled code."""
    out = b.op.outputs[0]
    prim = Prim(b.op.name, "extern", [], 0, b.index, True, b.op.owner, op=b.op, recomputable=False, fusible=False)
    prim.at = b.at
    prim.outs.append(Value(out.dtype, out.numel, prim))
    b.graph.prims.append(prim)
    b.write(b.op.writes[0], prim.outs[0])


def _plain(b: Builder, name: str) -> None:
    op, work = b.op, row(b.op.name).work
    if work == "reduction" and len(op.outputs) == 1 and op.inputs:
        _sum(b, name)
    elif (work in POINTWISE or work in ARRANGING or work == "join") and len(op.outputs) == 1:
        reads, out = b.reads(), op.outputs[0]
        allowed = work in POINTWISE or (work == "join" and _repeats(reads))
        if work in PICKING:
            reads = [(reads[0][0], out.nbytes), *reads[1:]]
        more: dict[str, Any] = {"recomputable": allowed, "fusible": allowed}
        if name == "copy":
            (into, _), *reads = reads
            if exceeds(into.nbytes, out.nbytes):  # into a part: what else the block holds stays
                reads, more["holds"] = [*reads, (into, 0)], into.nbytes // ITEMSIZE[out.dtype]
        b.write(op.writes[0], b.add(op.name, "pointwise", reads, out.numel, out.dtype, layouts=b.layouts(), **more))
    else:
        _extern(b)


def _repeats(reads: Reads) -> bool:
    """Whether a `cat` joins one tensor with itself: Inductor makes that an `expand`."""
    return len({id(value) for value, _ in reads}) == 1


def _extern(b: Builder) -> None:
    """A kernel of a library: its operands are in memory, and so are its results."""
    op, reads = b.op, b.reads()
    prim = Prim(op.name, "extern", reads, 0, b.index, b.backward, op.owner, op=op)
    prim.recompute, prim.recomputable, prim.fusible = op.recompute, False, False
    prim.at, prim.region = b.at, b.region
    for use, spec in zip(op.writes, op.outputs, strict=True):
        value = Value(spec.dtype, spec.numel, prim)
        prim.outs.append(value)
        b.write(use, value)
    b.graph.prims.append(prim)


def _eager(b: Builder) -> None:
    """A call outside of all regions; what it writes over stays the same block."""
    op, reads = b.op, b.reads()
    prim = Prim(op.name, "eager", reads, 0, b.index, b.backward, op.owner, op=op, at=b.at)
    prim.recompute, prim.recomputable, prim.fusible = op.recompute, False, False
    over = {use.storage for use in op.reads}
    for use, spec in zip(op.writes, op.outputs, strict=True):
        if use.storage not in over:
            value = Value(spec.dtype, spec.numel, prim)
            prim.outs.append(value)
            b.write(use, value)
    b.graph.prims.append(prim)


def _sum(b: Builder, name: str) -> None:
    """Along the last dims (rows), or down the leading ones (columns, in two kernels where there are many)."""
    x, out = b.op.inputs[0], b.op.outputs[0]
    length = x.numel // out.numel
    b.write(b.op.writes[0], _reduced(b, name, b.reads(), out.numel, length, out.dtype, columns=not along_rows(b.op)))


def _reduced(
    b: Builder, name: str, reads: Reads, points: Dim, length: Dim, dtype: str, *, columns: bool = False
) -> Value:
    if decide(length < UNROLLED):
        return b.add(name, "pointwise", reads, points, dtype)
    if not columns:
        if decide(length <= SHORT_ROW) or decide(points >= FILLING):
            return b.add(name, "rows", reads, points, dtype, length=length)
        chunks = -(-length // SHORT_ROW)
        partial = b.add(name, "rows", reads, points * chunks, "fp32", length=SHORT_ROW)
        return _reduced(b, name, _whole(partial), points, chunks, dtype)
    if decide(length <= CHUNK):
        return b.add(name, "columns", reads, points, dtype, length=length)
    chunks = -(-length // CHUNK)
    partial = b.add(name, "columns", reads, points * chunks, "fp32", length=CHUNK)
    return b.add(name, "columns", [(partial, partial.nbytes)], points, dtype, length=chunks)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the pieces of a composite call."""

    def register(make: Rule) -> Rule:
        for name in names:
            add_once(_RULES, name, make)
        return make

    return register


def _whole(*values: Value) -> Reads:
    return [(value, value.nbytes) for value in values]


@rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(b: Builder) -> None:
    """Maximum and sum of a row, then the values."""
    out, reads = b.op.outputs[0], b.reads()
    rows = out.numel // out.shape[-1]
    largest = b.add("amax", "rows", reads, rows, out.dtype, length=out.shape[-1])
    total = b.add("sum_exp", "rows", [*reads, *_whole(largest)], rows, out.dtype, length=out.shape[-1])
    if "log" in b.op.name:
        total = b.add("log", "pointwise", _whole(total), rows, out.dtype)
    made = b.add(b.op.name, "pointwise", [*reads, *_whole(largest, total)], out.numel, out.dtype)
    b.write(b.op.writes[0], made)


@rule("_softmax_backward_data", "_log_softmax_backward_data")
def _softmax_backward(b: Builder) -> None:
    """A sum along the row, then the gradient."""
    out, reads = b.op.outputs[0], b.reads()
    rows = out.numel // out.shape[-1]
    summed = reads[:1] if "log" in b.op.name else reads
    total = b.add("sum", "rows", summed, rows, "fp32", length=out.shape[-1])
    b.write(b.op.writes[0], b.add(b.op.name, "pointwise", [*reads, *_whole(total)], out.numel, out.dtype))


@rule("nll_loss_forward")
def _nll(b: Builder) -> None:
    """One entry a row is looked up; sums of them and of the labels that count."""
    (log_probs, _), target = b.reads()
    labels = target[0].points
    picked = labels * b.op.inputs[0].nbytes // b.op.inputs[0].numel
    count = b.add("sum", "rows", [target], 1, "fp32", length=labels)
    total = b.add("sum", "rows", [(log_probs, picked), target], 1, "fp32", length=labels)
    b.write(b.op.writes[0], b.add("div", "pointwise", _whole(total, count), 1, b.op.outputs[0].dtype))
    b.write(b.op.writes[1], count)


@rule("nll_loss_backward")
def _nll_backward(b: Builder) -> None:
    """The gradient of each logit is computed where it is needed: the index compared with the label."""
    grad, _, target, weight = b.reads()
    out = b.op.outputs[0]
    b.write(b.op.writes[0], b.add(b.op.name, "pointwise", [grad, target, weight], out.numel, out.dtype))


@rule("native_layer_norm")
def _layer_norm(b: Builder) -> None:
    """Mean and variance of a row, then the values."""
    x, *weights = b.reads()
    out = b.op.outputs[0]
    rows, width = product(out.shape[:-1]), out.shape[-1]
    mean = b.add("mean", "rows", [x], rows, "fp32", length=width)
    variance = b.add("var", "rows", [x], rows, "fp32", length=width)
    rstd = b.add("rsqrt", "pointwise", _whole(variance), rows, "fp32")
    reads = [x, *_whole(mean, rstd), *weights]
    made = b.add("layer_norm", "pointwise", reads, out.numel, out.dtype)
    for use, value in zip(b.op.writes, (made, mean, rstd), strict=True):
        b.write(use, value)


@rule("native_layer_norm_backward")
def _layer_norm_backward(b: Builder) -> None:
    """Two sums of a row and the input's gradient; sums down the columns for weight and bias."""
    g, x, mean, rstd, weight, *_ = b.reads()
    spec = b.op.inputs[1]
    rows, width = product(spec.shape[:-1]), spec.shape[-1]
    made = list(zip(b.op.writes, b.op.outputs, strict=True))
    if made and len(made[0][1].shape) > 1:
        use, out = made.pop(0)
        first = b.add("sum", "rows", [g, weight], rows, "fp32", length=width)
        second = b.add("sum", "rows", [g, weight, x, mean, rstd], rows, "fp32", length=width)
        reads = [g, weight, x, mean, rstd, *_whole(first, second)]
        b.write(use, b.add("layer_norm_backward", "pointwise", reads, out.numel, out.dtype))
    for i, (use, out) in enumerate(made):
        reads = [g, x, mean, rstd] if i == 0 else [g]
        b.write(use, _reduced(b, "sum", reads, width, rows, out.dtype, columns=True))


@rule("native_dropout")
def _dropout(b: Builder) -> None:
    """Random numbers are drawn in the kernel; the mask is what backward needs, and drawing again is not allowed."""
    (x, nbytes), out = b.reads()[0], b.op.outputs[0]
    mask = b.add("rand", "pointwise", [], out.numel, "bool", recomputable=False, layouts=None)
    b.write(b.op.writes[0], b.add("mul", "pointwise", [(x, nbytes), *_whole(mask)], out.numel, out.dtype))
    b.write(b.op.writes[1], mask)


@rule("embedding_dense_backward")
def _embedding_backward(b: Builder) -> None:
    """Zeros in fp32, atomic adds of the rows, and a cast if the weight is narrower."""
    (grad, nbytes), ids = b.reads()
    out = b.op.outputs[0]
    zeros = b.add("zeros", "pointwise", [], out.numel, "fp32", layouts=None)
    reads = [(grad, nbytes), ids, (zeros, grad.points * 4)]
    more = {"recomputable": False, "fusible": False}
    summed = b.add("index_put_accumulate", "scatter", reads, grad.points, "fp32", holds=out.numel, **more)
    if out.dtype != "fp32":
        summed = b.add("_to_copy", "pointwise", _whole(summed), out.numel, out.dtype)
    b.write(b.op.writes[0], summed)


__all__ = ["lowered"]
