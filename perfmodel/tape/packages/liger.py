"""Liger's fused kernels for Llama-like models: RMSNorm, rotary positions, gated MLPs, and the head with its loss.

Each is an autograd Function around a Triton kernel. Gradients are written over what they belong to: a norm's over the
gradient that came in (not Gemma 2's and 3's, whose residual still needs it), a gate's over its saved inputs, the loss's
over its logits, of which only a chunk ever exists. Models are patched before they are made, so that norms of heads are
Liger's, too. Source: Liger-Kernel 0.5 to 0.8.5 (`program.software` says what differs), src/liger_kernel/ops/
(rms_norm.py, rope.py, swiglu.py, geglu.py, fused_linear_cross_entropy.py), transformers/monkey_patch.py.
"""

from collections.abc import Sequence

import numpy as np

from ...program.dims import Dim, decide, product
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, new_tensor, record, tape
from ..custom import autocasting, python_function
from ..linalg import layout_of, matmul, product_into
from ..pointwise import cast
from ..shape import contiguous, t, transpose, view, view_as
from ..tensor import Grads, Node, Tensor

Grad = Tensor | None
GATED = {"swiglu": "LigerSiLUMulFunctionBackward", "geglu": "LigerGELUMulFunctionBackward"}
PROGRAMS = 132  # of a norm's backward, one an SM, each with its own part of the weight's gradient; H100's number


def _rows(x: Tensor) -> Tensor:
    return view(x, (product(x.shape[:-1]), x.shape[-1]))


def rms_norm(x: Tensor, weight: Tensor, *, in_place: bool = True) -> Tensor:
    """`LigerRMSNorm` with Llama's or Gemma's casts: one kernel, a row a program; keeps x and the rows' 1/rms in fp32.

    Args:
        in_place: whether the gradient of x is written over that of the result.
    """
    python_function()
    node = differentiate("LigerRMSNormFunctionBackward", (x, weight), _rms_norm_backward, (in_place,))
    with tape().no_grad():
        rows = _rows(contiguous(x))
        y, rstd = new_tensor(rows.shape, x.dtype), new_tensor((rows.shape[0],), "fp32")
        record("liger::rms_norm", (rows, weight), (y, rstd))
        out = view(y, x.shape)
    if node:
        node.save(rows, weight, rstd)
        node.produces(out)
    return out


def _rms_norm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, weight, rstd), (in_place,) = grads, node.unpack(), node.attrs
    assert g is not None
    python_function()
    shape = g.shape
    g = _rows(contiguous(g))
    wanted = node.needs[1] or not tape().stack.liger_leaves_frozen_norms
    partial = [new_tensor((PROGRAMS, shape[-1]), "fp32")] if wanted else []
    grad_x = g if in_place else emit("zeros_like", (g,), g.shape, g.dtype)
    if in_place:
        record("liger::rms_norm_backward", (g, x, weight, rstd), (*partial, g))
    else:
        record("liger::rms_norm_backward_apart", (g, x, weight, rstd, grad_x), (*partial, grad_x))
    if not wanted:
        return (view(grad_x, shape), None)
    total = emit("sum.dim_IntList", tuple(partial), (shape[-1],), "fp32", attrs=Attrs(dims=(0,)))
    return (view(grad_x, shape), cast(total, weight.dtype))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of q and k, (batch, heads, seq, head_dim), in place, in one kernel; cos and sin (1, seq, d)."""
    python_function()
    node = differentiate("LigerRopeFunctionBackward", (q, k), _rope_backward)
    with tape().no_grad():
        q, k = _rotated("liger::rope", q, k, cos, sin)
    if node:
        node.save(cos, sin)
        node.produces(q, k)
    return q, k


def _rotated(name: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = contiguous(transpose(q, 1, 2)), contiguous(transpose(k, 1, 2))
    record(name, (q, k, cos, sin), (q, k))
    return transpose(q, 1, 2), transpose(k, 1, 2)


def _rope_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (dq, dk), (cos, sin) = grads, node.unpack()
    assert dq is not None
    assert dk is not None
    python_function()
    return _rotated("liger::rope_backward", dq, dk, cos, sin)


def gated(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate)·up in one kernel; keeps both inputs, and backward puts their gradients in their place.

    Args:
        kind: swiglu, or geglu with the tanh form of GELU.
    """
    python_function()
    node = differentiate(GATED[kind], (gate, up), _gated_backward, (kind,))
    with tape().no_grad():
        a, b = _rows(contiguous(gate)), _rows(contiguous(up))
        out = view(emit(f"liger::{kind}", (a, b), a.shape, a.dtype), gate.shape)
    if node:
        node.save(a, b)
        node.produces(out)
    return out


