"""Liger's patch of Llama-like models: its modules around stand-ins of its Triton kernels.

The stand-ins are custom ops that take, allocate and overwrite what the kernels do and compute the same in plain torch.
Written from Liger-Kernel 0.6, 0.7 and 0.8.5 (ops/, transformers/model/llama.py), not from the tape.
"""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from perfmodel.tracing.cuda_products import add_product

T = torch.Tensor
SM_COUNT = 132
LIGER = (0, 8, 5)  # the release that runs; `patched` sets another


def rms(x: T) -> T:
    """1 / root mean square of the rows."""
    return torch.rsqrt(x.float().pow(2).mean(-1) + 1e-6)


@torch.library.custom_op("liger::rms_norm", mutates_args=())
def rms_norm(x: T, weight: T, offset: float) -> tuple[T, T]:
    """Normed rows and their 1/rms, with Llama's casts, or with Gemma's where there is an offset."""
    rstd = rms(x)
    normed = x.float() * rstd[:, None]
    return ((normed * (offset + weight.float())).to(x.dtype) if offset else normed.to(x.dtype) * weight), rstd


@rms_norm.register_fake
def _(x: T, weight: T, offset: float) -> tuple[T, T]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.library.custom_op("liger::rms_norm_backward", mutates_args=("dy",))
def rms_norm_backward(dy: T, x: T, weight: T, rstd: T, wanted: bool) -> list[T]:
    """dX over dY; the weight's gradient in a part for every program, if it is wanted."""
    g, normed = (dy * weight).float(), x.float() * rstd[:, None]
    partial = torch.zeros(SM_COUNT, x.shape[-1])
    partial[0] = (dy.float() * normed).sum(0)
    dy.copy_(rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True)))
    return [partial] if wanted else []


@rms_norm_backward.register_fake
def _(dy: T, x: T, weight: T, rstd: T, wanted: bool) -> list[T]:
    return [x.new_empty(SM_COUNT, x.shape[-1], dtype=torch.float32)] if wanted else []


@torch.library.custom_op("liger::rms_norm_backward_apart", mutates_args=("dx",))
def rms_norm_backward_apart(dy: T, x: T, weight: T, rstd: T, dx: T, wanted: bool) -> list[T]:
    """dX into a tensor of its own."""
    normed = x.float() * rstd[:, None]
    g = dy.float() * (1.0 + weight.float())
    partial = torch.zeros(SM_COUNT, x.shape[-1])
    partial[0] = (dy.float() * normed).sum(0)
    dx.copy_(rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True)))
    return [partial] if wanted else []


@rms_norm_backward_apart.register_fake
def _(dy: T, x: T, weight: T, rstd: T, dx: T, wanted: bool) -> list[T]:
    return [x.new_empty(SM_COUNT, x.shape[-1], dtype=torch.float32)] if wanted else []


class RMSNorm(torch.autograd.Function):
    """Saves X, W and 1/rms; `offset` is added to W, and Gemma's dX is apart from dY."""

    @staticmethod
    def forward(ctx: Any, x: T, weight: T, offset: float = 0.0) -> T:
        shape = x.shape
        x = x.contiguous().view(-1, shape[-1])
        y, rstd = rms_norm(x, weight, offset)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y.view(shape)

    @staticmethod
    def backward(ctx: Any, dy: T) -> Any:
        x, weight, rstd = ctx.saved_tensors
        shape = dy.shape
        dy = dy.contiguous().view(-1, shape[-1])
        wanted = ctx.needs_input_grad[1] or LIGER < (0, 8, 5)
        if ctx.offset:
            dx = torch.zeros_like(dy)
            partial = rms_norm_backward_apart(dy, x, weight, rstd, dx, wanted)
        else:
            dx, partial = dy, rms_norm_backward(dy, x, weight, rstd, wanted)
        return dx.view(shape), partial[0].sum(dim=0).to(weight.dtype) if wanted else None, None


