"""Reference programs in plain torch for methods that peft does not have, around the linear layers of transformers.

Each is written from its paper and its authors' description, not from the tape, so that the two can disagree.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...architectures import Architecture
from ...architectures.stacks import block_of
from ...errors import UserError
from ...methods import Method, runlora
from ...methods.lisa import Lisa
from ...methods.lora import Lora
from ...methods.lora_8bit import Lora8bit
from ...methods.lora_fa import LoraFa
from ...methods.paca import Paca
from ...methods.parts.quantised import QuantisedLora
from ...methods.qlora import QLora
from ...setup import Setup
from . import models, updates
from .dtypes import TORCH_DTYPES


class PartialLinear(torch.autograd.Function):
    """y = x·Wᵀ + b; keeps only the trained inputs of x."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Any, weight: Any, columns: Any, bias: Any, indices: Any, base: Any) -> Any:
        ctx.save_for_backward(x[..., indices], weight)
        ctx.shape, ctx.is_conv1d = x.shape, isinstance(base, Conv1D)
        return base(x)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_output: Any) -> Any:
        kept, weight = ctx.saved_tensors
        g = grad_output.reshape(-1, grad_output.shape[-1])
        kept = kept.reshape(-1, kept.shape[-1])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = g.mm(weight.t() if ctx.is_conv1d else weight).view(ctx.shape)
        grad_columns = kept.t().mm(g) if ctx.is_conv1d else g.t().mm(kept)
        return grad_x, None, grad_columns, None, None, None


class PacaLinear(nn.Module):
    """A linear layer of which r input columns train."""

    def __init__(self, base: Any, method: Paca) -> None:
        super().__init__()
        self.base = base
        n_in, n_out = sizes(base)
        self.is_conv1d = isinstance(base, Conv1D)
        shape = (method.r, n_out) if self.is_conv1d else (n_out, method.r)
        device = base.weight.device
        dtype = TORCH_DTYPES[method.adapter_dtype] if method.adapter_dtype else base.weight.dtype
        self.paca_w = nn.Parameter(torch.randn(shape, dtype=dtype, device=device) / 100)
        self.scaling = method.alpha / method.r
        self.register_buffer("indices", torch.randperm(n_in, device=device)[: method.r])

    def forward(self, x: Any) -> Any:
        base = self.base
        with torch.no_grad():
            columns = self.scaling * self.paca_w.to(base.weight.dtype)
            if self.is_conv1d:
                base.weight.data[self.indices] = columns
            else:
                base.weight.data[:, self.indices] = columns
        columns = self.paca_w * self.scaling
        return PartialLinear.apply(x, base.weight, columns, base.bias, self.indices, base)  # type: ignore[no-untyped-call]


