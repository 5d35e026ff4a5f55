"""LoRA as Unsloth and LoRAFusion compute it, put into a transformers model with peft's adapters.

Their Triton kernels are stand-ins: custom ops that take, allocate and overwrite what the kernels do and compute the
same in plain torch. Written from unsloth/kernels/fast_lora.py and lorafusion/ops/lora_v1.py, not from the tape.
"""

import math
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from reference_axolotl import unpack_maxima, unpack_values
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

T = torch.Tensor

# ------------------------------------------------------------------------------------------------------- LoRAFusion


@torch.library.custom_op("lorafusion::dropout", mutates_args=())
def seeded_dropout(x: T, p: float) -> tuple[T, T]:
    """Dropped-out and scaled x, and the mask."""
    mask = torch.rand_like(x, dtype=torch.float32) > p
    return torch.where(mask, x / (1 - p), 0.0), mask


@seeded_dropout.register_fake
def _(x: T, p: float) -> tuple[T, T]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


@torch.library.custom_op("lorafusion::xw_sb", mutates_args=())
def xw_sb(x: T, w: T, s: T, b: T, bias: T | None, alpha: float) -> T:
    """x·Wᵀ + alpha·s·Bᵀ + bias."""
    y = x @ w.T + s @ b.T * alpha
    return y if bias is None else y + bias


@xw_sb.register_fake
def _(x: T, w: T, s: T, b: T, bias: T | None, alpha: float) -> T:
    return x.new_empty(x.shape[0], w.shape[0])


@torch.library.custom_op("lorafusion::dys_dyb", mutates_args=("db", "ds"))
def dys_dyb(dy: T, b: T, s: T, db: T, ds: T, alpha: float) -> None:
    """Both gradients that read dy, added into fp32 sums."""
    db += alpha * (dy.T @ s)
    ds += alpha * (dy @ b)


@dys_dyb.register_fake
def _(dy: T, b: T, s: T, db: T, ds: T, alpha: float) -> None:
    return None


@torch.library.custom_op("lorafusion::dyw_dsa", mutates_args=())
def dyw_dsa(dy: T, w: T, ds: T, a: T, mask: T | None, p: float) -> T:
    """dy·W + dropout's gradient of ds·A."""
    second = ds @ a
    return dy @ w + (second if mask is None else torch.where(mask, second / (1 - p), 0.0))


@dyw_dsa.register_fake
def _(dy: T, w: T, ds: T, a: T, mask: T | None, p: float) -> T:
    return dy.new_empty(dy.shape[0], w.shape[1])


@register_flop_formula(torch.ops.lorafusion.xw_sb)
def _(x: Any, w: Any, s: Any, b: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * x[0] * x[1] * w[0] + 2 * s[0] * s[1] * b[0])


@register_flop_formula(torch.ops.lorafusion.dys_dyb)
def _(dy: Any, b: Any, s: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * dy[1] * dy[0] * s[1] + 2 * dy[0] * b[0] * b[1])


@register_flop_formula(torch.ops.lorafusion.dyw_dsa)
def _(dy: Any, w: Any, ds: Any, a: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * dy[0] * dy[1] * w[1] + 2 * ds[0] * ds[1] * a[1])


class FusedLinearLoRA(torch.autograd.Function):
    """Saves the dropped-out x, its mask and S."""

    @staticmethod
    def forward(ctx: Any, x: T, w: T, a: T, b: T, alpha: float, p: float, bias: T | None) -> T:
        batch, seq, _ = x.shape
        x = x.reshape(batch * seq, -1)
        mask, masked = None, x
        if p > 0:
            masked, mask = seeded_dropout(x, p)
        s = masked @ a.T
        y = xw_sb(x, w, s, b, bias, alpha)
        ctx.save_for_backward(masked, w, a, b, mask, s)
        ctx.alpha, ctx.p = alpha, p
        return y.reshape(batch, seq, -1)

    @staticmethod
    def backward(ctx: Any, dy: T) -> Any:
        masked, w, a, b, mask, s = ctx.saved_tensors
        batch, seq, _ = dy.shape
        dy = dy.reshape(batch * seq, -1)
        db, ds = (torch.zeros(x.shape, device=dy.device, dtype=torch.float32) for x in (b, s))
        dys_dyb(dy, b, s, db, ds, ctx.alpha)
        db, ds = db.to(dy.dtype), ds.to(dy.dtype)
        da = ds.T @ masked
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dyw_dsa(dy, w, ds, a, mask, ctx.p).reshape(batch, seq, -1)
        return dx, None, da, db, None, None, None


def lorafusion_forward(self: Any, x: T, *args: Any, **kwargs: Any) -> T:
    """In the place of peft's `lora.Linear.forward`."""
    dtype, a, b = x.dtype, self.lora_A["default"].weight, self.lora_B["default"].weight
    p = getattr(self.lora_dropout["default"], "p", 0.0)
    x, base = x.to(a.dtype), self.base_layer
    return FusedLinearLoRA.apply(x, base.weight, a, b, self.scaling["default"], p, base.bias).to(dtype)


# ---------------------------------------------------------------------------------------------------------- Unsloth


