"""bitsandbytes' 8-bit linear layers, LLM.int8(), with stand-ins of its kernels; which columns are outliers is given."""

from typing import Any

import peft
import torch
from reference import wrap
from reference_fused import adapted, peft_layer, replace
from torch import nn
from torch.utils.flop_counter import register_flop_formula
from transformers.pytorch_utils import Conv1D

from perfmodel.architectures import Architecture
from perfmodel.methods.lora_8bit import Lora8bit

THRESHOLD = 6.0  # transformers' `llm_int8_threshold`


@torch.library.custom_op("bitsandbytes::outlier_columns", mutates_args=())
def outlier_columns(held: torch.Tensor, count: int) -> torch.Tensor:
    """Stands for `torch.argwhere`, whose result's size is data."""
    return torch.arange(count, device=held.device)[:, None]


@outlier_columns.register_fake
def _(held: torch.Tensor, count: int) -> torch.Tensor:
    return held.new_empty((count, 1), dtype=torch.int64)


@torch.library.custom_op("bitsandbytes::int8_vector_quant", mutates_args=())
def int8_vector_quant(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the rows, and the largest value of each."""
    largest = a.abs().amax(-1).float()
    return torch.round(a.float() / largest[:, None] * 127).to(torch.int8), largest


@int8_vector_quant.register_fake
def _(a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(a, dtype=torch.int8), a.new_empty(a.shape[0], dtype=torch.float32)


@torch.library.custom_op("bitsandbytes::int8_linear_matmul", mutates_args=())
def int8_linear_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a·bᵀ in integers."""
    return a.int() @ b.int().t()


@int8_linear_matmul.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32)


@register_flop_formula(torch.ops.bitsandbytes.int8_linear_matmul)
def _(a: Any, b: Any, *rest: Any, **options: Any) -> int:
    """PyTorch counts no product of integers by itself."""
    return 2 * a[0] * a[1] * b[0]


@torch.library.custom_op("bitsandbytes::int8_mm_dequant", mutates_args=())
def int8_mm_dequant(
    a: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Sums times both scales, in fp16."""
    out = (a * (rows[:, None] * columns) / 127**2).half()
    return out if bias is None else out + bias


@int8_mm_dequant.register_fake
def _(a: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.empty_like(a, dtype=torch.float16)


class MatMul8bitLt(torch.autograd.Function):
    """Integers forward, but for outliers; a dequantised weight for the input's gradient."""

    @staticmethod
    def forward(ctx: Any, a: Any, layer: "Linear8bitLt", bias: Any) -> Any:
        ctx.grad_shape, ctx.dtype, ctx.layer = a.shape, a.dtype, layer
        a = a.reshape(-1, a.shape[-1]) if a.ndim == 3 else a
        ctx.tensors = a if ctx.needs_input_grad[0] else None
        half = a.to(torch.float16)
        outliers = half.abs() >= THRESHOLD
        bool(outliers.any())
        columns = outlier_columns(outliers.any(dim=0), layer.outliers).view(-1) if layer.outliers else None
        codes, rows = int8_vector_quant(half)
        del half, outliers
        if columns is not None:
            codes[:, columns] = 0
            sub_b = layer.weight[:, columns].contiguous() * layer.SCB.view(-1, 1) * (1 / 127)
            sub_b = sub_b.to(a.dtype).t()
            sub_a = a[:, columns].contiguous()
        sums = int8_linear_matmul(codes, layer.weight)
        fused = bias is not None and bias.dtype == torch.float16
        out = int8_mm_dequant(sums, rows, layer.SCB, bias if fused else None)
        del sums
        if bias is not None and not fused:
            out.add_(bias)
        out = out.to(a.dtype)
        if columns is not None:
            out = out.addmm(sub_a, sub_b)
        return out.reshape(*ctx.grad_shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        grad = grad.reshape(-1, grad.shape[-1]).contiguous() if grad.ndim == 3 else grad
        layer = ctx.layer
        weight = layer.weight.to(ctx.dtype, copy=True).mul_(layer.SCB.unsqueeze(1).mul(1.0 / 127.0))
        return torch.matmul(grad.to(ctx.dtype), weight).view(ctx.grad_shape), None, None


class Linear8bitLt(nn.Module):
    """`bitsandbytes.nn.Linear8bitLt` after it has been quantised."""

    def __init__(self, base: Any, outliers: int) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.in_features, self.out_features = (rows, columns) if isinstance(base, Conv1D) else (columns, rows)
        device = base.weight.device
        shape = (self.out_features, self.in_features)
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.int8, device=device), requires_grad=False)
        self.SCB = nn.Parameter(torch.ones(self.out_features, device=device), requires_grad=False)
        self.bias, self.outliers = base.bias, min(outliers, self.in_features)

    def forward(self, x: Any) -> Any:
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        return MatMul8bitLt.apply(x, self, self.bias)


def quantise(model: Any, method: Lora8bit, architecture: Architecture) -> Any:
    """The model with 8-bit linears, prepared if the method says so, and peft's LoRA on the targets."""
    model = wrap(
        model, architecture, lambda name, layer: name != "lm_head", lambda base: Linear8bitLt(base, method.outliers)
    )
    if method.prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return replace(model, Linear8bitLt, architecture, method, adapted(peft_layer(Linear8bitLt), method))
