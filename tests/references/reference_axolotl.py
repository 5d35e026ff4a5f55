"""LoRA as Axolotl computes it, put into a transformers model with peft's adapters, on whole or 4-bit weights.

Its Triton kernels and the library calls by which it unpacks weights are stand-ins: custom ops that take and overwrite
what those do and compute the same in plain torch. Written from axolotl/kernels/lora.py, quantize.py and swiglu.py, not
from the tape.
"""

import math
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from perfmodel.tracing.programs import low_bit

T = torch.Tensor


def gate_kernels(name: str, act: Any, slope: Any) -> tuple[Any, Any]:
    """The forward and the in-place backward of a gate, of an activation and its derivative."""

    @torch.library.custom_op(f"axolotl::{name}_fwd", mutates_args=())
    def forward(gate: T, up: T) -> T:
        return act(gate) * up

    @forward.register_fake
    def _(gate: T, up: T) -> T:
        return torch.empty_like(gate)

    @torch.library.custom_op(f"axolotl::{name}_bwd", mutates_args=("grad", "gate", "up"))
    def backward(grad: T, gate: T, up: T) -> None:
        opened = act(gate)
        made = opened * up, grad * up * slope(gate), grad * opened
        for place, value in zip((grad, gate, up), made, strict=True):
            place.copy_(value)

    @backward.register_fake
    def _(grad: T, gate: T, up: T) -> None:
        return None

    return forward, backward


def silu_slope(x: T) -> T:
    """σ + xσ(1 − σ)."""
    return torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))


def gelu_slope(x: T) -> T:
    """Φ + xφ."""
    return torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


GATES = {"swiglu": gate_kernels("swiglu", F.silu, silu_slope), "geglu": gate_kernels("geglu", F.gelu, gelu_slope)}


@torch.library.custom_op("bitsandbytes::cdequantize_blockwise_fp32", mutates_args=("out",))
def unpack_maxima(code: T, absmax: T, second: T, out: T) -> None:
    """8-bit maxima by their table, every 256 with a maximum of their own."""
    out.copy_(code[absmax.long()] * second.repeat_interleave(256)[: absmax.numel()])


@unpack_maxima.register_fake
def _(code: T, absmax: T, second: T, out: T) -> None:
    return None


@torch.library.custom_op("bitsandbytes::cdequantize_blockwise_nf4", mutates_args=("out",))
def unpack_values(values: T, absmax: T, out: T) -> None:
    """Two values a byte, every 64 with a maximum."""
    out.copy_(low_bit.dequantize_4bit(values, absmax, list(out.shape), out.dtype))


@unpack_values.register_fake
def _(values: T, absmax: T, out: T) -> None:
    return None


def dequantize(weight: T, state: Any) -> T:
    """A weight, unpacked if it is in 4 bit; packed values that are turned become a weight that is."""
    if state is None:
        return weight
    if state.nested is None:
        return low_bit.dequantized(weight, state)
    second, code, offset = state.nested
    out = torch.empty(tuple(state.shape), dtype=state.dtype, device=weight.device)
    absmax = torch.empty(state.absmax.numel(), dtype=torch.float32, device=weight.device)
    unpack_maxima(code, state.absmax, second, absmax)
    absmax += offset
    unpack_values(weight, absmax, out)
    return out.t() if weight.shape[0] == 1 else out


def matmul_lora(x: T, w: T, bias: Any, state: Any, a: T, b: T, s: float, low: Any = None) -> T:
    """x·W + s·(low·Aᵀ)·Bᵀ + bias; W is given turned."""
    shape, dtype = x.shape, x.dtype
    w = dequantize(w.t(), state)
    if x.dim() == 3:
        x = x.view(-1, shape[-1])
        low = None if low is None else low.view(-1, shape[-1])
    out = torch.matmul(x, w)
    if state is not None:
        del w
    seen = x if low is None else low
    a, b = a.t().to(dtype), b.t().to(dtype)
    out.addmm_(seen @ a, b, alpha=s)
    if bias is not None:
        out += bias
    return out.view(*shape[:-1], -1) if len(shape) == 3 else out


