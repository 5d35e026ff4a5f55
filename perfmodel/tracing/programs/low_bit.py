"""bitsandbytes' linear layers in 4 and 8 bit as it computes them, without the package, and peft's LoRA on such bases.

Its kernels are stand-ins: custom ops that take and allocate what the real ones do and compute the same, slowly, in
plain torch. The Python code around them is written from the package's public sources (bitsandbytes/nn/modules.py,
autograd/_functions.py, functional.py), not from the tape. Which columns are outliers of LLM.int8() is given.
"""

import importlib.util
import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import peft.import_utils
import peft.tuners.lora as peft_lora
import torch
from peft.tuners.lora.gptq import GPTQLoraLinear
from torch import nn
from torch.utils.flop_counter import register_flop_formula
from transformers.pytorch_utils import Conv1D

from ...architectures import Architecture
from ...methods.lora_8bit import Lora8bit
from ...methods.lora_gptq import LoraGptq
from ...methods.parts.quantised import QuantisedLora, adapted_experts
from ...methods.parts.targeted import ALL_LINEAR
from ...methods.qlora import QLora
from ...setup import Setup
from .dtypes import TORCH_DTYPES
from .experts import quantise_experts
from .gptq import GptqLinear
from .models import lora
from .references import as_lora

NF4 = torch.linspace(-1, 1, 16)  # stands for the quantiles of a normal distribution: the values change no call
THRESHOLD = 6.0  # transformers' `llm_int8_threshold`
ROUTER = "gate.weight"  # as PEFT calls a weight that is never packed
CLAMPED = ("prediction_coefs", "correction_coefs")  # Gemma 3n clamps their weights, which fails on packed ones


