"""Cut cross entropy: the head's product and its loss in one kernel, so that no logits ever exist.

Forward keeps the log-sum-exp of each row and the mean logit of each word. Backward makes the logits again, tile by tile
in the order of those means, and leaves out the two products of tiles whose gradients 16 bits would not show
(`calls.products.cut_gradients`). Rows without a label were left out before. The kernels take 16-bit operands alone.
Source: axolotl-ai-cloud/ml-cross-entropy 5f0c7a7, after Apple's (arXiv 2411.09009): cut_cross_entropy/cce.py, utils.py,
cce_lse_forward.py, indexed_dot.py, cce_backward.py, transformers/llama.py.
"""

from collections.abc import Sequence

import numpy as np

from ...errors import UserError
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, new_tensor, record, tape
from ..custom import as_rows, python_function
from ..pointwise import cast
from ..shape import narrow, view
from ..split import select
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None
ROWS_OF_A_LOCK, COLUMNS_OF_A_LOCK = 128, 64


def cut_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of hidden·Wᵀ, (batch, seq, width) by (vocab, width), with labels moved by one token.

    Raises:
        UserError: there is no next token to predict.
    """
    if hidden.dtype == "fp32" != weight.dtype:
        hidden = cast(hidden, weight.dtype)  # `apply_lce`
    labelled = _labelled(labels)
    rows, target = as_rows(hidden), view(labels, (labels.numel,))
    python_function()
    node = differentiate("LinearCrossEntropyFunctionBackward", (rows, weight), _backward)
    with tape().no_grad():
        lse, means = _log_sum_exp(rows, weight, labelled, keeps_means=node is not None)
        loss = emit("new_zeros", (rows,), labelled.shape, "fp32")
        record("cce::indexed_dot", (rows, weight, target, labelled, loss), (loss,))
        record("add_.Tensor", (loss, lse), (loss,))
        mean = emit("mean", (loss,), (), "fp32")
    if node:
        node.save(rows, weight, lse, target, labelled, means)
        node.produces(mean)
    return mean


def _labelled(labels: Tensor) -> Tensor:
    """Where in the flat labels those lie that are learnt (all, here), int64 (batch·(seq - 1),), counted from the row
    before."""
    batch, seq = labels.shape
    if np.min(seq) < 2:
        raise UserError("seq 1: one token has no next one to predict; use 2 or more")
    counted = emit("ne.Scalar", (narrow(labels, 1, seq - 1),), (batch, seq - 1), "bool")
    places = cast(emit("nonzero", (counted,), (batch * (seq - 1), 2), "i64"), "i32")
    samples = select(places, 1)
    record("mul_.Tensor", (samples,), (samples,))
    record("copy_", (select(places, 1), samples), (select(places, 1),))
    return emit("sum.dim_IntList", (places,), (places.shape[0],), "i64", attrs=Attrs(dims=(1,)))


def _log_sum_exp(rows: Tensor, weight: Tensor, labelled: Tensor, *, keeps_means: bool) -> tuple[Tensor, Grad]:
    (number,), vocab = labelled.shape, weight.shape[0]
    lse = emit("new_full", (rows,), (number,), "fp32")
    locks = emit("new_full", (rows,), (-(-number // ROWS_OF_A_LOCK),), "u32")
    means = emit("new_full", (rows,), (vocab,), "fp32") if keeps_means else None
    written = tuple(x for x in (lse, means, locks) if x is not None)
    record("cce::lse_forward", (rows, weight, labelled, *written), written)
    return lse, means


def _backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (rows, weight, lse, target, labelled, means) = grads, node.unpack()
    assert g is not None
    python_function()
    with tape().no_grad():
        order, places = new_tensor(means.shape, "fp32"), new_tensor(means.shape, "i64")
        record("sort", (means,), (order, places))
        del order
        places = cast(places, "i32")
        made = [emit("zeros_like", (x,), x.shape, x.dtype) if x.requires_grad else None for x in (rows, weight)]
        locks = [
            emit("new_zeros", (x,), (-(-size // ROWS_OF_A_LOCK), -(-x.shape[1] // COLUMNS_OF_A_LOCK)), "i32")
            for x, grad, size in zip((rows, weight), made, (labelled.shape[0], weight.shape[0]), strict=True)
            if grad is not None
        ]
        written = [x for x in made if x is not None]
        inputs = (rows, weight, labelled, g, lse, places, target, *written, *locks)
        record("cce::backward", inputs, (*written, *locks))
    return tuple(made)