def _gated_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b), (kind,) = grads, node.unpack(), node.attrs
    assert g is not None
    python_function()
    rows = _rows(contiguous(g))
    record(f"liger::{kind}_backward", (rows, a, b), (a, b))
    return (view(a, g.shape), view(b, g.shape))


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, *, scaled: bool) -> Tensor:
    """Mean cross entropy of hidden·Wᵀ, (tokens, width) by (vocab, width): all gradients are formed in forward.

    Logits exist for one chunk of tokens at a time, about as large as `hidden`.

    Args:
        scaled: whether the loss is divided afterwards, so that backward has to scale the gradients.
    """
    python_function()
    current = tape()
    attrs = (scaled, current.autocast)
    node = differentiate("LigerFusedLinearCrossEntropyFunctionBackward", (hidden, weight), _loss_backward, attrs)
    with current.no_grad():
        loss, grad_hidden, grad_weight = _loss_and_gradients(hidden, weight, target)
    if node:
        node.save(grad_hidden, grad_weight)
        node.produces(loss)
    return loss


def chunks(tokens: Dim, vocab: int, width: int) -> list[Dim]:
    """Tokens of each chunk: a power of two, so that a chunk's logits are about as large as the hidden states.

    Raises:
        MixedStructure: the points of a grid need different numbers of chunks.
    """
    size = 2 ** np.ceil(np.log2(-(-tokens // -(-vocab // width)))).astype(np.int64)
    number = -(-tokens // size)
    first = int(np.ravel(number)[0])
    decide(number == first)
    size = size if isinstance(tokens, np.ndarray) else int(size)
    return [size] * (first - 1) + [tokens - size * (first - 1)]


def _loss_and_gradients(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Grad]:
    current = tape()
    tokens, width = hidden.shape
    grad_weight = emit("zeros_like", (weight,), weight.shape, weight.dtype) if weight.requires_grad else None
    grad_hidden = emit("zeros_like", (hidden,), hidden.shape, hidden.dtype)
    losses = emit("zeros", (), (tokens,), "fp32")
    counted = emit("ne.Scalar", (target,), target.shape, "bool")
    record("_local_scalar_dense", (emit("sum", (counted,), (), "i64"),), ())
    sizes = chunks(tokens, weight.shape[0], width)
    alike = hidden.dtype == weight.dtype and current.autocast in (None, hidden.dtype)  # `_can_use_mm_out`
    in_place = current.stack.liger_keeps_logits and alike
    room = emit("empty.memory_format", (), (sizes[0], weight.shape[0]), hidden.dtype) if in_place else None
    for size in sizes:
        part, labels, loss = _slice(hidden, size), _slice(target, size), _slice(losses, size)
        if room is not None:
            logits = _slice(room, size)
            product_into(part, t(weight), logits)
        else:
            logits = matmul(part, t(weight))  # as the last chunk's still is, until this name is bound
        record("liger::cross_entropy", (logits, labels, loss), (logits, loss))
        record("copy_", (_slice(losses, size), loss), (_slice(losses, size),))
        grad_logits, rows = logits, _slice(grad_hidden, size)
        if room is not None:
            product_into(grad_logits, weight, rows)
        else:
            record("copy_", (rows, matmul(grad_logits, weight)), (rows,))
        if grad_weight is not None:
            _add_weight_gradient(grad_weight, grad_logits, part)
    del room
    return emit("sum", (losses,), (), "fp32"), grad_hidden, grad_weight


def _add_weight_gradient(total: Tensor, grad_logits: Tensor, part: Tensor) -> None:
    """total += grad_logitsᵀ·part: by one product, or by one apart, in fp32 in releases that took no other way."""
    stack, left = tape().stack, t(grad_logits)
    widened = stack.liger_adds_in_fp32 and total.dtype == "fp32" != left.dtype
    if widened or not stack.liger_sums_apart or (stack.liger_keeps_logits and total.dtype == left.dtype != "fp32"):
        if stack.liger_adds_in_fp32:
            part = cast(part, left.dtype)
        else:
            left = cast(left, part.dtype)
        record(f"addmm.{'dtype_' * widened}out", (total, left, part, total), (total,), attrs=layout_of(left, part))
        return
    product = cast(matmul(left, part), "fp32")
    record("add_.Tensor", (total, product), (total,))


def _slice(x: Tensor, size: Dim) -> Tensor:
    return view_as("slice.Tensor", x, (size, *x.shape[1:]), x.strides)


def _loss_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (grad_hidden, grad_weight) = grads, node.unpack()
    assert g is not None
    scaled, autocast = node.attrs
    python_function()
    with autocasting(autocast):
        same = emit("all", (emit("eq.Scalar", (g,), (), "bool"),), (), "bool")  # "if the loss is the last layer"
        record("_local_scalar_dense", (same,), ())
        if scaled:
            for grad in (grad_hidden, grad_weight):
                if grad is not None:
                    record("liger::element_mul", (grad, g), (grad,))
    return (grad_hidden, grad_weight)
