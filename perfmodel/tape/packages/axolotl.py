"""LoRA as Axolotl runs it by itself: autograd Functions after Unsloth's, for q, k and v, for the MLP and for o_proj.

Unlike those they take a base in 4 bit, biases and a dropout that all layers of one input share; they keep adapters in
the compute dtype, multiply each gradient by B once, and write over nothing that they keep but two projections of the
MLP. Values in 4 bit are unpacked without bitsandbytes' own operators. Source: axolotl-ai-cloud/axolotl of 2026-07,
kernels/lora.py, quantize.py, swiglu.py and geglu.py, monkeypatch/lora_kernels.py.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..core import emit, record, tape
from ..custom import addmm_, as_rows, in_place_of_base, on_base, python_function
from ..linalg import mm
from ..pointwise import cast, dropout, empty_like, fill, mul
from ..shape import t, view
from ..tensor import Grads, Node, Parameter, Tensor
from .quantized import Packed, in_float

Grad = Tensor | None


class Projection(NamedTuple):
    """A frozen weight (m, n), whole or in 4 bit, its bias, and its adapters A (r, n) and B (m, r)."""

    weight: Parameter | Packed
    bias: Parameter | None
    a: Parameter
    b: Parameter

    @property
    def adapters(self) -> tuple[Parameter, Parameter]:
        """A and B."""
        return self.a, self.b


def qkv(x: Tensor, layers: Sequence[Projection], p: float) -> list[Tensor]:
    """`LoRA_QKV`: three projections of one input, whose adapters see it through one dropout of share `p`."""
    low = dropout(x, p) if p else None
    python_function()
    adapters = [w for layer in layers for w in layer.adapters]
    inputs = (x, *adapters) if low is None else (x, low, *adapters)
    node = in_place_of_base("LoRA_QKVBackward", inputs, _qkv_backward, (tuple(layers), low is not None))
    with tape().no_grad():
        outs = [_product(x, layer, low) for layer in layers]
        kept = [cast(w, x.dtype) for w in adapters]
    if node:
        node.save(x, x if low is None else low, *kept)
        node.produces(*outs)
    return outs


def _qkv_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (x, low, *adapters), (layers, drops) = node.unpack(), node.attrs
    python_function()
    shape = x.shape
    gs = [as_rows(g) for g in grads if g is not None]
    as_rows(x)
    low = as_rows(low)
    turned = t(low)
    pairs = [(adapters[i], adapters[i + 1]) for i in range(0, len(adapters), 2)]
    through, made = [], []
    for g, (a, b) in zip(gs, pairs, strict=True):
        through.append(mm(g, b))
        grad_a, grad_b = empty_like(t(a)), empty_like(t(b))
        addmm_(grad_a, turned, through[-1])
        addmm_(grad_b, mm(a, turned), g)
        made.append((grad_a, grad_b))
    grad_x = on_base(_base_grad, gs, [(layer, 0) for layer in layers])
    grad_low = fill("zeros_like", low.shape, low.dtype, low) if drops else grad_x
    for g, (a, _) in zip(through, pairs, strict=True):
        addmm_(grad_low, g, a)
    found = [t(grad) for pair in made for grad in pair]
    return (*_inputs(grad_x, grad_low if drops else None, shape), *found)


def mlp(x: Tensor, layers: Sequence[Projection], p: float, activation: str) -> Tensor:
    """`LoRA_MLP`: a whole gated MLP; no dropout lies before the last layer.

    Args:
        layers: gate, up and down projection.
        activation: Axolotl's name of the gate's kernel, swiglu or geglu.
    """
    low = dropout(x, p) if p else None
    python_function()
    gate, up, down = layers
    adapters = [w for layer in layers for w in layer.adapters]
    inputs = (x, *adapters) if low is None else (x, low, *adapters)
    attrs = (tuple(layers), low is not None, activation)
    node = in_place_of_base("LoRA_MLPBackward", inputs, _mlp_backward, attrs)
    with tape().no_grad():
        opened, other = _product(x, gate, low), _product(x, up, low)
        hidden = on_base(emit, f"axolotl::{activation}_fwd", (opened, other), opened.shape, opened.dtype)
        out = _product(hidden, down, None)
        kept = [cast(w, x.dtype) for w in adapters]
    if node:
        node.save(x, x if low is None else low, opened, other, *kept)
        node.produces(out)
    return out


def _mlp_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x, low, opened, other, *adapters) = grads, node.unpack()
    assert g is not None
    (gate, up, down), drops, activation = node.attrs
    python_function()
    shape = x.shape
    gate_a, gate_b, up_a, up_b, down_a, down_b = (t(w) for w in adapters)
    g, _, low, opened, other = (as_rows(y) for y in (g, x, low, opened, other))
    hidden = on_base(mm, g, on_base(_whole, down, 2))
    a, b = t(down_b), t(down_a)
    addmm_(hidden, mm(g, a), b)
    on_base(record, f"axolotl::{activation}_bwd", (hidden, opened, other), (hidden, opened, other))
    _, of_down = _grads(hidden, g, down_a, down_b)
    through_up, of_up = _grads(low, other, up_a, up_b)
    through_gate, of_gate = _grads(low, opened, gate_a, gate_b)
    found = [t(grad) for pair in (of_gate, of_up, of_down) for grad in pair]
    if not node.needs[0]:
        return (*((None, None) if drops else (None,)), *found)
    grad_x = on_base(_base_grad, (other, opened), ((up, 1), (gate, 0)))
    grad_low = fill("zeros_like", low.shape, low.dtype, low) if drops else grad_x
    addmm_(grad_low, through_up, t(up_a))
    addmm_(grad_low, through_gate, t(gate_a))
    return (*_inputs(grad_x, grad_low if drops else None, shape), *found)


def _grads(x: Tensor, g: Tensor, at: Tensor, bt: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """g·B, and the gradients of Aᵀ and Bᵀ."""
    through = mm(g, t(bt))
    grad_a, grad_b = empty_like(at), empty_like(bt)
    addmm_(grad_a, t(x), through)
    addmm_(grad_b, mm(t(at), t(x)), g)
    return through, (grad_a, grad_b)


def output(x: Tensor, layer: Projection, p: float) -> Tensor:
    """`LoRA_O`, which takes the place of o_proj."""
    low = dropout(x, p) if p else None
    python_function()
    inputs = (x, *layer.adapters) if low is None else (x, low, *layer.adapters)
    node = in_place_of_base("LoRA_OBackward", inputs, _output_backward, (layer, low is not None))
    with tape().no_grad():
        out = _product(x, layer, low)
        kept = [cast(w, x.dtype) for w in layer.adapters]
    if node:
        node.save(*kept, x, x if low is None else low)
        node.produces(out)
    return out


def _output_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b, x, low) = grads, node.unpack()
    assert g is not None
    layer, drops = node.attrs
    python_function()
    shape, g, _, low = x.shape, as_rows(g), as_rows(x), as_rows(low)
    through, turned = mm(g, b), t(low)
    grad_a, grad_b = empty_like(t(a)), empty_like(t(b))
    addmm_(grad_a, turned, through)
    addmm_(grad_b, mm(a, turned), g)
    grad_x = on_base(_base_grad, (g,), ((layer, 1),))
    grad_low = None
    if drops:
        grad_low = mul(mm(through, a), 1.0)
    else:
        addmm_(grad_x, through, a)
    return (*_inputs(grad_x, grad_low, shape), t(grad_a), t(grad_b))


def _inputs(grad_x: Tensor, grad_low: Grad, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The gradients of x and, where adapters saw it through a dropout, of what came out of that."""
    return tuple(view(grad, shape) for grad in (grad_x, grad_low) if grad is not None)