class LigerRMSNorm(nn.Module):
    """In the place of LlamaRMSNorm, or of Gemma 2's and 3's."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight = original.weight
        self.offset = 1.0 if type(original).__name__.startswith("Gemma") else 0.0

    def forward(self, x: T) -> T:
        return RMSNorm.apply(x, self.weight, self.offset)


def rotate(q: T, k: T, cos: T, sin: T, sign: int) -> None:
    """Rotate (batch, seq, heads, head_dim) in place."""
    for x in (q, k):
        first, second = x.clone().chunk(2, -1)
        c, s = (table[..., : x.shape[-1] // 2].unsqueeze(2) for table in (cos, sign * sin))
        x.copy_(torch.cat((first * c - second * s, second * c + first * s), -1))


@torch.library.custom_op("liger::rope", mutates_args=("q", "k"))
def rope(q: T, k: T, cos: T, sin: T) -> None:
    """Forward."""
    rotate(q, k, cos, sin, 1)


@torch.library.custom_op("liger::rope_backward", mutates_args=("q", "k"))
def rope_backward(q: T, k: T, cos: T, sin: T) -> None:
    """The inverse rotation."""
    rotate(q, k, cos, sin, -1)


@rope.register_fake
def _(q: T, k: T, cos: T, sin: T) -> None:
    return None


@rope_backward.register_fake
def _(q: T, k: T, cos: T, sin: T) -> None:
    return None


class Rope(torch.autograd.Function):
    """In place on the projections' outputs and on the gradients."""

    @staticmethod
    def forward(ctx: Any, q: T, k: T, cos: T, sin: T) -> tuple[T, T]:
        q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        rope(q, k, cos, sin)
        ctx.save_for_backward(cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, dq: T, dk: T) -> Any:
        cos, sin = ctx.saved_tensors
        dq, dk = dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous()
        rope_backward(dq, dk, cos, sin)
        return dq.transpose(1, 2), dk.transpose(1, 2), None, None


def gelu(x: T) -> T:
    """Its tanh form."""
    return F.gelu(x, approximate="tanh")


@torch.library.custom_op("liger::geglu", mutates_args=())
def geglu(a: T, b: T) -> T:
    """gelu(a)·b."""
    return gelu(a) * b


@torch.library.custom_op("liger::geglu_backward", mutates_args=("a", "b"))
def geglu_backward(dc: T, a: T, b: T) -> None:
    """Gradients over the inputs."""
    root, cube = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(root * (a + cube * a**3))
    slope = 0.5 * (1 + tanh) + 0.5 * a * (1 - tanh**2) * root * (1 + 3 * cube * a**2)
    da, db = dc * b * slope, dc * gelu(a)
    a.copy_(da)
    b.copy_(db)


@geglu.register_fake
def _(a: T, b: T) -> T:
    return torch.empty_like(a)


@geglu_backward.register_fake
def _(dc: T, a: T, b: T) -> None:
    return None


@torch.library.custom_op("liger::swiglu", mutates_args=())
def swiglu(a: T, b: T) -> T:
    """silu(a)·b."""
    return F.silu(a) * b


@torch.library.custom_op("liger::swiglu_backward", mutates_args=("a", "b"))
def swiglu_backward(dc: T, a: T, b: T) -> None:
    """Gradients over the inputs."""
    sigmoid = torch.sigmoid(a)
    da, db = dc * b * sigmoid * (1 + a * (1 - sigmoid)), dc * a * sigmoid
    a.copy_(da)
    b.copy_(db)


@swiglu.register_fake
def _(a: T, b: T) -> T:
    return torch.empty_like(a)


@swiglu_backward.register_fake
def _(dc: T, a: T, b: T) -> None:
    return None


class SiLUMul(torch.autograd.Function):
    """Saves both inputs."""

    kernels = swiglu, swiglu_backward

    @classmethod
    def forward(cls, ctx: Any, a: T, b: T) -> T:
        shape = a.shape
        a, b = (x.contiguous().view(-1, shape[-1]) for x in (a, b))
        c = cls.kernels[0](a, b)
        ctx.save_for_backward(a, b)
        return c.view(shape)

    @classmethod
    def backward(cls, ctx: Any, dc: T) -> Any:
        a, b = ctx.saved_tensors
        cls.kernels[1](dc.contiguous().view(-1, dc.shape[-1]), a, b)
        return a.view(dc.shape), b.view(dc.shape)


class GELUMul(SiLUMul):
    """The same with GELU."""

    kernels = geglu, geglu_backward


@torch.library.custom_op("liger::cross_entropy", mutates_args=("logits", "loss"))
def cross_entropy(logits: T, target: T, loss: T, n: int) -> None:
    """Losses of the rows, and the gradient over the logits."""
    loss.copy_(F.cross_entropy(logits.float(), target, reduction="none") / n)
    gradient = torch.softmax(logits.float(), -1)
    gradient[torch.arange(len(target)), target] -= 1
    logits.copy_(gradient / n)


@torch.library.custom_op("liger::element_mul", mutates_args=("x",))
def element_mul(x: T, factor: T) -> None:
    """x *= factor."""
    x.mul_(factor)


@cross_entropy.register_fake
def _(logits: T, target: T, loss: T, n: int) -> None:
    return None


@element_mul.register_fake
def _(x: T, factor: T) -> None:
    return None


def power_of_two(x: int) -> int:
    """The next power of two."""
    return 1 << (x - 1).bit_length()


