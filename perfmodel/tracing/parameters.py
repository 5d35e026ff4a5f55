"""The parameters of a real model, as the optimizer and the memory model see them."""

import re
from collections.abc import Set
from typing import Any

import torch

from ..tape.tensor import Parameter
from .programs.dtypes import DTYPES

_WRAPPERS = re.compile(r"^base_model\.model\.|\.base_layer(?=\.)|\.default(?=\.weight$|$)")


def parameters_of(model: Any, base: Set[str]) -> list[Parameter]:
    """Every parameter once, in the model's order, by the name that it has without peft's wrappers.

    Args:
        base: names of the bare model's parameters; what else there is belongs to an adapter.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    made = []
    for name, tensor in model.named_parameters():
        short = name if name in base else _WRAPPERS.sub("", name)
        kind = "embedding" if id(tensor) in embeddings else _kind(short, tensor, base)
        dtype = DTYPES.get(tensor.dtype, "fp32")
        parameter = Parameter(short, tuple(tensor.shape), dtype, kind=kind, trainable=tensor.requires_grad)
        parameter.used = tensor.requires_grad
        made.append(parameter)
    return made


def _kind(name: str, tensor: torch.Tensor, base: Set[str]) -> str:
    if name not in base:
        return "adapter"
    if name.endswith("bias"):
        return "bias"
    return "norm" if tensor.dim() == 1 else "weight"
