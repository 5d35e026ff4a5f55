"""LoRA as PEFT runs it in eager mode."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError, nearest
from ..tape.core import Tensor
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, dropout, mul
from .base import Linear, Method, method, option, positive

ALL_LINEAR = "all-linear"


@method("lora", source="https://arxiv.org/abs/2106.09685; peft/tuners/lora/layer.py")
@dataclass(frozen=True)
class Lora(Method):
    """Low-rank adapters beside frozen linear layers: y = xWᵀ + (α/r)·(xAᵀ)Bᵀ."""

    r: Any = option(8, "rank")
    alpha: float = option(8.0, "scale numerator; changes no cost")
    targets: tuple[str, ...] = option((), "layer names joined by +, or all-linear; empty: PEFT's default, q and v")
    dropout: float = option(0.0, "dropout on the adapter's input")
    layers_to_transform: tuple[int, ...] | None = option(None, "block numbers such as 0-7+12; default all")
    adapter_dtype: str | None = option(None, "bf16, fp16 or fp32; default PEFT's rule: fp32 beside a 16-bit base")

    aliases: ClassVar[dict[str, str]] = {"rank": "r", "layers": "layers_to_transform", "target_modules": "targets"}

    def __post_init__(self) -> None:
        object.__setattr__(self, "r", positive(f"method {self.name}: r", self.r))
        if not 0 <= self.dropout < 1:
            raise UserError(f"method {self.name}: dropout must be from 0 to below 1, got {self.dropout}")
        if self.adapter_dtype not in (None, "bf16", "fp16", "fp32"):
            raise UserError(
                f"method {self.name}: adapter_dtype {self.adapter_dtype!r} is unknown: use bf16, fp16 or fp32"
            )

    def check(self) -> None:
        assert self.architecture is not None
        known = [*self.architecture.linear_names(), "lm_head"]
        for target in self.targets:
            if target != ALL_LINEAR and not any(_matches(name, target) for name in known):
                leaves = {name.rsplit(".", 1)[-1] for name in known}
                raise UserError(
                    f"method {self.name}: target {target!r} matches no linear layer of {self.architecture.name}: "
                    f"{nearest(target, leaves)}"
                )
        if "lm_head" in self.targets and self.architecture.tied:
            raise UserError(
                f"method {self.name}: lm_head of {self.architecture.name} shares the embedding's weight; leave it out"
            )
        for layer in self.layers_to_transform or ():
            if not 0 <= layer < self.layers:
                raise UserError(
                    f"method {self.name}: layer {layer} is outside 0-{self.layers - 1} of {self.architecture.name}"
                )

    @property
    def target_names(self) -> tuple[str, ...]:
        """The targets, PEFT's default for the architecture filled in."""
        if self.targets:
            return self.targets
        assert self.architecture is not None
        return DEFAULT_TARGETS[self.architecture.model_type]

    def targets_layer(self, name: str, layer: int | None) -> bool:
        """Whether a linear layer gets an adapter."""
        if layer is None:
            return self.layers_to_transform is None and _named(name, self.target_names)
        if self.layers_to_transform is not None and layer not in self.layers_to_transform:
            return False
        return _named(name, self.target_names)

    def layer_key(self, layer: int) -> Hashable:
        return self.layers_to_transform is None or layer in self.layers_to_transform

    def dtype_beside(self, dtype: str) -> str:
        """The adapter's dtype beside a base of `dtype` (PEFT's `autocast_adapter_dtype`)."""
        return self.adapter_dtype or "fp32"

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        result = layer(x)
        if not self.targets_layer(layer.name, layer.scope.layer):
            return result
        if np.any(np.greater(self.r, min(layer.n_in, layer.n_out))):
            raise UserError(
                f"method {self.name}: rank {np.max(self.r)} exceeds the width "
                f"{min(layer.n_in, layer.n_out)} of {layer.name}"
            )
        layer.scope.count_adapter()
        dtype = self.dtype_beside(layer.scope.dtype)
        a = layer.adapter("lora_A.weight", (self.r, layer.n_in), dtype)
        b = layer.adapter("lora_B.weight", (layer.n_out, self.r), dtype)
        result_dtype = result.dtype
        x = cast(x, dtype)
        result = add(result, mul(linear(linear(dropout(x, self.dropout), a), b), self.alpha))
        return cast(result, result_dtype)


# PEFT's TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING (peft/utils/constants.py)
DEFAULT_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "opt": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "gpt_neo": ("q_proj", "v_proj"),
    "bert": ("query", "value"),
}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _named(name: str, targets: tuple[str, ...]) -> bool:
    return any(_matches(name, target) or (target == ALL_LINEAR and name != "lm_head") for target in targets)
