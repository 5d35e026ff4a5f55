"""The optimizer of a real program: torch's, transformers', peft's, and what a method does after its step."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ...errors import UserError
from ...methods import Method
from ...methods.adalora import AdaLora
from ...methods.lora_fa import LoraFa
from ...methods.loraplus import LoraPlus
from ...methods.riemannian_lora import RiemannianLora
from ...optimizers.bitsandbytes import CODES, FORMS

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
    """The optimizer of a model with a method on it; `form` as `perfmodel.optimizers.picked_form` returns it."""
    own = _MAKE.get(type(method))
    return own(model, form, method) if own else standard(model, form)


def standard(model: Any, form: str) -> torch.optim.Optimizer:
    """The optimizer of that form on all that trains, as transformers' Trainer makes it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if form == "muon":
        return _muon(model, trained)
    if form == "adam-mini":
        return _adam_mini(model)
    if form == "adamw-masters":
        return AdamWOnMasters(trained)
    return _bitsandbytes(model, trained, form) if form in FORMS else make_optimizer(trained, form)


def _bitsandbytes(model: Any, parameters: list[Any], form: str) -> torch.optim.Optimizer:
    """One of bitsandbytes; the maps of its 8-bit codes are read when they are made, which fake tensors cannot be.

    Raises:
        UserError: the package is not installed, or the form needs a GPU to make its states.
    """
    states, bits, paged = FORMS[form]
    if paged:
        raise UserError(f"optimizer {form}: its states cannot be made without a GPU")
    try:
        bnb = import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(f"optimizer {form}: its program needs the bitsandbytes package") from error
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    for module in model.modules():
        if bits == 8 and isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    cls = bnb.optim.AdamW if states == 2 else bnb.optim.Lion
    with patch.object(bnb.functional, "create_dynamic_map", lambda signed: torch.empty(CODES)):
        optimizer: torch.optim.Optimizer = cls(parameters, lr=1e-4, optim_bits=bits)
    return optimizer


def _adam_mini(model: Any) -> torch.optim.Optimizer:
    """The authors' Adam-mini, as LLaMA-Factory makes it.

    Raises:
        UserError: the package is not installed.
    """
    try:
        cls = import_module("adam_mini").Adam_mini
    except ImportError:
        raise UserError("optimizer adam-mini: its program needs the adam_mini package") from None
    config = model.config.get_text_config()
    made: torch.optim.Optimizer = cls(
        model.named_parameters(), lr=1e-4, dim=config.hidden_size, n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None),
    )  # fmt: skip
    return made


class MuonBesideAdamW(torch.optim.Optimizer):
    """torch's Muon on the matrices of the blocks, its AdamW on what is left."""

    def __init__(self, hidden: list[Any], rest: list[Any]) -> None:
        super().__init__([*hidden, *rest], {})
        self.both: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden)] if hidden else []
        self.both += [torch.optim.AdamW(rest)] if rest else []
        self.state = {p: state for one in self.both for p, state in one.state.items()}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One after the other."""
        for one in self.both:
            one.step()
            self.state.update(one.state)


class AdamWOnMasters(torch.optim.Optimizer):
    """torch's fused AdamW on fp32 copies of the 16-bit weights."""

    def __init__(self, trained: list[Any]) -> None:
        super().__init__(trained, {})
        self.weights = [p for p in trained if p.dtype != torch.float32]
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        for master in self.masters:
            master.grad = torch.empty_like(master)
        self.inner = torch.optim.AdamW([*self.masters, *(p for p in trained if p.dtype == torch.float32)], fused=True)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Gradients to the masters, their update, weights back."""
        with torch.no_grad():
            if self.masters:
                torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.weights])
            self.inner.step()
            if self.masters:
                torch._foreach_copy_(self.weights, self.masters)
        kept: dict[Any, Any] = {i: {"master": m, "gradient": m.grad} for i, m in enumerate(self.masters)}
        self.state = kept | self.inner.state


def _muon(model: Any, trained: list[Any]) -> MuonBesideAdamW:
    inside = {id(p) for name, p in model.named_parameters() if p.ndim == 2 and re.search(r"\.\d+\.", name)}
    return MuonBesideAdamW([p for p in trained if id(p) in inside], [p for p in trained if id(p) not in inside])


def make_optimizer(parameters: list[Any], form: str) -> torch.optim.Optimizer:
    """The torch optimizer of that form.

    Raises:
        UserError: its package is not installed, or its program is a graph that `torch.compile` makes.
    """
    cls, options = torch_class(form)
    optimizer: torch.optim.Optimizer = cls(parameters, lr=1e-4, **options)
    if hasattr(optimizer, "train"):  # schedule-free ones step on other weights than they are evaluated with
        optimizer.train()
    return optimizer


def torch_class(form: str) -> tuple[Any, dict[str, Any]]:
    """The class of an optimizer form, and the options that make it that form."""
    if form == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor, {"scale_parameter": False, "relative_step": False}
    if form.startswith("ao-"):
        raise UserError(f"optimizer {form}: torchao compiles its update, which no trace shows")
    if form == "schedule-free-adamw":
        try:
            return import_module("schedulefree").AdamWScheduleFree, {"weight_decay": 0.01}
        except ImportError:
            raise UserError(f"optimizer {form}: its program needs the schedulefree package") from None
    if form.startswith("adamw"):
        return torch.optim.AdamW, {"foreach": form == "adamw-foreach", "fused": form == "adamw-fused"}
    if form.startswith("rmsprop"):
        return torch.optim.RMSprop, {"foreach": form == "rmsprop"}
    return torch.optim.SGD, {"momentum": 0.9 if form == "sgd-momentum" else 0.0, "foreach": True}


class AdaLoraUpdate:
    """An optimizer whose step is followed by AdaLoRA's `update_and_allocate`, at a step that allocates or does not."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, *, allocate: bool) -> None:
        self.tuner = model.base_model
        self.optimizer = optimizer
        self.global_step = 50 if allocate else 51  # of 100; allocation is due at every tenth
        self.tuner.peft_config[self.tuner.trainable_adapter_name].deltaT = 10

    @property
    def state(self) -> dict[str, Any]:
        """What is kept between steps: the optimizer's state and the importance scores."""
        scores = self.tuner.rankallocator
        own = {"ipt": scores.ipt, "exp_avg_ipt": scores.exp_avg_ipt, "exp_avg_unc": scores.exp_avg_unc}
        return {"optimizer": dict(self.optimizer.state), **own}

    def step(self) -> None:
        """The optimizer's step, then the scores."""
        self.optimizer.step()
        with _tolist_without_data():
            self.tuner.update_and_allocate(self.global_step)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none)


@contextmanager
def _tolist_without_data() -> Iterator[None]:
    """A list of values is copied without a dispatch, but a fake tensor would read them one by one."""
    with patch.object(FakeTensor, "tolist", lambda x: [True] * x.numel()):
        yield


@updates(AdaLora)
def _adalora(model: Any, form: str, method: AdaLora) -> Any:
    return AdaLoraUpdate(model, standard(model, form), allocate=method.delta_t == 1)


@updates(LoraPlus)
def _loraplus(model: Any, form: str, method: LoraPlus) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    cls, options = torch_class(form)
    return create_loraplus_optimizer(model, cls, lr=1e-4, loraplus_lr_ratio=method.ratio, **options)


@updates(RiemannianLora)
def _riemannian(model: Any, form: str, method: RiemannianLora) -> Any:
    from peft.optimizers import create_riemannian_optimizer

    cls, options = torch_class(form)
    return create_riemannian_optimizer(model, cls, lr=1e-4, **options)


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