class FusedLinearCrossEntropy(torch.autograd.Function):
    """Loss and all gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x: T, weight: T, target: T) -> T:
        tokens, width = x.shape
        factor = -(-weight.shape[0] // width)
        size = power_of_two(-(-tokens // factor))
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None
        grad_input = torch.zeros_like(x)
        loss_1d = torch.zeros(tokens, dtype=torch.float32, device=x.device)
        n = (target != -100).sum().item()
        casts = torch.is_autocast_enabled("cpu") and x.dtype != torch.get_autocast_dtype("cpu")
        out = LIGER >= (0, 8, 3) and x.dtype == weight.dtype and not casts
        room = torch.empty((min(size, tokens), weight.shape[0]), dtype=x.dtype, device=x.device) if out else None
        for start in range(0, tokens, size):
            end = min(start + size, tokens)
            x_chunk = x[start:end]
            if room is not None:
                logits_chunk = room[: end - start]
                torch.mm(x_chunk, weight.t(), out=logits_chunk)
            else:
                logits_chunk = x_chunk @ weight.t()
            loss_slice = loss_1d[start:end]
            cross_entropy(logits_chunk, target[start:end], loss_slice, n)
            loss_1d[start:end] = loss_slice
            grad_logits = logits_chunk
            if room is not None:
                torch.mm(grad_logits, weight, out=grad_input[start:end])
            else:
                grad_input[start:end] = grad_logits @ weight
            if grad_weight is not None:
                FusedLinearCrossEntropy.add(grad_weight, grad_logits, x_chunk)
        del room
        ctx.save_for_backward(grad_input.detach(), grad_weight.detach() if grad_weight is not None else None)
        return torch.sum(loss_1d)

    @staticmethod
    def add(grad_weight: T, grad_logits: T, x: T) -> None:
        """The branches of the loop's end, on a GPU."""
        half = grad_logits.dtype in (torch.bfloat16, torch.float16)
        if LIGER < (0, 6, 2):
            torch.addmm(grad_weight, grad_logits.t().to(x.dtype), x, out=grad_weight)
        elif LIGER >= (0, 8, 1) and half and grad_weight.dtype == torch.float32:
            add_product(grad_weight, grad_logits.t(), x.to(grad_logits.dtype))
        elif LIGER >= (0, 8, 3) and half and grad_weight.dtype == grad_logits.dtype:
            torch.addmm(grad_weight, grad_logits.t(), x.to(grad_logits.dtype), out=grad_weight)
        else:
            grad_weight += torch.mm(grad_logits.t(), x).float()

    @staticmethod
    def backward(ctx: Any, grad_output: T) -> Any:
        grad_input, grad_weight = ctx.saved_tensors
        last = (grad_output == 1.0).all().item()  # what `torch.equal` does on CUDA
        if not last or getattr(FusedLinearCrossEntropy, "scaled", False):  # a fake tensor cannot tell
            element_mul(grad_input, grad_output)
            if grad_weight is not None:
                element_mul(grad_weight, grad_output)
        return grad_input, grad_weight, None


def lce_forward(self: Any, input_ids: T, attention_mask: T, labels: T) -> CausalLMOutput:
    """The causal model's forward in training: no logits."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
    labels = F.pad(labels, (0, 1), value=-100)
    target = labels[..., 1:].contiguous().view(-1)
    hidden = hidden.view(-1, self.config.hidden_size)
    return CausalLMOutput(loss=FusedLinearCrossEntropy.apply(hidden, self.lm_head.weight, target))


def mlp_forward(self: Any, x: T) -> T:
    """`LigerSwiGLUMLP` and `LigerGEGLUMLP`."""
    gated = GELUMul if type(self).__name__.startswith("Gemma") else SiLUMul
    return self.down_proj(gated.apply(self.gate_proj(x), self.up_proj(x)))


def patch(model: Any) -> Any:
    """Liger's norms, MLP and loss in a transformers model; rotary positions are patched by `patched`."""
    for path, module in list(model.named_modules()):
        parent, _, leaf = path.rpartition(".")
        if type(module).__name__.endswith("RMSNorm"):
            setattr(model.get_submodule(parent), leaf, LigerRMSNorm(module))
        elif type(module).__name__.endswith("MLP"):
            module.forward = MethodType(mlp_forward, module)
    model.forward = MethodType(lce_forward, model)
    return model


@contextmanager
def patched(model_type: str, *, scaled: bool, on: bool = True, release: tuple[int, int, int] = LIGER) -> Iterator[None]:
    """Rotary positions of Liger in transformers' modeling file; `scaled`: the loss is divided before backward."""
    if not on:
        yield
        return
    folder = model_type.removesuffix("_text")
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    with (
        mock.patch.object(modeling, "apply_rotary_pos_emb", Rope.apply),
        mock.patch.object(FusedLinearCrossEntropy, "scaled", scaled, create=True),
        mock.patch.dict(globals(), LIGER=release),
    ):
        yield
