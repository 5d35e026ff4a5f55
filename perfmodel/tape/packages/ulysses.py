"""Attention over a sequence that lies on several ranks, each of which attends with some of the heads to all of it.

Queries, keys and values go out by heads and come in by tokens, in an all-to-all each; the output goes back the other
way, and so do gradients. Positions are gathered anew in every layer. The loss is the mean over the tokens of all ranks,
which learn each other's.

Source: deepspeed 0.19.8, runtime/sequence_parallel/ulysses_sp.py (`UlyssesSPAttentionHF`), sequence/layer.py
(`_dim_zero_all_to_all`); transformers 5.24, integrations/deepspeed.py (`deepspeed_sp_compute_loss`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ...program.dims import only
from ...program.op import Attrs
from ...program.ranks import Ranks
from ..autograd import differentiate
from ..core import emit, record, tape
from ..pointwise import cat
from ..shape import contiguous, expand, permute, reshape, transpose, view
from ..tensor import Grads, Node, Tensor
from ..transfers import BESIDE, WAITING


class SharedHeads(NamedTuple):
    """The ranks that share a sequence between their layers, and the heads within attention."""

    ranks: Ranks

    def attention(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """q (b, h, s, d), k and v (b, kv, s, d) of own tokens, and their positions (b, s) → (b, s, h · d).

        Args:
            attend: what does it with some heads of all tokens and their positions, as it would alone: → (b, s, h, d).
        """
        everywhere = self.positions(positions)
        return self.made(attend(*self.given(q, k, v), everywhere))

    def given(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Own heads of all tokens, (b, h / n, s · n, d), of all heads of own tokens, (b, h, s, d)."""
        first = [permute(x, (2, 0, 1, 3)) for x in (q, k, v)]
        there = [self._heads_for_tokens(x) for x in first]
        return tuple(contiguous(permute(x, (1, 2, 0, 3))) for x in there)

    def _heads_for_tokens(self, x: Tensor) -> Tensor:
        (seq, batch, heads, width), n = x.shape, self.ranks.size
        x = view(x, (seq, batch, n, heads // n, width))
        x = sent_around(contiguous(permute(x, (2, 0, 1, 3, 4))), self.ranks)
        return view(x, (seq * n, batch, heads // n, width))

    def positions(self, own: Tensor) -> Tensor:
        """Those of all tokens, (b, s · n)."""
        with tape().no_grad():
            return cat(gathered_list(own, self.ranks), 1)

    def made(self, out: Tensor) -> Tensor:
        """All heads of own tokens, (b, s, h · d), of own heads of all tokens, (b, s · n, h / n, d)."""
        n, (batch, seq, heads, width) = self.ranks.size, out.shape
        out = transpose(out, 0, 1)
        out = reshape(out, (seq, batch, heads * width))  # a copy where a kernel lays out its output as its queries are
        out = contiguous(view(out, (n, seq // n, batch, heads * width)))
        out = permute(sent_around(out, self.ranks), (1, 2, 0, 3))
        out = reshape(out, (seq // n, batch, n * heads * width))
        return contiguous(transpose(out, 0, 1))  # what transformers' attention does with any output


def sent_around(x: Tensor, ranks: Ranks) -> Tensor:
    """What the ranks send this one, of (n, …) that it sends them; its gradient goes the same way."""
    node = differentiate("dim_zero_all_to_all", (x,), _sent_back, (ranks,))
    with tape().no_grad():
        out = _all_to_all(x, ranks)
    if node is not None:
        node.produces(out)
    return out


def _sent_back(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (ranks,), (grad,) = node.attrs, grads
    assert grad is not None
    return (_all_to_all(contiguous(grad), ranks),)


def _all_to_all(x: Tensor, ranks: Ranks) -> Tensor:
    out = emit("empty_like", (x,), x.shape, x.dtype)
    record("c10d::alltoall_base_", (x,), (out,), Attrs(ranks=ranks), runs=BESIDE)
    _wait()
    return out


def gathered_list(x: Tensor, ranks: Ranks) -> list[Tensor]:
    """`dist.all_gather` into a list."""
    found = [emit("empty_like", (x,), x.shape, x.dtype) for _ in range(int(only(ranks.size)))]
    record("c10d::allgather_", (x,), found, Attrs(ranks=ranks), runs=BESIDE)
    _wait()
    return found


def _wait() -> None:
    record("cuda::wait_event", (), (), Attrs(host=True), view=True, runs=WAITING)


def loss_of_all(own: Tensor, labels: Tensor, ranks: Ranks) -> Tensor:
    """The mean loss over the tokens with a label of all ranks, of a rank's own and its labels."""
    node = differentiate("SharedLossBackward", (own,), _own_loss, (ranks,))
    with tape().no_grad():
        losses = gathered_list(own, ranks)
        labelled = emit("ne.Scalar", (labels,), labels.shape, "bool")
        counts = gathered_list(emit("sum", (view(labelled, (labels.numel,)),), (), "i64"), ranks)
        of_ranks, tokens = _stacked(losses), _stacked(counts)
        some = emit("gt.Scalar", (tokens,), tokens.shape, "bool")
        nothing = emit("zeros_like", (of_ranks,), of_ranks.shape, own.dtype)
        known = emit("where.self", (some, of_ranks, nothing), of_ranks.shape, own.dtype)
        total = emit("sum", (emit("mul.Tensor", (known, tokens), known.shape, own.dtype),), (), own.dtype)
        divisor = emit("clamp", (emit("sum", (tokens,), (), "i64"),), (), "i64")
        loss = emit("div.Tensor", (total, divisor), (), own.dtype)
    if node is not None:
        node.save(some, tokens)
        node.save(divisor)
        node.produces(loss)
    return loss


def _stacked(each: Sequence[Tensor]) -> Tensor:
    return emit("stack", tuple(each), (len(each),), each[0].dtype)


def _own_loss(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (ranks,), (grad,) = node.attrs, grads
    assert grad is not None
    some, tokens, divisor = node.unpack()
    grad = expand(emit("div.Tensor", (grad, divisor), (), grad.dtype), tokens.shape)
    grad = emit("mul.Tensor", (grad, tokens), tokens.shape, grad.dtype)
    grad = emit("where.self", (some, grad, emit("scalar_tensor", (), (), grad.dtype)), tokens.shape, grad.dtype)
    each = [Tensor((), grad.dtype, (), 1, grad.storage) for _ in range(int(only(ranks.size)))]
    out = emit("empty_like", (each[0],), (), grad.dtype)
    record("c10d::reduce_scatter_", each, (out,), Attrs(ranks=ranks), runs=BESIDE)
    _wait()
    return (out,)