@torch.library.custom_op("unsloth::swiglu_fg", mutates_args=())
def swiglu_fg(e: T, g: T) -> T:
    """silu(e)·g."""
    return F.silu(e) * g


@swiglu_fg.register_fake
def _(e: T, g: T) -> T:
    return torch.empty_like(e)


@torch.library.custom_op("unsloth::swiglu_DWf_DW_dfg", mutates_args=("dw", "e", "g"))
def swiglu_backward(dw: T, e: T, g: T) -> None:
    """The hidden layer over dw, the gradient of the up projection over e, that of the gate over g."""
    sigmoid = torch.sigmoid(e)
    f = sigmoid * e
    h, df, de = f * g, dw * f, dw * g * sigmoid * (1 + e * (1 - sigmoid))
    for place, value in ((dw, h), (e, df), (g, de)):
        place.copy_(value)


@swiglu_backward.register_fake
def _(dw: T, e: T, g: T) -> None:
    return None


class Buffers(torch.nn.Module):
    """What 4-bit weights are unpacked into in forward passes, as large as the largest of a model."""

    def __init__(self, most: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(most, dtype=dtype, device=device), persistent=False)
        self.register_buffer("absmax", torch.empty(-(-most // 64), device=device), persistent=False)


LAST: list[Any] = []  # the buffers of the model that was patched last


def fast_dequantize(w: T, state: Any, *, buffered: bool = False) -> T:
    """A weight, unpacked if it is in 4 bit; packed values that are turned become a weight that is."""
    if state is None:
        return w
    second, code, offset = state.nested
    if buffered:
        out = LAST[-1].weight[: math.prod(state.shape)].view(state.shape)
        absmax = LAST[-1].absmax[: state.absmax.numel()]
    else:
        out = torch.empty(state.shape, dtype=state.dtype, device=w.device)
        absmax = torch.empty(state.absmax.numel(), dtype=torch.float32, device=w.device)
    unpack_maxima(code, state.absmax, second, absmax)
    absmax += offset
    unpack_values(w, absmax, out)
    return out.t() if w.shape[0] == 1 else out


def matmul_lora(x: T, w: T, state: Any, a: T, b: T, s: float) -> T:
    """x·Wᵀ + s·(x·Aᵀ)·Bᵀ."""
    dtype, shape = x.dtype, x.shape
    if x.dim() == 3:
        x = x.view(-1, shape[-1])
    out = torch.matmul(x, fast_dequantize(w, state, buffered=True).t())
    a, b = a.t(), b.t()
    xa = torch.matmul(x, a.to(dtype))
    out.addmm_(xa, b.to(dtype), alpha=s)
    return out.view(*shape[:-1], -1) if len(shape) == 3 else out


def adapter_gradients(x: T, dy: T, at: T, bt: T, s: float) -> tuple[T, T]:
    """Of A and B, from their transposes."""
    da, db = torch.empty_like(at), torch.empty_like(bt)
    da.addmm_(x.t(), dy @ bt.t(), alpha=s, beta=0)
    db.addmm_(at.t() @ x.t(), dy, alpha=s, beta=0)
    return da.t(), db.t()


def transposed(dtype: torch.dtype, *adapters: T) -> list[T]:
    """In the compute dtype."""
    cast = [w.to(dtype) for w in adapters]
    return [w.t() for w in cast]


class LoraW(torch.autograd.Function):
    """One projection."""

    @staticmethod
    def forward(ctx: Any, x: T, s: float, w: T, state: Any, a: T, b: T) -> T:
        y = matmul_lora(x, w, state, a, b, s)
        ctx.w, ctx.s = (w, state), s
        ctx.save_for_backward(a, b, x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: T) -> Any:
        a, b, x = ctx.saved_tensors
        (w, state), shape = ctx.w, x.shape
        dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        at, bt = transposed(x.dtype, a, b)
        da, db = adapter_gradients(x, dy, at, bt, ctx.s)
        dx = dy @ fast_dequantize(w.t(), state).t()
        dx.addmm_(dy @ bt.t(), at.t(), alpha=ctx.s)
        return dx.view(shape), None, None, None, da, db


class LoraQkv(torch.autograd.Function):
    """Three projections of one x."""

    @staticmethod
    def forward(ctx: Any, x: T, s: float, *weights: Any) -> Any:
        layers = [weights[i : i + 4] for i in (0, 4, 8)]
        rows = x.view(-1, x.shape[-1])
        outs = [matmul_lora(rows, *layer, s) for layer in layers]
        ctx.w, ctx.s = [layer[:2] for layer in layers], s
        ctx.save_for_backward(x, *(p for layer in layers for p in layer[2:]))
        return tuple(y.view(*x.shape[:2], -1) for y in outs)

    @staticmethod
    def backward(ctx: Any, *dys: T) -> Any:
        x, *adapters = ctx.saved_tensors
        shape, s = x.shape, ctx.s
        grads = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        x = x.view(-1, x.shape[-1])
        turned = [transposed(x.dtype, *adapters[i : i + 2]) for i in (0, 2, 4)]
        made = [adapter_gradients(x, dy, at, bt, s) for dy, (at, bt) in zip(grads, turned, strict=True)]
        for i, (dy, (at, bt), (w, state)) in enumerate(zip(grads, turned, ctx.w, strict=True)):
            whole = fast_dequantize(w.t(), state).t()
            if i:
                x.addmm_(dy, whole)
            else:
                torch.matmul(dy, whole, out=x)
            del whole
            x.addmm_(dy @ bt.t(), at.t(), alpha=s)
        return x.view(shape), None, *(grad for da, db in made for grad in (None, None, da, db))


class LoraMlp(torch.autograd.Function):
    """The SwiGLU MLP."""

    @staticmethod
    def forward(ctx: Any, x: T, s: float, *weights: Any) -> T:
        gate, up, down = (weights[i : i + 4] for i in (0, 4, 8))
        e, g = matmul_lora(x, *gate, s), matmul_lora(x, *up, s)
        h = swiglu_fg(e, g)
        out = matmul_lora(h, *down, s)
        ctx.w, ctx.s = (gate[:2], up[:2], down[:2]), s
        ctx.save_for_backward(*gate[2:], *up[2:], *down[2:], x, e, g)
        return out

    @staticmethod
    def backward(ctx: Any, dy: T) -> Any:
        *adapters, x, e, g = ctx.saved_tensors
        (gate_w, up_w, down_w), s, shape = ctx.w, ctx.s, x.shape
        dy, x, e, g = (y.reshape(-1, y.shape[-1]) for y in (dy, x, e, g))
        gate_a, gate_b, up_a, up_b, down_a, down_b = transposed(x.dtype, *adapters)
        dw = matmul_lora(dy, down_w[0].t(), down_w[1], down_b, down_a, s)
        swiglu_backward(dw, e, g)
        h, df, de = dw, e, g
        of_down = adapter_gradients(h, dy, down_a, down_b, s)
        of_up = adapter_gradients(x, df, up_a, up_b, s)
        of_gate = adapter_gradients(x, de, gate_a, gate_b, s)
        dx = torch.matmul(df, fast_dequantize(up_w[0].t(), up_w[1]).t(), out=x)
        dx.addmm_(df @ up_b.t(), up_a.t(), alpha=s)
        dx.addmm_(de, fast_dequantize(gate_w[0].t(), gate_w[1]).t())
        dx.addmm_(de @ gate_b.t(), gate_a.t(), alpha=s)
        return dx.view(shape), None, *(grad for da, db in (of_gate, of_up, of_down) for grad in (None, None, da, db))


def parameters(layer: Any) -> tuple[T, Any, T, T]:
    """W, how it is packed, A and B of peft's layer."""
    base, a, b = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return base.weight, getattr(base, "quant_state", None), a, b


def fusable(*layers: Any) -> bool:
    """`patch_peft_model`'s condition: adapters on all, no bias, no dropout."""
    return all(
        hasattr(layer, "lora_A")
        and layer.base_layer.bias is None
        and isinstance(layer.lora_dropout["default"], torch.nn.Identity)
        for layer in layers
    )


class Once:
    """Three projections that transformers calls one after another, computed at the first call."""

    def __init__(self, layers: Any) -> None:
        self.layers, self.results = layers, []

    def __call__(self, x: T) -> T:
        if not self.results:
            weights = [p for layer in self.layers for p in parameters(layer)]
            self.results = list(LoraQkv.apply(x, self.layers[0].scaling["default"], *weights))
        return self.results.pop(0)


def mlp_forward(self: Any, x: T) -> T:
    """In the place of LlamaMLP's."""
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    return LoraMlp.apply(x, layers[0].scaling["default"], *(p for layer in layers for p in parameters(layer)))


def linear_forward(self: Any, x: T, *args: Any, **kwargs: Any) -> T:
    """In the place of o_proj's."""
    return LoraW.apply(x, self.scaling["default"], *parameters(self))


def make_buffers(model: Any) -> None:
    """Buffers for the largest 4-bit weight, in the model; none where all are whole."""
    states = [s for m in model.modules() if (s := getattr(m, "quant_state", None)) is not None]
    if states:
        most = max(math.prod(s.shape) for s in states)
        LAST[:] = [Buffers(most, states[0].dtype, states[0].absmax.device)]
        model.unpacked = LAST[-1]


def patch(model: Any, implementation: str) -> Any:
    """A peft model with the implementation's forward passes."""
    make_buffers(model)
    for module in list(model.modules()):
        if implementation == "lorafusion":
            if isinstance(module, LoraLinear):
                module.forward = MethodType(lorafusion_forward, module)
            continue
        if hasattr(module, "q_proj") and fusable(module.q_proj, module.k_proj, module.v_proj):
            once = Once([module.q_proj, module.k_proj, module.v_proj])
            for layer in once.layers:
                layer.forward = lambda x, once=once: once(x)
        if hasattr(module, "o_proj") and fusable(module.o_proj):
            module.o_proj.forward = MethodType(linear_forward, module.o_proj)
        if hasattr(module, "gate_proj") and fusable(module.gate_proj, module.up_proj, module.down_proj):
            module.forward = MethodType(mlp_forward, module)
    return model
