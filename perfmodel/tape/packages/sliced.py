"""The linear layer of S2FT: one GEMM forward, and a gradient of a slice of the weight only.

Source: the authors' `S2ColumnLinearFunction` and `S2RowLinearFunction` (github.com/Infini-AI-Lab/S2FT,
efficiency/s2ft.py). Both multiply (batch, seq, width) tensors sample by sample and sum over the batch.
"""

from collections.abc import Sequence

from ...program.dims import same
from ..core import tape
from ..custom import in_place_of_base, on_base
from ..elementary import sum_dim
from ..inplace import add_in_place
from ..linalg import matmul
from ..shape import clone, expand, narrow, t, transpose, unsqueeze
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None


def sliced_linear(x: Tensor, weight: Tensor, trained: Tensor, bias: Tensor | None) -> Tensor:
    """x·Wᵀ + b where `trained`, some columns or some rows of W, gets a gradient.

    Args:
        x: (batch, seq, n).
        weight: (m, n), with the trained slice in it.
        trained: (m, w): of x only the w inputs are kept; or (w, n): x is kept.
    """
    columns = not same(trained.shape[1], weight.shape[1])
    inputs = (x, weight, trained)
    node = in_place_of_base("S2LinearFunctionBackward", inputs, _sliced_backward, (columns, trained.shape))
    with tape().no_grad():
        out = on_base(matmul, x, t(weight))
        if bias is not None:
            out = add_in_place(out, expand(unsqueeze(bias, 0), out.shape))
        kept = clone(narrow(x, -1, trained.shape[1])) if columns else x
    if node:
        node.save(kept, weight)
        node.produces(out)
    return out


def _sliced_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (kept, weight) = grads, node.unpack()
    assert g is not None
    columns, shape = node.attrs
    grad_x = on_base(matmul, g, weight) if node.needs[0] else None
    rows = transpose(g if columns else narrow(g, -1, shape[0]), -1, -2)
    return (grad_x, None, sum_dim(matmul(rows, kept), 0))
