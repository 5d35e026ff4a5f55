"""Attention over a sequence that lies on several ranks: each has some queries, and all keys and values come by.

Of 2n parts of a sequence rank r has the parts r and 2n - 1 - r, so that causal masks leave all as much to do. Its own
keys and values it attends to causally. Of those of another rank either only the earlier half counts for all its
queries, or all count for its later half: which, its place decides; the first rank, which is recorded, has the latter
alone. Partial outputs are merged in fp32 by their log-sum-exp. Keys and values come in one all-gather, or go from rank
to rank; their gradients go from rank to rank in fp32, once around.

Source: torch 2.13, distributed/tensor/experimental/_context_parallel/_attention.py (`_templated_ring_attention`,
`_templated_ring_attention_backward`, `_SDPAMerger`), as accelerate runs it (`Accelerator.maybe_context_parallel`).
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...program.dims import Dim, only
from ...program.op import Attrs
from ...program.ranks import Ranks
from ..attention import AttentionKernel, fused_kernel
from ..autograd import differentiate
from ..core import emit, new_tensor, record, tape
from ..pointwise import cast, cat, mul, sigmoid, sub
from ..shape import contiguous, narrow, reshape, transpose, unsqueeze, view
from ..tensor import Grads, Node, Tensor
from ..transfers import BESIDE, WAITING

SEQ = 2  # the dim of (batch, heads, seq, width) that is cut


class SharedSequence(NamedTuple):
    """The ranks that share a sequence, and whether keys and values are gathered at once."""

    ranks: Ranks
    gathers: bool


def ring_attention(q: Tensor, k: Tensor, v: Tensor, ring: SharedSequence) -> Tensor:
    """Causal attention of q (b, h, s, d) over k and v (b, kv, s, d) of all ranks, each of s tokens → (b, s, h, d)."""
    kernel = fused_kernel(q, k, v)
    node = differentiate("ScaledDotProductAttentionBackward0", (q, k, v), _ring_backward, (ring, kernel))
    with tape().no_grad():
        out, statistics = _forward(q, k, v, ring, kernel)
    if node is not None:
        node.save(q, k, v)
        node.save(out.alias(), statistics)
        node.produces(out)
    return contiguous(transpose(out, 1, 2))


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: SharedSequence, kernel: AttentionKernel) -> tuple[Tensor, Tensor]:
    steps, coming = only(ring.ranks.size), Rotation(ring)
    k, v = contiguous(k), contiguous(v)
    out: Tensor | None = None
    statistics: Tensor | None = None
    for step in range(steps):
        if step:
            k, v = coming.pair(k, v)
        if step < steps - 1:
            coming.send(k, v)
        own, statistic = kernel.forward(_later_half(q) if step else q, k, v, step == 0)
        own, statistic = cast(own, "fp32"), unsqueeze(statistic, -1)
        if out is None or statistics is None:
            out, statistics = own, statistic
        else:
            out, statistics = _merged(out, statistics, own, statistic)
    assert out is not None
    assert statistics is not None
    return cast(out, q.dtype), view(statistics, statistics.shape[:-1], "squeeze.dim")


def _merged(out: Tensor, statistics: Tensor, own: Tensor, statistic: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs and log-sum-exps of the later half of the queries take in those over further keys."""
    later, before = _later_half(out), _later_half(statistics)
    made = sub(later, mul(sigmoid(sub(statistic, before)), sub(later, own)))
    known = sub(before, _log_sigmoid(sub(before, statistic)))
    both = cat((_earlier_half(statistics), known), SEQ)
    return cat((_earlier_half(out), made), SEQ), both


def _log_sigmoid(x: Tensor) -> Tensor:
    out = new_tensor(x.shape, x.dtype)
    buffer = new_tensor(x.shape if tape().device == "cpu" else (0,), x.dtype)
    record("log_sigmoid_forward", (x,), (out, buffer))
    return out


def _ring_backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (ring, kernel), (g,) = node.attrs, grads
    assert g is not None
    q, k, v, out, statistics = node.unpack()
    steps, coming, returning = only(ring.ranks.size), Rotation(ring), Rotation(ring._replace(gathers=False))
    dq, dk, dv = (emit("zeros_like", (x,), x.shape, "fp32", strides=x.strides) for x in (q, k, v))
    k, v = contiguous(k), contiguous(v)
    held: dict[str, Tensor] = {}  # what Python's variables hold from one step to the next
    for step in range(steps):
        if step:
            k, v = coming.pair(k, v)
        if step < steps - 1:
            held["keys"] = coming.send(k, v)
        given = (g, q, k, v, out, statistics)
        if step:
            half = [_later_half(x) for x in (g, q, out, statistics)]
            given = (half[0], half[1], k, v, half[2], contiguous(half[3]))
        own_q, own_k, own_v = kernel.backward(given, step == 0)
        if step:
            dk, dv = returning.pair(dk, dv)
            held.pop("gradients")
        for into, own in ((dk, own_k), (dv, own_v)):
            record("add_.Tensor", (into, own), (into,))
        held["gradients"] = returning.send(dk, dv)
        into = _later_half(dq) if step else dq
        record("add_.Tensor", (into, own_q), (into,))
        if step:
            dq = cat((_earlier_half(dq), into), SEQ)
    dq = cast(dq, q.dtype)
    dk, dv = returning.pair(dk, dv, k.dtype)
    return tuple(x if need else None for x, need in zip((dq, dk, dv), node.needs, strict=True))


class Rotation:
    """Keys and values (or their gradients) on their way from the rank before."""

    def __init__(self, ring: SharedSequence) -> None:
        self.ring = ring
        self.buffer: Tensor | None = None

    def send(self, k: Tensor, v: Tensor) -> Tensor:
        """One's own set out; where all are gathered, once. Returns what is sent, to be held as long as Python does."""
        both = cat((_flat(k), _flat(v)), 0)
        if self.ring.gathers and self.buffer is not None:
            return both
        ranks = self.ring.ranks
        name = "all_gather_into_tensor" if self.ring.gathers else "all_to_all_single"
        shape = (both.numel * ranks.size,) if self.ring.gathers else both.shape
        self.buffer = new_tensor(shape, both.dtype)
        record(f"_c10d_functional::{name}", (both,), (self.buffer,), Attrs(ranks=ranks), runs=BESIDE)
        return both

    def pair(self, k: Tensor, v: Tensor, dtype: str = "") -> tuple[Tensor, Tensor]:
        """Those of the next rank, shaped as one's own; `dtype`: all are cast to it first."""
        assert self.buffer is not None
        record("_c10d_functional::wait_tensor", (self.buffer,), (self.buffer,), view=True, runs=WAITING)
        own: Tensor = self.buffer if not self.ring.gathers else narrow(self.buffer, 0, k.numel + v.numel)
        own = cast(own, dtype) if dtype else own
        return view(narrow(own, 0, k.numel), k.shape), view(narrow(own, 0, v.numel), v.shape)


def _flat(x: Tensor) -> Tensor:
    return reshape(x, (x.numel,))


def _later_half(x: Tensor) -> Tensor:
    return narrow(x, SEQ, _half(x.shape[SEQ]))


_earlier_half = _later_half  # a view of as many tokens


def _half(seq: Dim) -> Dim:
    return seq // 2