class Qkv(torch.autograd.Function):
    """Three projections of one input."""

    @staticmethod
    def forward(ctx: Any, x: T, low: Any, layers: Any, *adapters: T) -> Any:
        pairs = [adapters[i : i + 2] for i in (0, 2, 4)]
        outs = [matmul_lora(x, w, bias, q, a, b, s, low) for (w, bias, q, s), (a, b) in zip(layers, pairs, strict=True)]
        ctx.save_for_backward(x, x if low is None else low, *(w.to(x.dtype) for w in adapters))
        ctx.layers, ctx.drops = layers, low is not None
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: T) -> Any:
        x, low, *adapters = ctx.saved_tensors
        shape = x.shape
        gs = [g.reshape(-1, g.shape[-1]) for g in grads]
        x, low = x.view(-1, shape[-1]), low.view(-1, shape[-1])
        turned, made, through = low.t(), [], []
        pairs = [adapters[i : i + 2] for i in (0, 2, 4)]
        for g, (a, b), (*_, s) in zip(gs, pairs, ctx.layers, strict=True):
            through.append(g @ b)
            da, db = torch.empty_like(a.t()), torch.empty_like(b.t())
            da.addmm_(turned, through[-1], alpha=s, beta=0)
            db.addmm_(a @ turned, g, alpha=s, beta=0)
            made += [da, db]
        dx = None
        for g, (w, _, q, _) in zip(gs, ctx.layers, strict=True):
            whole = dequantize(w, q)
            if dx is None:
                dx = torch.mm(g, whole)
            else:
                dx.addmm_(g, whole)
            del whole
        assert dx is not None
        dlow = torch.zeros_like(low) if ctx.drops else None
        for g, (a, _), (*_, s) in zip(through, pairs, ctx.layers, strict=True):
            (dx if dlow is None else dlow).addmm_(g, a, alpha=s)
        made = [grad.t() for grad in made]
        dx = dx.view(shape)
        return dx, None if dlow is None else dlow.view(shape), None, *made


class Mlp(torch.autograd.Function):
    """A whole gated MLP."""

    @staticmethod
    def forward(ctx: Any, x: T, low: Any, layers: Any, gate_kernel: Any, *adapters: T) -> T:
        (gate_w, up_w, down_w), (ga, gb, ua, ub, da, db) = layers, adapters
        gate = matmul_lora(x, *gate_w[:3], ga, gb, gate_w[3], low)
        up = matmul_lora(x, *up_w[:3], ua, ub, up_w[3], low)
        hidden = gate_kernel[0](gate, up)
        out = matmul_lora(hidden, *down_w[:3], da, db, down_w[3])
        ctx.save_for_backward(x, x if low is None else low, gate, up, *(w.to(x.dtype) for w in adapters))
        ctx.layers, ctx.drops, ctx.kernel = layers, low is not None, gate_kernel[1]
        return out

    @staticmethod
    def backward(ctx: Any, g: T) -> Any:
        x, low, gate, up, *adapters = ctx.saved_tensors
        (gate_w, up_w, down_w), shape = ctx.layers, x.shape
        ga, gb, ua, ub, da, db = (w.t() for w in adapters)
        g, x, low, gate, up = (y.view(-1, y.shape[-1]) for y in (g, x, low, gate, up))
        hidden = matmul_lora(g, down_w[0].t(), None, down_w[2], db, da, down_w[3])
        ctx.kernel(hidden, gate, up)
        made: list[T] = []

        def of(seen: T, dy: T, at: T, bt: T, s: float) -> T:
            through = dy @ bt.t()
            grad_a, grad_b = torch.empty_like(at), torch.empty_like(bt)
            grad_a.addmm_(seen.t(), through, alpha=s, beta=0)
            grad_b.addmm_(at.t() @ seen.t(), dy, alpha=s, beta=0)
            made.extend((grad_a, grad_b))
            return through

        of(hidden, g, da, db, down_w[3])
        up_low = of(low, up, ua, ub, up_w[3])
        gate_low = of(low, gate, ga, gb, gate_w[3])
        dx = dlow = None
        if ctx.needs_input_grad[0]:
            whole = dequantize(up_w[0].t(), up_w[2])
            dx = torch.matmul(up, whole.t())
            del whole
            whole = dequantize(gate_w[0], gate_w[2])
            dx.addmm_(gate, whole)
            del whole
            dlow = torch.zeros_like(low) if ctx.drops else None
            into = dx if dlow is None else dlow
            into.addmm_(up_low, ua.t(), alpha=up_w[3])
            into.addmm_(gate_low, ga.t(), alpha=gate_w[3])
            dlow = None if dlow is None else dlow.view(shape)
            dx = dx.view(shape)
        found = [grad.t() for grad in (*made[4:], *made[2:4], *made[:2])]
        return dx, dlow, None, None, *found


