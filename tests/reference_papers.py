"""Reference programs in plain torch for the works around the paper, written from the papers and their authors' code."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from reference import as_lora, freeze, program
from torch._subclasses.fake_tensor import FakeTensorMode

from perfmodel.architectures import Architecture
from perfmodel.methods.cola import Cola
from perfmodel.methods.gelora import GeLora
from perfmodel.methods.rolora import RoLora
from perfmodel.methods.xgblora import XgbLora
from perfmodel.setup import Setup
from validate import models
from validate.trace import Recorder, Signature, to_fake


@program(RoLora)
def _rolora(model: Any, method: RoLora, architecture: Architecture, setup: Setup) -> Any:
    frozen = {"A": "lora_B", "B": "lora_A"}[method.round]
    return freeze(models.apply(model, as_lora(method), architecture), frozen)


@program(Cola)
def _cola(model: Any, method: Cola, architecture: Architecture, setup: Setup) -> Any:
    return models.apply(model, as_lora(method), architecture)


@program(XgbLora)
def _xgblora(model: Any, method: XgbLora, architecture: Architecture, setup: Setup) -> Any:
    return models.apply(model, as_lora(method, layers_to_transform=method.drawn), architecture)


@program(GeLora)
def _gelora(model: Any, method: GeLora, architecture: Architecture, setup: Setup) -> Any:
    """peft's own ranks by pattern."""
    ranks = method.ranks * (architecture.layers // len(method.ranks))
    config = peft.LoraConfig(
        target_modules=list(method.target_names),
        rank_pattern={f"{architecture.layer_path}.{i}.*": r for i, r in enumerate(ranks)},
        lora_dropout=method.dropout,
        fan_in_fan_out=architecture.model_type == "gpt2",
    )
    return peft.get_peft_model(model, config)


def merge_and_restart(model: Any) -> None:
    """peft's merge of every layer into its base, and its initialisation, once more."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
            module.merged_adapters.clear()
            module.reset_lora_parameters("default", True)


def two_nn(x: Any) -> Any:
    """TwoNN in its maximum-likelihood form: N / Σ log(r₂/r₁) over all points."""
    squares = x.pow(2).sum(1)
    distances = squares[:, None] + squares - 2.0 * x.mm(x.t())
    _, first, second = distances.topk(3, largest=False).values.unbind(1)
    return len(x) * (0.5 * (second / first).log().sum()).reciprocal()


def calls_of(model: Any, function: Callable[[], Any]) -> Counter[Signature]:
    """The ATen calls of a function on a model of fake tensors."""
    mode, recorder = FakeTensorMode(), Recorder()
    to_fake(model, mode, "cpu")
    recorder.recording = True
    with mode, torch.no_grad(), recorder.observe("once"):
        function()
    return recorder.trace.calls["once"]
