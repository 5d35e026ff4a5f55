"""The optimizer of a real program: torch's, transformers', peft's, and what a method does after its step."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from perfmodel.methods import Method
from perfmodel.methods.lora_fa import LoraFa
from perfmodel.methods.loraplus import LoraPlus

Make = Callable[..., Any]  # of (model, form, method): the optimizer to run
F = TypeVar("F", bound=Make)
_MAKE: dict[type[Method], Make] = {}


def updates(*classes: type[Method]) -> Callable[[F], F]:
    """Register the function that makes the optimizer of methods that want their own."""

    def register(function: F) -> F:
        _MAKE.update(dict.fromkeys(classes, function))
        return function

    return register


def make(model: Any, form: str, method: Method) -> Any:
    """The optimizer of a model with a method on it; `form` as `perfmodel.optimizers.resolve` returns it."""
    own = _MAKE.get(type(method))
    return own(model, form, method) if own else standard(model, form)


def standard(model: Any, form: str) -> torch.optim.Optimizer:
    """The optimizer of that form on all that trains."""
    return make_optimizer([p for p in model.parameters() if p.requires_grad], form)


def make_optimizer(parameters: list[Any], form: str) -> torch.optim.Optimizer:
    """The torch optimizer of that form."""
    cls, options = torch_class(form)
    return cls(parameters, lr=1e-4, **options)


def torch_class(form: str) -> tuple[Any, dict[str, Any]]:
    """The class of an optimizer form, and the options that make it that form."""
    if form.startswith("adamw"):
        return torch.optim.AdamW, {"foreach": form == "adamw-foreach", "fused": form == "adamw-fused"}
    return torch.optim.SGD, {"momentum": 0.9 if form == "sgd-momentum" else 0.0, "foreach": True}


@updates(LoraPlus)
def _loraplus(model: Any, form: str, method: LoraPlus) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    cls, options = torch_class(form)
    return create_loraplus_optimizer(model, cls, lr=1e-4, loraplus_lr_ratio=method.ratio, **options)


@updates(LoraFa)
def _lora_fa(model: Any, form: str, method: LoraFa) -> Any:
    from peft.optimizers import create_lorafa_optimizer

    if not method.projected:
        return standard(model, form)
    return create_lorafa_optimizer(model, r=method.r, lora_alpha=method.alpha, lr=1e-4)


def held(update: Any) -> Iterator[torch.Tensor]:
    """The tensors that an optimizer keeps between steps."""
    return _tensors(update.state)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