class Output(torch.autograd.Function):
    """The projection behind attention."""

    @staticmethod
    def forward(ctx: Any, x: T, low: Any, layer: Any, a: T, b: T) -> T:
        w, bias, q, s = layer
        out = matmul_lora(x, w, bias, q, a, b, s, low)
        ctx.save_for_backward(a.to(x.dtype), b.to(x.dtype), x, x if low is None else low)
        ctx.layer, ctx.drops = layer, low is not None
        return out

    @staticmethod
    def backward(ctx: Any, g: T) -> Any:
        a, b, x, low = ctx.saved_tensors
        (w, _, q, s), shape = ctx.layer, x.shape
        g, x, low = (y.reshape(-1, y.shape[-1]) for y in (g, x, low))
        through, turned = g @ b, low.t()
        da, db = torch.empty_like(a.t()), torch.empty_like(b.t())
        da.addmm_(turned, through, alpha=s, beta=0)
        db.addmm_(a @ turned, g, alpha=s, beta=0)
        whole = dequantize(w.t(), q)
        dx = g @ whole.t()
        del whole
        dlow = None
        if ctx.drops:
            dlow = (through @ a * s).view(shape)
        else:
            dx.addmm_(through, a, alpha=s)
        return dx.view(shape), dlow, None, da.t(), db.t()


def parts(layer: Any) -> tuple[Any, tuple[T, T]]:
    """(W, bias, state, s) and (A, B) of peft's layer, which FSDP2 gathers here if they are units of its."""
    base = layer.base_layer
    for half in (layer.lora_A["default"], layer.lora_B["default"]):
        if isinstance(half.weight, DTensor):
            half.unshard()
    frozen = (base.weight, base.bias, getattr(base, "quant_state", None), layer.scaling["default"])
    return frozen, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)


def dropped(layer: Any, x: T) -> Any:
    """What adapters see of x, None where it is x itself."""
    drop = layer.lora_dropout["default"]
    return None if isinstance(drop, nn.Identity) else drop(x)


class Once:
    """Three projections that transformers calls one after another, computed at the first call."""

    def __init__(self, layers: Any) -> None:
        self.layers, self.results = layers, []

    def __call__(self, x: T) -> T:
        if not self.results:
            found = [parts(layer) for layer in self.layers]
            adapters = (w for _, pair in found for w in pair)
            low = dropped(self.layers[0], x)
            self.results = list(Qkv.apply(x, low, tuple(f for f, _ in found), *adapters))
        return self.results.pop(0)


def mlp_forward(self: Any, x: T) -> T:
    """In the place of the MLP's."""
    found = [parts(layer) for layer in (self.gate_proj, self.up_proj, self.down_proj)]
    kernel = GATES["swiglu" if "SiLU" in type(self.act_fn).__name__ else "geglu"]
    adapters = (w for _, pair in found for w in pair)
    return Mlp.apply(x, dropped(self.gate_proj, x), tuple(f for f, _ in found), kernel, *adapters)


def output_forward(self: Any, x: T, *args: Any, **kwargs: Any) -> T:
    """In the place of o_proj's."""
    frozen, adapters = parts(self)
    return Output.apply(x, dropped(self, x), frozen, *adapters)


def patch(model: Any) -> Any:
    """A peft model with Axolotl's forward passes, wherever all of a Function's layers have adapters."""
    for module in list(model.modules()):

        def has(*names: str, module: Any = module) -> bool:
            return all(hasattr(getattr(module, name, None), "lora_A") for name in names)

        if has("q_proj", "k_proj", "v_proj"):
            once = Once([module.q_proj, module.k_proj, module.v_proj])
            for layer in once.layers:
                layer.forward = lambda x, once=once: once(x)
        if has("o_proj"):
            module.o_proj.forward = MethodType(output_forward, module.o_proj)
        if has("gate_proj", "up_proj", "down_proj"):
            module.forward = MethodType(mlp_forward, module)
    return model
