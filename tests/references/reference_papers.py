"""Reference programs in plain torch for the works around the paper, written from the papers and their authors' code."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from reference import as_lora, freeze, program
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from perfmodel.architectures import Architecture
from perfmodel.methods.cola import Cola
from perfmodel.methods.gelora import GeLora
from perfmodel.methods.rolora import RoLora
from perfmodel.methods.s2ft import S2Ft
from perfmodel.methods.xgblora import XgbLora
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models
from perfmodel.tracing.trace import CallRecorder, Signature, to_fake


@program(RoLora)
def _rolora(model: Any, method: RoLora, architecture: Architecture, setup: Setup) -> Any:
    frozen = {"A": "lora_B", "B": "lora_A"}[method.round]
    return freeze(models.apply_method(model, as_lora(method), architecture), frozen)


@program(Cola)
def _cola(model: Any, method: Cola, architecture: Architecture, setup: Setup) -> Any:
    return models.apply_method(model, as_lora(method), architecture)


@program(XgbLora)
def _xgblora(model: Any, method: XgbLora, architecture: Architecture, setup: Setup) -> Any:
    return models.apply_method(model, as_lora(method, layers_to_transform=method.drawn), architecture)


@program(GeLora)
def _gelora(model: Any, method: GeLora, architecture: Architecture, setup: Setup) -> Any:
    """peft's own ranks by pattern."""
    ranks = method.ranks * (architecture.layers // len(method.ranks))
    config = peft.LoraConfig(
        target_modules=list(method.target_names),
        rank_pattern={f"{architecture.layer_path}.{i}.*": r for i, r in enumerate(ranks)},
        lora_dropout=method.dropout,
        fan_in_fan_out=architecture.traits.conv1d,
    )
    return peft.get_peft_model(model, config)


def merge_and_restart(model: Any) -> None:
    """peft's merge of every layer into its base, and its initialisation, once more."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
            module.merged_adapters.clear()
            module.reset_lora_parameters("default", True)


def decompose(model: Any, start: str) -> None:
    """peft's own start of PiSSA (`pissa`, `pissa_niter_N`) in every layer."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.pissa_init("default", start)


def two_nn(x: Any) -> Any:
    """TwoNN in its maximum-likelihood form: N / Σ log(r₂/r₁) over all points."""
    squares = x.pow(2).sum(1)
    distances = squares[:, None] + squares - 2.0 * x.mm(x.t())
    _, first, second = distances.topk(3, largest=False).values.unbind(1)
    return len(x) * (0.5 * (second / first).log().sum()).reciprocal()


def calls_of(model: Any, function: Callable[[], Any]) -> Counter[Signature]:
    """The ATen calls of a function on a model of fake tensors."""
    mode, recorder = FakeTensorMode(), CallRecorder()
    to_fake(model, mode, "cpu")
    recorder.recording = True
    with mode, torch.no_grad(), recorder.observe("once"):
        function()
    return recorder.trace.calls["once"]


class SlicedLinear(torch.autograd.Function):
    """S2FT: y = x·Wᵀ + b; columns [0, w) or rows [0, w) of W get a gradient, formed sample by sample."""

    @staticmethod
    def forward(x: Any, weight: Any, trained: Any, bias: Any) -> Any:
        y = x.matmul(weight.t())
        if bias is not None:
            y += bias.unsqueeze(0).expand_as(y)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, trained, _ = inputs
        ctx.w = trained.shape[1] if trained.shape[0] == weight.shape[0] else None
        ctx.rows = trained.shape[0]
        ctx.save_for_backward(x if ctx.w is None else x[:, :, : ctx.w].clone(), weight)

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        kept, weight = ctx.saved_tensors
        grad_x = g.matmul(weight) if ctx.needs_input_grad[0] else None
        if ctx.w is None:
            g = g[:, :, : ctx.rows]
        return grad_x, None, g.transpose(-1, -2).matmul(kept).sum(0), None


class S2Linear(nn.Module):
    """A linear layer with a slice of its weight trained in place: the slice shares the weight's memory."""

    def __init__(self, base: Any, method: S2Ft, name: str) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        share = method.heads if "attn" in name else method.channels
        m, n = base.weight.shape
        if name.endswith(("o_proj", "down_proj")):
            trained = base.weight.data[:, : round(share * n)]
        else:
            trained = base.weight.data[: round(share * m)]
        self.trained = nn.Parameter(trained)

    def forward(self, x: Any) -> Any:
        return SlicedLinear.apply(x, self.weight, self.trained, self.bias)


@program(S2Ft)
def _s2ft(model: Any, method: S2Ft, architecture: Architecture, setup: Setup) -> Any:
    for name, module in list(model.requires_grad_(False).named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(method.target_names):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, S2Linear(module, method, name))
    slices = [p for p in model.parameters() if p.requires_grad]
    model.counted_twice = sum(p.numel() for p in slices)
    model.kept_bytes = -sum(p.numel() * p.element_size() for p in slices)  # fake parameters share no memory
    return model
