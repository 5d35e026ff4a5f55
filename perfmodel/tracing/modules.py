"""The Step of a user's own `nn.Module`: `perfmodel.predict_module`."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..devices import host as hosts
from ..devices.device import GivenDevice, profile_of
from ..devices.host import GivenHost
from ..errors import UserError
from ..methods.parts.peft_adapter import PeftAdapter
from ..prediction.given import setup_given
from ..prediction.predict import Prediction, of_step
from ..recording.program import recorded_module
from ..setup import Setup
from .calls import Loss
from .programs.dtypes import DTYPES
from .setups import check_setup
from .trace import with_hooks_of
from .traced import prepare, step_of, trace

Inputs = Mapping[str, Any] | Sequence[Any] | torch.Tensor
LossOf = Callable[[Any], torch.Tensor]


def predict_module(
    module: torch.nn.Module,
    inputs: Inputs,
    *,
    loss: LossOf | None = None,
    setup: Setup | None = None,
    device: GivenDevice = "l40s",
    host: GivenHost = "default",
    name: str = "",
) -> Prediction:
    """See `perfmodel.predict_module`."""
    on = profile_of(device)
    by = hosts.host_of(host, on)
    called = name or type(module).__name__
    setup = _setup(module, inputs) if setup is None else setup_given(setup, {})
    check_setup(setup)
    model = _without_data(module)
    prepare(model, setup)

    def make(here: Setup) -> Loss:
        args, kwargs = _arguments(tree_map(_like, inputs))
        return lambda: _loss(model(*args, **kwargs), loss)

    names = frozenset(key for key, _ in model.named_parameters())
    capability = on.compute_capability or "8.0"
    program = trace(model, make, setup, capability if on.kind == "cuda" else None, called, bare=model, names=names)
    frozen = any(not p.requires_grad for p in model.parameters())
    method = PeftAdapter(label="as it is" if frozen else "full")
    return of_step(step_of(recorded_module(called), method, setup, on.kind, capability, program), on, by)


def _without_data(module: torch.nn.Module) -> Any:
    """A copy whose parameters, buffers and other tensors are on the meta device; the original stays as it is."""
    memo: dict[int, Any] = {}
    for owner in module.modules():
        for tensor in owner._parameters.values():
            if tensor is not None:
                made = torch.nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
                with_hooks_of(tensor, made)
                memo[id(tensor)] = made
        for value in (*owner._buffers.values(), *owner.__dict__.values()):
            if isinstance(value, torch.Tensor):
                memo[id(value)] = value.detach().to("meta")
    return copy.deepcopy(module, memo)


def _like(value: Any) -> Any:
    """A tensor of the same shape and dtype, under the caller's fake mode."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.zeros(tuple(value.shape), dtype=value.dtype, requires_grad=value.requires_grad)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs), {}


def _loss(output: Any, loss: LossOf | None) -> torch.Tensor:
    """The scalar to differentiate: what `loss` makes of the output, its `.loss`, or the output itself.

    Raises:
        UserError: none of these is a scalar tensor, or it depends on nothing that trains.
    """
    value = loss(output) if loss else getattr(output, "loss", output)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise UserError(
            "the module's output has no scalar loss: give loss=, a function of the output (or labels among the inputs)"
        )
    if not value.requires_grad:
        raise UserError("the loss depends on nothing that trains: a tensor is detached, or a part unused")
    return value


def _setup(module: torch.nn.Module, inputs: Inputs) -> Setup:
    """Batch and length of the first input, dtype of the first weight.

    Raises:
        UserError: no tensor among the inputs.
    """
    args, kwargs = _arguments(inputs)
    first = next((t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)), None)
    if first is None or first.dim() == 0:
        raise UserError("the inputs hold no tensor with a batch dim: give example tensors, as the module takes them")
    ids = first.dim() == 2 and not first.is_floating_point()
    seq = first.shape[1] if ids or first.dim() == 3 else 1
    dtypes = (DTYPES.get(p.dtype, "fp32") for p in module.parameters() if p.is_floating_point())
    return Setup(batch=first.shape[0], seq=seq, dtype=next(dtypes, "fp32"))
