"""LoRA beside base layers that bitsandbytes keeps in few bits, as peft's layers for them run it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import UserError
from ...tape.core import tape
from ...tape.linalg import linear
from ...tape.pointwise import add, cast, dropout, mul
from ...tape.shape import clone
from ...tape.tensor import Parameter, Tensor
from ..lora import Lora
from .base import Linear, Method, Scope, option

OF_EXPERTS = ".experts."  # in the names of weights


@dataclass(frozen=True)
class QuantisedLora(Lora):
    """A subclass writes `base`, what a quantised layer computes; the output head stays as it is."""

    prepared: bool = option(False, "peft's prepare_model_for_kbit_training: norms, embeddings and head in fp32")
    experts: bool = option(False, "whether weights of experts are in few bits too (Axolotl's quantize_moe_experts)")

    implementations: ClassVar[tuple[str, ...]] = ("peft",)
    in_few_bits: ClassVar[bool] = True
    by_bitsandbytes: ClassVar[bool] = True
    clones: ClassVar[bool]  # whether peft copies the base layer's result before it adds to it

    def base_dtype(self, dtype: str) -> str:
        return "fp32" if self.prepared else dtype

    def base(self, layer: Linear, x: Tensor) -> Tensor:
        """y of a quantised base layer."""
        raise TypeError(f"{type(self).__name__} must define base")

    def expert_weight(self, layer: Scope, name: str, shape: tuple[Any, ...]) -> Tensor:
        """The quantised weights of all experts, dequantised."""
        raise TypeError(f"{type(self).__name__} must define expert_weight")

    def check(self) -> None:
        super().check()
        assert self.architecture is not None
        if self.by_bitsandbytes:
            check_replaced(self)
        if self.architecture.traits.head == "seq2seq":
            raise UserError(
                f"method {self.name}: transformers leaves wo of {self.architecture.name} in fp32 there, which "
                "is not modelled; use lora"
            )
        of_experts = [name for name in self.architecture.stacked_names() if OF_EXPERTS in name]
        if self.experts and not of_experts and not self.architecture.recorded:
            raise UserError(f"method {self.name}: {self.architecture.name} has no experts to quantise")
        by_peft = self.architecture.recorded and not of_experts
        adapted = self.target_parameters if by_peft else [n for n in of_experts if np.any(self.rank_of_parameter(n))]
        if self.experts and adapted:
            raise adapted_experts(self.name)

    def stacked_weight(self, layer: Scope, name: str, shape: tuple[Any, ...], kept: str | None) -> Tensor:
        if not (self.experts and OF_EXPERTS in name):
            return super().stacked_weight(layer, name, shape, kept)
        tape().part.host.modules += 2  # a parametrisation, and the list that it is in
        with tape().no_grad():
            layer.cached.append(self.expert_weight(layer, name, shape))
        return layer.cached[-1]

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        if layer.name == "lm_head":
            return super().linear(layer, x)
        if not self.targets_layer(layer.name, layer.scope.layer):
            return self.base(layer, x)
        tape().part.host.adapters += 1
        if layer.name.endswith(".o_proj") and self._fuses((layer,)):
            return self._fused_output(layer, x)
        return self._beside(layer, x, self.dtype_beside(layer.scope.dtype))

    def _beside(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = self.base(layer, x)
        if self.clones:
            result = clone(result)
        a, b = self.weights(layer, dtype)
        converts = not (tape().autocast and tape().device == "cuda")  # what `torch.is_autocast_enabled()` asks
        expected = result.dtype
        if converts:
            x = cast(x, dtype)
        output = mul(linear(linear(dropout(x, self.dropout), a), b), self.alpha)
        if converts:
            output = cast(output, expected)
        return add(result, output)


def adapted_experts(method: str) -> UserError:
    """The complaint about adapters on weights that `experts` packs."""
    return UserError(f"method {method}: adapters of quantised experts are not modelled; leave out experts=true")


def check_replaced(method: Method) -> None:
    """Raise `UserError` where transformers puts no layer of bitsandbytes into a model.

    It asks whether `type(module) is nn.Linear` (integrations/bitsandbytes.py, `replace_with_bnb_linear`).
    """
    assert method.architecture is not None
    if method.architecture.traits.by_matmul:
        raise UserError(
            f"method {method.name}: transformers quantises no layer of {method.architecture.name}, whose linear layers "
            "are of a class of its own; use lora"
        )


def stored(scope: Scope, name: str, shape: tuple[int, ...], dtype: str, elements: int = 0) -> Parameter:
    """A tensor that a base layer keeps; `elements` of the model's parameters lie in it, none in scales."""
    made = scope.parameter(name, shape, "weight" if elements else "scale", dtype=dtype)
    made.elements = elements
    return made


def bias_of(layer: Linear, dtype: str) -> Parameter | None:
    """The bias of a quantised layer, which follows its input's dtype."""
    return layer.scope.parameter(f"{layer.name}.bias", (layer.n_out,), "bias", dtype=dtype) if layer.has_bias else None
