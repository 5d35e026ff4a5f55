"""LoRA in fused implementations: autograd Functions that compute y = xWᵀ + (α/r)·(xAᵀ)Bᵀ with other kernels.

LoRAFusion: Triton kernels that read x and dy once for the base and the adapter. Unsloth: cuBLAS products that add into
one another (`addmm_`), one Function for q, k and v and one for the MLP, which write gradients over what they no longer
need. Sources: CentML/lorafusion, lorafusion/ops/lora_v1.py and triton_ops/; unslothai/unsloth, unsloth/kernels/
fast_lora.py, swiglu.py and utils.py (2025).
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from ..core import emit, new_tensor, record, tape
from ..custom import addmm_, as_rows, in_place_of_base, on_base, python_function
from ..linalg import mm, product_into
from ..pointwise import cast, empty_like
from ..shape import t, view
from ..tensor import Grads, Node, Parameter, Tensor
from .quantized import Packed, in_float

Grad = Tensor | None


# ------------------------------------------------------------------------------------------------------- LoRAFusion


def lorafusion_linear(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """LoRAFusion's linear: S = dropout(x)·Aᵀ, then x·Wᵀ + S·Bᵀ in one kernel.

    Keeps the dropped-out x, its mask and S. All tensors have one dtype; x (batch, seq, n), A (r, n), B (m, r).
    """
    python_function()
    node = in_place_of_base("FusedLinearLoRABackward", (x, a, b), _lorafusion_backward)
    shape = (*x.shape[:-1], weight.shape[0])
    with tape().no_grad():
        x = as_rows(x)
        masked, mask = x, None
        if dropout:
            masked, mask = new_tensor(x.shape, x.dtype), new_tensor(x.shape, "bool")
            record("lorafusion::dropout", (x,), (masked, mask))
        s = mm(masked, t(a))
        inputs = (x, weight, s, b) if bias is None else (x, weight, s, b, bias)
        y = view(on_base(emit, "lorafusion::xw_sb", inputs, (x.shape[0], weight.shape[0]), x.dtype), shape)
    if node:
        node.save(masked, weight, a, b, mask, s)
        node.produces(y)
    return y


def _lorafusion_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (masked, weight, a, b, mask, s) = grads, node.unpack()
    assert g is not None
    python_function()
    shape, g = (*g.shape[:-1], weight.shape[1]), as_rows(g)
    sum_b, sum_s = emit("zeros", (), b.shape, "fp32"), emit("zeros", (), s.shape, "fp32")
    record("lorafusion::dys_dyb", (g, b, s, sum_b, sum_s), (sum_b, sum_s))  # atomic sums in fp32
    grad_b, grad_s = cast(sum_b, g.dtype), cast(sum_s, g.dtype)
    del sum_b, sum_s
    grad_a = mm(t(grad_s), masked)
    grad_x = None
    if node.needs[0]:
        inputs = (g, weight, grad_s, a) if mask is None else (g, weight, grad_s, a, mask)
        grad_x = view(on_base(emit, "lorafusion::dyw_dsa", inputs, (g.shape[0], weight.shape[1]), g.dtype), shape)
    return (grad_x, grad_a, grad_b)


# ---------------------------------------------------------------------------------------------------------- Unsloth


class Adapted(NamedTuple):
    """A frozen weight (m, n), whole or in 4 bit, with its adapters A (r, n) and B (m, r)."""

    weight: Parameter | Packed
    a: Parameter
    b: Parameter


def _matmul_lora(x: Tensor, weight: Parameter | Packed, a: Tensor, b: Tensor, *, turned: bool = False) -> Tensor:
    """`matmul_lora`: x·Wᵀ, or x·W if it is given turned, and (x·Aᵀ)·Bᵀ added into it; adapters are cast every time.

    A weight in 4 bit is unpacked into a buffer that lasts.
    """
    shape, x = x.shape, as_rows(x)
    out = on_base(mm, x, t(on_base(partial(in_float, buffered=True), weight, int(turned))))
    xa = mm(x, cast(t(a), x.dtype))
    addmm_(out, xa, cast(t(b), x.dtype))
    return view(out, (*shape[:-1], out.shape[1])) if len(shape) > 2 else out


def _weight(adapter: Adapted) -> Tensor:
    """W, turned before it is unpacked and then turned back."""
    return t(in_float(adapter.weight, 1))


def _adapter_grads(x: Tensor, g: Tensor, at: Tensor, bt: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of Aᵀ (n, r) and Bᵀ (r, m): xᵀ·(g·B) and (A·xᵀ)·g, the inner products computed anew."""
    grad_a, grad_b = empty_like(at), empty_like(bt)
    addmm_(grad_a, t(x), mm(g, t(bt)))
    addmm_(grad_b, mm(t(at), t(x)), g)
    return grad_a, grad_b


def _transposed(adapter: Adapted, dtype: str) -> tuple[Tensor, Tensor]:
    """Aᵀ and Bᵀ in the compute dtype."""
    return t(cast(adapter.a, dtype)), t(cast(adapter.b, dtype))


