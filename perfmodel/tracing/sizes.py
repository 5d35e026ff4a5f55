"""Traces of one program at a few sizes, as one trace whose numbers are polynomials in batch and length.

Call by call they must be the same program; the polynomials are solved from some sizes and checked at one more, the one
that was asked for.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from ..program.op import Op, Spec
from ..program.polynomials import NoPolynomial, Size, solver, value
from .calls import Calls, Key, key_of

LIVE = 0.01  # live bytes may be off by this share: kernels round what they keep (log-sum-exp by 32 rows)
Solve = Callable[..., Any]


def solved(traces: Sequence[Calls], batches: Sequence[int], lengths: Sequence[int]) -> Calls:
    """One trace of those at each batch with each length.

    Raises:
        NoPolynomial: they are not one program, or a number follows no polynomial.
    """
    first = traces[0]
    check_alike(traces)
    solve, known = solver(batches, lengths), dict[tuple[Key, ...], tuple[Key, Op]]()
    made = Calls(cuda=first.cuda, host=first.host)
    for keys in zip(*(trace.order for trace in traces), strict=True):
        if keys not in known:
            known[keys] = solved_call(keys, [trace.ops[key] for trace, key in zip(traces, keys, strict=True)], solve)
        made.add(*known[keys])
    for half, found in enumerate(made.live):
        rows = zip(*(trace.live[half] for trace in traces), strict=True)
        found += dict.fromkeys(solve(numbers, whole=False) for numbers in rows)
    for marks in zip(*(trace.passing for trace in traces), strict=True):
        *numbers, blocks = zip(*marks, strict=True)
        now, most = (solve(those, whole=False) for those in numbers)
        made.passing.append((now, most, blocks[0]))
    return made


def check_alike(traces: Sequence[Calls]) -> None:
    """Raise `NoPolynomial` where traces differ in the number of calls or in host work."""
    first = traces[0]
    if any(len(trace.order) != len(first.order) or trace.host != first.host for trace in traces):
        raise NoPolynomial("the program makes other calls at another size")


def solved_call(keys: tuple[Key, ...], ops: list[Op], solve: Solve) -> tuple[Key, Op]:
    """A call whose dims are solved from those at every size."""
    first = ops[0]
    place, who = keys[0][:2], _who(first)
    if any((key[:2], _who(op)) != (place, who) for key, op in zip(keys, ops, strict=True)):
        raise NoPolynomial(f"{first.name} is another call at another size")
    op = copy(first)
    op.inputs, op.outputs = (_specs([getattr(op, side) for op in ops], solve) for side in ("inputs", "outputs"))
    op.bytes_read = solve(tuple(op.bytes_read for op in ops))
    op.bytes_written = solve(tuple(op.bytes_written for op in ops))
    return key_of(place, op), op


def _who(op: Op) -> Any:
    """What a call is but for its dims."""
    return op.name, op.attrs, op.view, op.owner, op.recompute


def _specs(rows: list[tuple[Spec, ...]], solve: Solve) -> tuple[Spec, ...]:
    if len({tuple((s.dtype, len(s.shape)) for s in specs) for specs in rows}) > 1:
        raise NoPolynomial("a call takes other tensors at another size")
    return tuple(
        Spec(
            alike[0].dtype,
            tuple(solve(dims) for dims in zip(*(s.shape for s in alike), strict=True)),
            solve(tuple(s.copies for s in alike)),
        )
        for alike in zip(*rows, strict=True)
    )


def check_at(calls: Calls, size: Size, real: Calls) -> None:
    """Raise `NoPolynomial` unless solved calls are, one after another, those of a trace at a size."""
    check_alike((calls, real))
    known: set[tuple[int, int]] = set()
    for key, seen in zip(calls.order, real.order, strict=True):
        if (id(key), id(seen)) not in known:
            if _at(calls.ops[key], size) != _at(real.ops[seen], size):
                raise NoPolynomial(f"{seen[2][0]} does not follow at {size}")
            known.add((id(key), id(seen)))
    for numbers, half in zip(calls.live, real.live, strict=True):
        most = max((value(number, *size) for number in numbers), default=0)
        if abs(most - max(half, default=0)) > LIVE * max(1, *half):
            raise NoPolynomial(f"live bytes do not follow at {size}")


def _at(op: Op, size: Size) -> Any:
    specs = [(s.dtype, tuple(value(dim, *size) for dim in s.shape)) for s in (*op.inputs, *op.outputs)]
    return _who(op), specs, value(op.bytes_read, *size), value(op.bytes_written, *size)
