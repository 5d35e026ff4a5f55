"""Kernels of the flash-attn package besides attention: RMSNorm (its extension `dropout_layer_norm`), rotary positions,
cross entropy (its extension `xentropy`).

Source: flash-attn 2.3.3, flash_attn/ops/rms_norm.py, ops/layer_norm.py (`DropoutAddLayerNormFn`), layers/rotary.py
(`ApplyRotaryEmb`), csrc/layer_norm/ln_api.cpp; 1.0.9, losses/cross_entropy.py (`SoftmaxCrossEntropyLossFn`).
"""

from collections.abc import Sequence

from ...program.dims import product
from ..autograd import differentiate
from ..core import emit, new_tensor, record, tape
from ..custom import python_function
from ..elementary import div
from ..scores import sum_all
from ..shape import clone, contiguous, view
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`flash_attn.ops.rms_norm.rms_norm`: one kernel; keeps x and two fp32 statistics a row."""
    python_function()
    node = differentiate("DropoutAddLayerNormFnBackward", (x, weight), _rms_norm_backward)
    with tape().no_grad():
        x = contiguous(x)
        rows = view(x, (product(x.shape[:-1]), x.shape[-1]))
        y = new_tensor(rows.shape, x.dtype)
        mean, rstd = (new_tensor((rows.shape[0],), "fp32") for _ in range(2))
        record("dropout_layer_norm::dropout_add_ln_fwd", (rows, weight), (y, mean, rstd))
        out = view(y, x.shape)
    if node:
        node.save(x, weight, mean, rstd)
        node.produces(out)
    return out


def _rms_norm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, weight, mean, rstd) = grads, node.unpack()
    assert g is not None
    python_function()
    g = contiguous(g)
    rows, x_rows = (view(y, (product(y.shape[:-1]), y.shape[-1])) for y in (g, x))
    grad_x = new_tensor(rows.shape, x.dtype)
    grad_weight, grad_bias = (new_tensor(weight.shape, weight.dtype) for _ in range(2))  # frozen or not, used or not
    record(
        "dropout_layer_norm::dropout_add_ln_bwd", (rows, x_rows, mean, rstd, weight), (grad_x, grad_weight, grad_bias)
    )
    return (view(grad_x, x.shape), grad_weight)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_emb` of (batch, seq, heads, head_dim); cos and sin (seq, head_dim/2) in x's dtype."""
    python_function()
    node = differentiate("ApplyRotaryEmbBackward", (x,), _rotary_backward)
    with tape().no_grad():
        out = _rotated(x, cos, sin)
    if node:
        node.save(cos, sin)
        node.produces(out)
    return out


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return emit("flash_rotary::apply_rotary", (x, contiguous(cos), contiguous(sin)), x.shape, x.dtype)


def _rotary_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (cos, sin) = grads, node.unpack()
    assert g is not None
    python_function()
    return (_rotated(clone(g), cos, sin),)  # the copy works around a fault of an old Triton


def fused_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`CrossEntropyLoss` of (tokens, vocab) logits, whose gradient is made in backward from what they were."""
    losses = _token_losses(logits, labels)
    counted = emit("ne.Scalar", (labels,), labels.shape, "bool")
    return div(sum_all(losses), sum_all(counted))


def _token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    python_function()
    node = differentiate("SoftmaxCrossEntropyLossFnBackward", (logits,), _token_losses_backward)
    with tape().no_grad():
        losses, lse = (new_tensor(labels.shape, "fp32") for _ in range(2))
        record("xentropy::forward", (logits, labels), (losses, lse))
        ignored = emit("eq.Scalar", (labels,), labels.shape, "bool")
        record("masked_fill_.Scalar", (losses, ignored), (losses,))
    if node:
        node.save(logits, lse, labels)
        node.produces(losses)
    return losses


def _token_losses_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (logits, lse, labels) = grads, node.unpack()
    assert g is not None
    python_function()
    g = contiguous(g)
    ignored = emit("eq.Scalar", (labels,), labels.shape, "bool")
    record("masked_fill_.Scalar", (g, ignored), (g,))
    return (emit("xentropy::backward", (g, logits, lse, labels), logits.shape, logits.dtype),)