class RunLoraModule(torch.autograd.Function):
    """Y = b + X·W + (X·U)·V, W frozen; every order as the authors list it."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, u: Any, v: Any, b: Any, forward: int, backward: int) -> Any:
        rows, shape = x.contiguous().view(-1, x.shape[-1]), (*x.shape[:-1], w.shape[1])
        ctx.save_for_backward(x, w if x.requires_grad else None, u, v)
        ctx.order = backward
        if forward == 1:
            return (rows.mm(w) if b is None else b.addmm(rows, w)).addmm_(rows.mm(u), v).view(shape)
        if forward == 2:
            return (rows.mm(w.addmm(u, v)) if b is None else b.addmm(rows, w.addmm(u, v))).view(shape)
        if forward == 3:
            return (rows.mm(u).mm(v) if b is None else b.addmm(rows.mm(u), v)).addmm_(rows, w).view(shape)
        return x @ w.addmm(u, v) if b is None else b + x @ w.addmm(u, v)

    @staticmethod
    def backward(ctx: Any, grad_output: Any) -> Any:
        x, w, u, v = ctx.saved_tensors
        rows, g = x.contiguous().view(-1, x.shape[-1]), grad_output.contiguous().view(-1, grad_output.shape[-1])
        needed, order = ctx.needs_input_grad[0], ctx.order
        grad_x: Any = None
        if order in (1, 2):
            z = g.mm(v.t())
            grad_u = rows.t().mm(z)
            grad_v = rows.mm(u).t().mm(g) if order == 1 else u.t().mm(rows.t().mm(g))
            grad_x = g.mm(w.t()).addmm_(z, u.t()) if needed else None
        elif order in (3, 4):
            z = rows.t().mm(g)
            grad_u, grad_v = z.mm(v.t()), u.t().mm(z)
            if needed:
                grad_x = g.mm(w.t()).addmm_(g.mm(v.t()), u.t()) if order == 3 else g.mm(w.addmm(u, v).t())
        elif order == 5:
            grad_u, grad_v = rows.t().mm(g.mm(v.t())), rows.mm(u).t().mm(g)
            grad_x = g.mm(w.addmm(u, v).t()) if needed else None
        elif order == 6:
            grad_u, grad_v = rows.t().mm(g).mm(v.t()), u.t().mm(rows.t()).mm(g)
            grad_x = g.mm(w.t()) + g.mm(v.t()).mm(u.t()) if needed else None
        elif order == 7:
            grad_u, grad_v = rows.t().mm(g).mm(v.t()), u.t().mm(rows.t()).mm(g)
            grad_x = g.mm(w.t() + v.t().mm(u.t())) if needed else None
        else:
            grad_u, grad_v = rows.t().mm(g.mm(v.t())), u.t().mm(rows.t().mm(g))
            grad_x = g.mm(w.t() + v.t().mm(u.t())) if needed else None
        return (grad_x.view(x.shape) if needed else None), None, grad_u, grad_v, None, None, None


class RunLoraLinear(nn.Module):
    """A linear layer with adapters U (n, r) and V (r, m), computed by the operator in given orders."""

    def __init__(self, base: Any, method: runlora.RunLora, tokens: int) -> None:
        super().__init__()
        self.base = base
        n, m = sizes(base)
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        self.lora_U = nn.Parameter(torch.randn(n, method.r, **like) / 100)
        self.lora_V = nn.Parameter(torch.zeros(method.r, m, **like))
        self.scaling, self.orders = method.alpha / method.r, method.orders(runlora.LayerShape(tokens, n, m, method.r))

    def forward(self, x: Any) -> Any:
        w = self.base.weight if isinstance(self.base, Conv1D) else self.base.weight.t()
        u = self.lora_U * self.scaling
        return RunLoraModule.apply(x, w, u, self.lora_V, self.base.bias, *self.orders)  # type: ignore[no-untyped-call]


def sizes(base: Any) -> tuple[int, int]:
    """Inputs and outputs of a Linear or Conv1D."""
    rows, columns = base.weight.shape
    return (rows, columns) if isinstance(base, Conv1D) else (columns, rows)


def wrap(model: Any, architecture: Architecture, wanted: Callable[[str, int | None], bool], make: Any) -> Any:
    """Freeze the model and put `make(linear)` in the place of the wanted linear layers."""
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        layer, name = block_of(architecture.stacks, path)
        if layer is None and module is model.get_output_embeddings():
            name = "lm_head"  # wherever the architecture keeps it
        if wanted(name, layer):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


Apply = Callable[[Any, Any, Architecture, Setup], Any]  # of (model, method, architecture, setup): the model to train
PROGRAMS: dict[type[Method], Apply] = {}


def program(*classes: type[Method]) -> Callable[[Apply], Apply]:
    """Register the reference program of methods."""

    def register(apply: Apply) -> Apply:
        PROGRAMS.update(dict.fromkeys(classes, apply))
        return apply

    return register


def apply_reference(model: Any, method: Method, architecture: Architecture, setup: Setup) -> Any:
    """The reference program of a method on a transformers model."""
    if type(method) not in PROGRAMS:
        raise TypeError(f"no reference program for method {method.name}")
    return PROGRAMS[type(method)](model, method, architecture, setup)


def apply_any(model: Any, method: Method, architecture: Architecture, setup: Setup) -> Any:
    """The model with the method on it: peft's or transformers' program, or the reference where they have none."""
    if models.has_program(method):
        return models.apply_method(model, method, architecture)
    return apply_reference(model, method, architecture, setup)


def check_program(method: Method) -> None:
    """Raise `UserError` if nobody has a program of a method that could run."""
    if not models.has_program(method) and type(method) not in PROGRAMS:
        raise UserError(
            f"method {method.name}: neither peft nor transformers has a program of it, nor is there one here"
        )


MakeUpdate = Callable[[Any, str, Any], Any]  # of (model, form, method): the optimizer to run
UPDATES: dict[type[Method], MakeUpdate] = {}


def updater(*classes: type[Method]) -> Callable[[MakeUpdate], MakeUpdate]:
    """Register the reference optimizer of methods that bring their own."""

    def register(make: MakeUpdate) -> MakeUpdate:
        UPDATES.update(dict.fromkeys(classes, make))
        return make

    return register


def make_update(model: Any, form: str, method: Method) -> Any:
    """The optimizer of a method: its reference, peft's, or the setup's."""
    maker: MakeUpdate = UPDATES.get(type(method), updates.make)
    return maker(model, form, method)


@program(Paca)
def _paca(model: Any, method: Paca, architecture: Architecture, setup: Setup) -> Any:
    return wrap(model, architecture, method.targets_layer, partial(PacaLinear, method=method))


@program(runlora.RunLora)
def _run_lora(model: Any, method: runlora.RunLora, architecture: Architecture, setup: Setup) -> Any:
    make = partial(RunLoraLinear, method=method, tokens=setup.batch * setup.seq)
    return wrap(model, architecture, method.targets_layer, make)


@program(LoraFa)
def _lora_fa(model: Any, method: LoraFa, architecture: Architecture, setup: Setup) -> Any:
    return freeze(models.apply_method(model, as_lora(method), architecture), "lora_A")


@program(QLora)
def _qlora(model: Any, method: QLora, architecture: Architecture, setup: Setup) -> Any:
    """bitsandbytes' 4-bit linears under peft's LoRA, as transformers makes them of a BitsAndBytesConfig."""
    nn_of = _bitsandbytes(method.name)
    options = {"quant_type": "nf4", "compress_statistics": method.double_quant}
    compute = TORCH_DTYPES[method.compute_dtype or setup.dtype]

    def make(base: Any) -> Any:
        layer = nn_of.Linear4bit(
            base.in_features, base.out_features, base.bias is not None, compute_dtype=compute, **options
        )
        layer.weight = nn_of.Params4bit(base.weight.data, requires_grad=False, **options)
        return layer

    return _on_quantised(model, method, architecture, make, "is_loaded_in_4bit")


@program(Lora8bit)
def _lora_8bit(model: Any, method: Lora8bit, architecture: Architecture, setup: Setup) -> Any:
    """bitsandbytes' LLM.int8() linears under peft's LoRA; how many outliers there are is up to the data."""
    nn_of = _bitsandbytes(method.name)

    def make(base: Any) -> Any:
        layer = nn_of.Linear8bitLt(
            base.in_features, base.out_features, base.bias is not None, has_fp16_weights=False, threshold=6.0
        )
        layer.weight = nn_of.Int8Params(base.weight.data, requires_grad=False, has_fp16_weights=False)
        return layer

    return _on_quantised(model, method, architecture, make, "is_loaded_in_8bit")


def _bitsandbytes(method: str) -> Any:
    try:
        return import_module("bitsandbytes.nn")
    except ImportError:
        raise UserError(
            f"method {method} runs on bitsandbytes, which is not installed: pip install bitsandbytes"
        ) from None


def _on_quantised(
    model: Any, method: QuantisedLora, architecture: Architecture, make: Callable[[Any], Any], flag: str
) -> Any:
    """Quantised layers in the place of all linear ones but the head, and peft's LoRA on the targets."""
    import peft

    for name, base in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")]:
        layer = make(base)
        layer.bias = base.bias
        model.set_submodule(name, layer.to(base.weight.device))
    setattr(model, flag, True)
    if method.prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return models.apply_method(model, as_lora(method), architecture)


@program(Lisa)
def _lisa(model: Any, method: Lisa, architecture: Architecture, setup: Setup) -> Any:
    for name, parameter in model.named_parameters():
        layer, _ = block_of(architecture.stacks, name)
        parameter.requires_grad = layer is None or layer >= architecture.layers - method.gamma
    return model


def as_lora(method: Lora, **changes: Any) -> Lora:
    """The plain LoRA with the options of one of its kin."""
    options = {f.name: getattr(method, f.name) for f in fields(Lora) if f.init}
    return Lora(**{**options, **changes})


def freeze(model: Any, factor: str) -> Any:
    """Freeze lora_A or lora_B everywhere."""
    for name, parameter in model.named_parameters():
        if factor in name:
            parameter.requires_grad_(False)
    return model