def _add_input_grad(grad: Tensor, g: Tensor, adapter: Adapted, at: Tensor, bt: Tensor, *, base: bool) -> None:
    """grad += g·W (if `base`) + (g·B)·A."""
    if base:
        on_base(addmm_, grad, g, on_base(_weight, adapter))
    addmm_(grad, mm(g, t(bt)), t(at))


def unsloth_linear(x: Tensor, layer: Adapted) -> Tensor:
    """Unsloth's `LoRA_W`, which it puts in the place of o_proj."""
    python_function()
    node = in_place_of_base("LoRA_WBackward", (x, layer.a, layer.b), _unsloth_linear_backward, (layer,))
    with tape().no_grad():
        y = _matmul_lora(x, *layer)
    if node:
        node.save(layer.a, layer.b, x)
        node.produces(y)
    return y


def _unsloth_linear_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (_, _, x) = grads, node.unpack()
    assert g is not None
    (layer,) = node.attrs
    python_function()
    shape, g, x = x.shape, as_rows(g), as_rows(x)
    at, bt = _transposed(layer, x.dtype)
    grad_a, grad_b = _adapter_grads(x, g, at, bt)
    grad_x = on_base(mm, g, on_base(_weight, layer))
    _add_input_grad(grad_x, g, layer, at, bt, base=False)
    return (view(grad_x, shape), t(grad_a), t(grad_b))


def unsloth_qkv(x: Tensor, layers: Sequence[Adapted]) -> list[Tensor]:
    """Unsloth's `LoRA_QKV`: three projections of one input; its gradient is summed in x's own memory."""
    python_function()
    adapters = [p for layer in layers for p in (layer.a, layer.b)]
    node = in_place_of_base("LoRA_QKVBackward", (x, *adapters), _unsloth_qkv_backward, (tuple(layers),))
    with tape().no_grad():
        rows = as_rows(x)
        outs = [view(y, (*x.shape[:-1], y.shape[1])) for y in [_matmul_lora(rows, *layer) for layer in layers]]
    if node:
        node.save(x, *adapters)
        node.produces(*outs)
    return outs


def _unsloth_qkv_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    x, (layers,) = node.unpack()[0], node.attrs
    python_function()
    shape = x.shape
    gs = [as_rows(g) for g in grads if g is not None]
    x = as_rows(x)
    turned = [_transposed(layer, x.dtype) for layer in layers]
    made = [_adapter_grads(x, g, *at_bt) for g, at_bt in zip(gs, turned, strict=True)]
    grad_x = on_base(product_into, gs[0], on_base(_weight, layers[0]), x)
    for i, (g, layer, at_bt) in enumerate(zip(gs, layers, turned, strict=True)):
        _add_input_grad(grad_x, g, layer, *at_bt, base=i > 0)
    return (view(grad_x, shape), *(t(grad) for pair in made for grad in pair))


def unsloth_mlp(x: Tensor, gate: Adapted, up: Adapted, down: Adapted) -> Tensor:
    """Unsloth's `LoRA_MLP`: the whole SwiGLU MLP; keeps x and the two projections."""
    python_function()
    layers = (gate, up, down)
    adapters = [p for layer in layers for p in (layer.a, layer.b)]
    node = in_place_of_base("LoRA_MLPBackward", (x, *adapters), _unsloth_mlp_backward, (layers,))
    with tape().no_grad():
        e, g = _matmul_lora(x, *gate), _matmul_lora(x, *up)
        h = on_base(emit, "unsloth::swiglu_fg", (e, g), e.shape, e.dtype)
        out = _matmul_lora(h, *down)
    if node:
        node.save(*adapters, x, e, g)
        node.produces(out)
    return out


def _unsloth_mlp_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (dy,), (x, e, g) = grads, node.unpack()[-3:]
    assert dy is not None
    ((gate, up, down),) = node.attrs
    python_function()
    shape = x.shape
    dy, x, e, g = as_rows(dy), as_rows(x), as_rows(e), as_rows(g)
    gate_t, up_t, down_t = (_transposed(layer, x.dtype) for layer in (gate, up, down))
    dw = _matmul_lora(dy, down.weight, down_t[1], down_t[0], turned=True)
    on_base(record, "unsloth::swiglu_DWf_DW_dfg", (dw, e, g), (dw, e, g))
    h, df, de = dw, e, g  # in the same memory: the hidden layer and the gradients of both projections
    of_down = _adapter_grads(h, dy, *down_t)
    of_up = _adapter_grads(x, df, *up_t)
    of_gate = _adapter_grads(x, de, *gate_t)
    grad_x = on_base(product_into, df, on_base(_weight, up), x)
    _add_input_grad(grad_x, df, up, *up_t, base=False)
    _add_input_grad(grad_x, de, gate, *gate_t, base=True)
    return (view(grad_x, shape), *(t(grad) for grad in (*of_gate, *of_up, *of_down)))
