"""Reference programs of fused implementations that are not installed here (bitsandbytes, Unsloth, LoRAFusion, Liger).

Their kernels are stand-ins: custom ops that take and allocate what the real ones do and compute the same, slowly, in
plain torch. The Python code around them is written from the packages' public sources, not from the tape.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import peft.import_utils
import peft.tuners.lora as peft_lora
import torch
from reference import wrap
from torch import nn
from transformers.pytorch_utils import Conv1D

from perfmodel.architectures import Architecture
from perfmodel.methods.lora import Lora
from perfmodel.methods.qlora import QLora
from perfmodel.setup import Setup
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES

# ---------------------------------------------------------------------------------------------- bitsandbytes, QLoRA

NF4 = torch.linspace(-1, 1, 16)  # stands for the quantiles of a normal distribution: the values change no call


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
    halves = torch.stack((a.flatten() >> 4, a.flatten() & 15), 1).flatten()
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

    def __init__(self, base: Any, compute_dtype: torch.dtype, *, double_quant: bool) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.in_features, self.out_features = (rows, columns) if isinstance(base, Conv1D) else (columns, rows)
        size, blocks = rows * columns, -(-rows * columns // 64)
        empty = partial(torch.empty, device=base.weight.device)
        self.weight = Params4bit(empty((size + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = base.bias
        self.compute_dtype, self.dtype = compute_dtype, base.weight.dtype
        self.absmax = nn.Parameter(empty(blocks, dtype=torch.uint8 if double_quant else torch.float32), False)
        self.double_quant = double_quant
        if double_quant:
            self.nested_absmax = nn.Parameter(empty(-(-blocks // 256)), False)
            self.nested_quant_map = nn.Parameter(empty(256), False)
            self.offset = nn.Parameter(empty(()), False)

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
        return MatMul4Bit.apply(x, self.weight.t(), bias, self.quant_state).to(dtype)


@cache
def peft_layer(kind: type) -> Any:
    """peft's own LoRA layer for a layer of `bitsandbytes.nn`: its module, loaded with stand-ins of bitsandbytes."""
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


def quantise(model: Any, method: QLora, architecture: Architecture, setup: Setup) -> Any:
    """The model with 4-bit linears, prepared if the method says so, and peft's LoRA on the targets."""
    compute = TORCH_DTYPES[method.compute_dtype or setup.dtype]

    def make(base: Any) -> Any:
        return Linear4bit(base, compute, double_quant=method.double_quant)

    model = wrap(model, architecture, lambda name, layer: name != "lm_head", make)
    if method.prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return replace(model, Linear4bit, architecture, method, adapted(peft_layer(Linear4bit), method))


def adapted(layer: Any, method: Lora) -> Callable[[Any], Any]:
    """Makes peft's LoRA layer of a quantised one."""
    config = peft.LoraConfig(r=method.r, lora_alpha=method.alpha, lora_dropout=method.dropout)

    def make(base: Any) -> Any:
        made = layer(base, "default", config=config, r=method.r, lora_alpha=method.alpha)
        made.train()
        for parameter in (p for name, p in made.named_parameters() if "lora_" in name):
            parameter.data = parameter.data.to(TORCH_DTYPES[method.adapter_dtype or "fp32"])
        return made

    return make


def replace(model: Any, kind: type, architecture: Architecture, method: Any, make: Any) -> Any:
    """Put `make(module)` in the place of the targeted modules of a kind."""
    prefix = architecture.layer_path + "."
    for path, module in list(model.named_modules()):
        inside = path.startswith(prefix)
        number, _, name = path.removeprefix(prefix).partition(".") if inside else ("", "", path)
        if isinstance(module, kind) and method.targets_layer(name, int(number) if inside else None):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


def elements(model: Any) -> int:
    """Parameters of the model: a packed weight holds two a byte, scales are none."""
    scales = {"absmax", "nested_absmax", "nested_quant_map", "offset", "SCB"}
    return sum(
        p.numel() * (2 if isinstance(p, Params4bit) else 1)
        for name, p in model.named_parameters()
        if name.rpartition(".")[2] not in scales
    )
