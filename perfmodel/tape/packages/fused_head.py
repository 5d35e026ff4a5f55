"""TRL's fused head: the labels' log-probabilities by tiles of logits, which nobody keeps, and SFTTrainer's loss of it.

Products are cuBLAS's, of 4,096 tokens by 32,768 words, in one buffer; a kernel folds each tile into sums of its rows.
Backward makes each tile again, turns it into its gradient in place, and adds both products with it in fp32: of the
hidden states, and of a head that trains. Soft caps and scales of logits are inside the kernels. Source: TRL 1.16,
trl/kernels/chunked_logprob.py, trainer/utils.py (`add_fused_lm_head`), trainer/sft_trainer.py (`compute_loss`).
"""

from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import UserError
from ...program.dims import Dim, decide
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, record, tape
from ..custom import addmm_, python_function
from ..elementary import div
from ..linalg import layout_of, product_into
from ..pointwise import add, cast, fill, neg
from ..scores import sum_all
from ..shape import narrow, t, view_as
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None
TOKENS, WORDS = 4096, 32768  # of a tile


def fused_head_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """SFTTrainer's loss of hidden·Wᵀ, (batch, seq, width) by (vocab, width): the mean over tokens with a next one.

    Raises:
        UserError: there is none.
    """
    seq = hidden.shape[1]
    if np.min(seq) < 2:
        raise UserError("seq 1: one token has no next one to predict; use 2 or more")
    hidden, labels = narrow(hidden, 1, seq - 1), narrow(labels, 1, seq - 1)
    mask = emit("ne.Scalar", (labels,), labels.shape, "bool")
    rows, targets = _masked(hidden, mask), _masked(labels, mask)
    found = _log_probabilities(rows, weight, targets)
    log_probs, *_ = [_put_back(x, mask) for x in found]
    div(neg(sum_all(log_probs)), _counted(mask))  # the model's own loss, which the trainer makes again
    each = neg(log_probs)
    number = sum_all(mask)
    return div(sum_all(each), emit("clamp", (number,), (), "i64"))


def _counted(mask: Tensor) -> Tensor:
    return emit("clamp", (sum_all(mask),), (), "i64")


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x[mask]` of its first two dims, where all are picked."""
    node = differentiate("IndexBackward0", (x,), _masked_backward, (x.shape,))
    if node:
        node.save(mask)
    return emit("index.Tensor", (x, mask), (mask.numel, *x.shape[2:]), x.dtype, node=node)


def _masked_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (mask,) = grads, node.unpack()
    assert g is not None
    zeros = emit("new_zeros", (g,), node.attrs[0], g.dtype)
    return (emit("index_put", (zeros, mask, g), zeros.shape, g.dtype, attrs=Attrs(accumulate=True)),)


def _put_back(x: Tensor, mask: Tensor) -> Tensor:
    zeros = emit("new_zeros", (x,), mask.shape, x.dtype)
    node = differentiate("MaskedScatterBackward0", (x,), _put_back_backward, (x.shape,))
    if node:
        node.save(mask)
    return emit("masked_scatter", (zeros, mask, x), mask.shape, x.dtype, node=node)


def _put_back_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (mask,) = grads, node.unpack()
    assert g is not None
    return (emit("masked_scatter_backward", (g, mask), node.attrs[0], g.dtype),)


def _log_probabilities(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and whether the label is the likeliest, (tokens,)."""
    python_function()
    current = tape()
    dtype = current.autocast or hidden.dtype
    node = differentiate("ChunkedLogProbFunctionBackward", (hidden, weight), _backward, (dtype,))
    with current.no_grad():
        n = (hidden.shape[0],)
        largest = fill("full", n, "fp32")
        sums = [fill("zeros", n, "fp32") for _ in range(4)]
        before, of_target = fill("full", n, "fp32"), fill("zeros", n, "fp32")
        folded = (largest, *sums, before, of_target)
        room = fill("empty.memory_format", (_first(n[0]), WORDS), dtype)
        for rows, part, words, tile in _tiles(hidden, weight, room, dtype):
            product_into(part, t(words), tile)
            of_rows = [_rows(x, rows) for x in folded]
            written = (*of_rows[:3], *of_rows[5:])
            record("trl::fold_logits", (tile, _rows(targets, rows), *of_rows), written)
        del room, tile, part, words
        log_z = add(largest, emit("log", (sums[0],), n, "fp32"))
        log_probs = emit("sub.Tensor", (of_target, log_z), n, "fp32")
        ratio = emit("div.Tensor", (sums[1], sums[0]), n, "fp32")
        entropy = emit("sub.Tensor", (log_z, ratio), n, "fp32")
        del ratio
        largest = emit("ge.Tensor", (of_target, largest), n, "bool")
        before = emit("gt.Tensor", (of_target, before), n, "bool")
        first = emit("bitwise_and.Tensor", (largest, before), n, "bool")
    if node:
        node.save(hidden, weight, targets, log_z, entropy)
        node.produces(log_probs)
    return log_probs, entropy, first


def _first(tokens: Dim) -> Dim:
    return tokens if decide(tokens <= TOKENS) else TOKENS


def _tiles(hidden: Tensor, weight: Tensor, room: Tensor, dtype: str) -> Iterator[tuple[Dim, Tensor, Tensor, Tensor]]:
    """Of each tile: how many rows, those, its words, and its place in the buffer."""
    left = hidden.shape[0]
    while True:
        rows = left if decide(left <= TOKENS) else TOKENS
        part = cast(_rows(hidden, rows), dtype)
        for start in range(0, weight.shape[0], WORDS):
            words = min(WORDS, weight.shape[0] - start)
            place = view_as("slice.Tensor", _rows(room, rows), (rows, words), room.strides)
            yield rows, part, cast(_rows(weight, words), dtype), place
        if rows is left:
            return
        left = left - rows


def _rows(x: Tensor, n: Dim) -> Tensor:
    return view_as("slice.Tensor", x, (n, *x.shape[1:]), x.strides)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == "fp32":
        addmm_(total, a, b)
    else:
        record("addmm.dtype_out", (total, a, b, total), (total,), attrs=layout_of(a, b))


def _backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g, *_), (hidden, weight, targets, log_z, entropy), (dtype,) = grads, node.unpack(), node.attrs
    assert g is not None
    python_function()
    inputs = zip((hidden, weight), node.needs, strict=True)
    made = [fill("zeros", x.shape, "fp32") if wanted else None for x, wanted in inputs]
    room = fill("empty.memory_format", (_first(hidden.shape[0]), WORDS), dtype)
    for rows, part, words, tile in _tiles(hidden, weight, room, dtype):
        product_into(part, t(words), tile)
        record("trl::grad_logits", (tile, *(_rows(x, rows) for x in (targets, log_z, entropy, g))), (tile,))
        if made[0] is not None:
            _add_product(_rows(made[0], rows), tile, words)
        if made[1] is not None:
            _add_product(_rows(made[1], words.shape[0]), t(tile), part)
    del tile, part, words
    return tuple(cast(x, like.dtype) if x is not None else None for x, like in zip(made, (hidden, weight), strict=True))
