"""The parameters of a real model, as the optimizer and the memory model see them."""

from collections.abc import Set
from typing import Any

import torch

from ..program.op import Spec
from ..tape.tensor import Parameter
from .calls import unnumbered
from .programs.dtypes import DTYPES
from .watching.marks import own_name, path_of_bare


def parameters_of(model: Any, bare: Any, base: Set[str], reached: Set[str]) -> list[Parameter]:
    """Every parameter once, in the model's order, by the name that it has without peft's wrappers.

    Args:
        bare: the model without what peft puts around it.
        base: names of the bare model's parameters; what else there is belongs to an adapter.
        reached: which got a gradient (`Calls.reached`).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    packed, start = stood_for(model), path_of_bare(model, bare)
    made = []
    for name, tensor in model.named_parameters():
        called = own_name(name, start, base)
        kind = "embedding" if id(tensor) in embeddings else _kind(called, tensor, base)
        kind = "scale" if packed.get(id(tensor)) == 0 else kind
        dtype = DTYPES.get(tensor.dtype, "fp32")
        parameter = Parameter(called, tuple(tensor.shape), dtype, kind=kind, trainable=tensor.requires_grad)
        parameter.used = tensor.requires_grad and unnumbered(name) in reached
        parameter.elements = packed.get(id(tensor), parameter.elements)
        made.append(parameter)
    return made


def buffers_of(model: Any) -> tuple[Spec, ...]:
    """What modules keep besides parameters."""
    return tuple(Spec(DTYPES.get(t.dtype, "fp32"), tuple(t.shape)) for t in model.buffers())


def stood_for(model: Any) -> dict[int, int]:
    """How many parameters of the model the tensors of quantised layers stand for, by their identities."""
    layers = [m for m in model.modules() if hasattr(m, "stands_for")]
    return {id(getattr(m, name)): n for m in layers for name, n in m.stands_for.items()}


def _kind(name: str, tensor: torch.Tensor, base: Set[str]) -> str:
    if name not in base:
        return "adapter"
    if name.endswith("bias"):
        return "bias"
    return "norm" if tensor.dim() == 1 else "weight"