@torch.library.custom_op("bitsandbytes::dequantize_blockwise", mutates_args=())
def dequantize_blockwise(a: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """8-bit values by a table, every 256 with a maximum of their own."""
    return code[a.long()] * absmax.repeat_interleave(256)[: a.numel()]


@dequantize_blockwise.register_fake
def _(a: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(a, dtype=torch.float32)


@torch.library.custom_op("bitsandbytes::dequantize_4bit", mutates_args=())
def dequantize_4bit(a: torch.Tensor, absmax: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Two values a byte, every 64 with a maximum."""
    a = a.flatten().view(torch.uint8)
    halves = torch.stack((a >> 4, a & 15), 1).flatten()
    values = NF4[halves.long()][: shape[0] * shape[1]]
    return (values * absmax.repeat_interleave(64)[: values.numel()]).view(shape).to(dtype)


@dequantize_4bit.register_fake
def _(a: torch.Tensor, absmax: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=a.device)


@dataclass
class QuantState:
    """The scales of a 4-bit weight."""

    absmax: Any
    nested: tuple[Any, Any, Any] | None
    shape: tuple[int, int]
    dtype: torch.dtype


def dequantized(b: Any, state: QuantState) -> Any:
    """`bitsandbytes.functional.dequantize_4bit`."""
    absmax = state.absmax
    if state.nested is not None:
        second, code, offset = state.nested
        absmax = dequantize_blockwise(state.absmax, second, code)
        absmax += offset
    out = dequantize_4bit(b, absmax, list(state.shape), state.dtype)
    return out.t() if b.shape[0] == 1 else out


class MatMul4Bit(torch.autograd.Function):
    """Forward and input gradient by a dequantised weight; only the packed weight is kept."""

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, bias: Any, state: QuantState) -> Any:
        ctx.state, ctx.b = state, b
        return nn.functional.linear(a, dequantized(b, state).to(a.dtype).t(), bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        weight = dequantized(ctx.b, ctx.state).to(grad_output.dtype).t()
        return torch.matmul(grad_output, weight), None, None, None


class Params4bit(nn.Parameter):
    """The packed weight; peft goes by the name of its class."""


class Linear4bit(nn.Module):
    """`bitsandbytes.nn.Linear4bit` after it has been quantised."""

    def __init__(
        self, base: Any, compute_dtype: torch.dtype, *, double_quant: bool, storage: torch.dtype = torch.uint8
    ) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.in_features, self.out_features = (rows, columns) if isinstance(base, Conv1D) else (columns, rows)
        size, blocks = rows * columns, -(-rows * columns // 64)
        empty = partial(torch.empty, device=base.weight.device)
        packed = empty((size + 1) // (2 * storage.itemsize), 1, dtype=storage)
        self.weight = Params4bit(packed, requires_grad=False)
        self.bias = base.bias
        self.compute_dtype, self.dtype = compute_dtype, base.weight.dtype
        self.stands_for = {"weight": size, "absmax": 0}  # parameters of the model; scales are none
        self.absmax = nn.Parameter(empty(blocks, dtype=torch.uint8 if double_quant else torch.float32), False)
        self.double_quant = double_quant
        if double_quant:
            self.nested_absmax = nn.Parameter(empty(-(-blocks // 256)), False)
            self.nested_quant_map = nn.Parameter(empty(256), False)
            self.offset = nn.Parameter(empty(()), False)
            self.stands_for |= {"nested_absmax": 0, "nested_quant_map": 0, "offset": 0}

    @property
    def quant_state(self) -> QuantState:
        """As bitsandbytes hangs it on the weight; here parameters, so that a trace finds them."""
        nested = (self.nested_absmax, self.nested_quant_map, self.offset) if self.double_quant else None
        return QuantState(self.absmax, nested, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Any) -> Any:
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        dtype = x.dtype
        x = x.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return MatMul4Bit.apply(x, self.weight.t(), bias, self.quant_state).to(dtype)  # type: ignore[no-untyped-call]


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
    return int(2 * a[0] * a[1] * b[0])


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
        a = a.reshape(-1, a.shape[-1]) if a.ndim > 2 else a  # of four dimensions, too, which bitsandbytes refuses
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
        grad = grad.reshape(-1, grad.shape[-1]).contiguous() if grad.ndim > 2 else grad
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
        self.stands_for = {"weight": rows * columns, "SCB": 0}

    def forward(self, x: Any) -> Any:
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        return MatMul8bitLt.apply(x, self, self.bias)  # type: ignore[no-untyped-call]


@cache
def peft_layer(kind: type) -> Any:
    """peft's own LoRA layer for a quantised one; bitsandbytes' is loaded with stand-ins of the package."""
    if kind is GptqLinear:
        return GPTQLoraLinear
    stub = ModuleType("bitsandbytes")
    stub.nn = ModuleType("bitsandbytes.nn")  # type: ignore[attr-defined]
    setattr(stub.nn, kind.__name__, kind)
    source = Path(peft_lora.__file__).with_name("bnb.py")
    spec = importlib.util.spec_from_file_location(f"{peft_lora.__name__}.bnb_with_stand_ins", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.dict(sys.modules, {"bitsandbytes": stub}),
        mock.patch.object(peft.import_utils, "is_bnb_available", return_value=True),
        mock.patch.object(peft.import_utils, "is_bnb_4bit_available", return_value=True),
    ):
        spec.loader.exec_module(module)
    return getattr(module, kind.__name__)


def quantised(base: Any, method: QuantisedLora, setup: Setup) -> Any:
    """A linear layer in the form that a method wants its base in."""
    if isinstance(method, QLora):
        compute, storage = TORCH_DTYPES[method.compute_dtype or setup.dtype], TORCH_DTYPES[method.quant_storage]
        return Linear4bit(base, compute, double_quant=method.double_quant, storage=storage)
    if isinstance(method, LoraGptq):
        return GptqLinear(base, method.bits, method.group_size)
    assert isinstance(method, Lora8bit)
    return Linear8bitLt(base, method.outliers)


def apply_low_bit(model: Any, method: QuantisedLora, architecture: Architecture, setup: Setup) -> Any:
    """The model with quantised layers in the place of all linear ones but the head, and peft's LoRA on the targets."""

    head = model.get_output_embeddings()
    # a subclass computes something else (`replace_with_bnb_linear` of transformers)
    plain = (n for n, m in model.named_modules() if (type(m) is nn.Linear or isinstance(m, Conv1D)) and m is not head)
    found = [name for name in plain if name.rpartition(".")[2] not in CLAMPED]
    for name in found:
        model.set_submodule(name, quantised(model.get_submodule(name), method, setup))
    model.config._is_quantized = True  # as transformers' quantisers say: Mamba's code asks (`_assign_is_quantized`)
    if method.experts:
        bits = 4 if isinstance(method, QLora) else 8
        quantise_experts(model, bits=bits, double_quant=getattr(method, "double_quant", True))
    if method.prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = tuple(found) if method.target_names == (ALL_LINEAR,) else method.targets
    layers = {kind: peft_layer(kind) for kind in (Linear4bit, Linear8bitLt, GptqLinear)}
    adapted = lora(model, as_lora(method, targets=targets), architecture, layers=layers)
    asked = adapted.active_peft_config.target_parameters  # of names of layers too; PEFT finds no packed ones
    if method.experts and set(asked or ()) - {ROUTER}:
        raise adapted_experts(method.name)
    return adapted
