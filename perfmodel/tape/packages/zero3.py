"""What DeepSpeed's ZeRO-3 makes of `F.linear` as soon as it cuts a model (`memory_efficient_linear`, on by default).

An autograd Function: it keeps the layer's input whether or not the weight trains, so that a LoRA saves no activations
of the base, and only behind the product, which a recomputation therefore runs again up to the last one of a block. The
bias is added by itself, and its gradient comes behind the weight's.

Source: deepspeed 0.19.8, runtime/zero/linear.py (`LinearFunctionForZeroStage3`), partition_parameters.py
(`_enable_mem_efficient_linear`).
"""

from collections.abc import Sequence

from ..autograd import differentiate
from ..core import record, tape
from ..inplace import OWN_LINEAR
from ..linalg import addmm, matmul, mm
from ..pointwise import reduce_dims
from ..shape import reshape, t, view
from ..tensor import Grads, Node, Tensor


def zero3_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x·Wᵀ + b, W of shape (out, in)."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    node = differentiate(OWN_LINEAR, inputs, _backward, (bias is not None,))
    with tape().no_grad():
        if bias is not None and len(x.shape) == 2:
            out = addmm(bias, x, t(weight))
        else:
            out = matmul(x, t(weight))
            if bias is not None:
                record("add_.Tensor", (out, bias), (out,))
    if node is not None:
        node.save(x, weight)
        if bias is not None:
            node.save(bias)
        node.produces(out)
    return out


def _backward(node: Node, grads: Sequence[Tensor | None]) -> Grads:
    (g,), (x, weight, *_), (biased,) = grads, node.unpack(), node.attrs
    assert g is not None
    of_x = matmul(g, weight) if node.needs[0] else None
    of_weight = mm(t(_rows(g)), _rows(x)) if node.needs[1] else None
    of_bias = view(reduce_dims(_rows(g), (0,)), (g.shape[-1],)) if biased and node.needs[2] else None
    return (of_x, of_weight, of_bias) if biased else (of_x, of_weight)


def _rows(x: Tensor) -> Tensor:
    """Tokens as the rows of a matrix."""
    return x if len(x.shape) == 2 else reshape(x, (x.numel // x.shape[-1], x.shape[-1]))