def _product(x: Tensor, layer: Projection, low: Grad) -> Tensor:
    """`matmul_lora`: x·Wᵀ, (low·Aᵀ)·Bᵀ added into it, and the bias; `low` is x where no dropout lies before A."""
    shape = x.shape
    weight = on_base(_whole, layer, 1)
    rows = as_rows(x)
    seen = rows if low is None else as_rows(low)
    out = on_base(mm, rows, weight)
    del weight
    a, b = cast(t(layer.a), x.dtype), cast(t(layer.b), x.dtype)
    addmm_(out, mm(seen, a), b)
    if layer.bias is not None:
        on_base(record, "add_.Tensor", (out, layer.bias), (out,))
    return view(out, (*shape[:-1], out.shape[1]))


def _base_grad(gs: Sequence[Tensor], layers: Sequence[tuple[Projection, int]]) -> Tensor:
    """The sum of g·W; beside each layer how often its weight is turned before it is unpacked, and then turned back."""
    grad = None
    for g, (layer, turns) in zip(gs, layers, strict=True):
        weight = _whole(layer, turns)
        if turns:
            weight = t(weight)
        if grad is None:
            grad = mm(g, weight)
        else:
            addmm_(grad, g, weight)
        del weight
    assert grad is not None
    return grad


def _whole(layer: Projection, turns: int) -> Tensor:
    return in_float(layer.weight, turns)
