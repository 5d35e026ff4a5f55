"""LoRA on a base that GPTQ quantised, as transformers, peft and gptqmodel run it (`backend="auto_trainable"`).

All linear layers of the blocks are quantised. By its default backend transformers takes kernels for inference, through
which no gradient comes back. Source: transformers/quantizers/quantizer_gptq.py, optimum/gptq/quantizer.py (2.3),
peft/tuners/lora/gptq.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..tape.core import tape
from ..tape.linalg import linear
from ..tape.packages.gptq import Grouped, linear_gptq
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.tensor import Tensor
from .parts.base import Linear, Scope, method, option
from .parts.checks import positive
from .parts.quantised import QuantisedLora, bias_of, stored

BITS = (2, 3, 4, 8)  # optimum/gptq/quantizer.py
WORD = 32  # bits of what codes are packed in


@method(
    "lora_gptq",
    title="LoRA on a GPTQ base",
    source="https://arxiv.org/abs/2210.17323; peft/tuners/lora/gptq.py",
    trains="A, B",
    adds="lora + dequantisation",
)
@dataclass(frozen=True)
class LoraGptq(QuantisedLora):
    """LoRA on a base in GPTQ's codes, unpacked in forward and in every recompute; autograd keeps the weight."""

    bits: int = option(4, "of a code: 2, 3, 4 or 8", positive)
    group_size: int = option(128, "rows of a weight that share a scale", positive)

    by_bitsandbytes: ClassVar[bool] = False
    clones: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if self.bits not in BITS:
            raise UserError(f"method {self.name}: bits {self.bits} is not modelled: use {', '.join(map(str, BITS))}")
        if self.experts:
            raise UserError(f"method {self.name}: experts in GPTQ's codes are not modelled; leave out experts=true")
        if self.prepared:
            raise UserError(f"method {self.name}: beside GPTQ's codes peft's preparation upcasts nothing; leave it out")

    def expert_weight(self, layer: Scope, name: str, shape: tuple[Any, ...]) -> Tensor:
        raise AssertionError("experts are refused")

    def base(self, layer: Linear, x: Tensor) -> Tensor:
        rows, columns = layer.n_in * self.bits // WORD, layer.n_out * self.bits // WORD
        groups, of = -(-layer.n_in // self.group_size), layer.name
        qweight = stored(layer.scope, f"{of}.weight", (rows, layer.n_out), "i32", layer.n_in * layer.n_out)
        qzeros = stored(layer.scope, f"{of}.qzeros", (groups, columns), "i32")
        scales = stored(layer.scope, f"{of}.scales", (groups, layer.n_out), layer.scope.dtype)
        g_idx = stored(layer.scope, f"{of}.g_idx", (layer.n_in,), "i32")
        bias = bias_of(layer, layer.scope.dtype)
        with tape().belonging_to("base"):
            return linear_gptq(x, Grouped(self.bits, qweight, qzeros, scales, g_idx), bias)

    def _beside(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = self.base(layer, x)
        a, b = self.weights(layer, dtype)
        x = cast(x, dtype)
        added = add(result, mul(linear(linear(dropout(x, self.dropout), a), b), self.alpha))
        return cast(added, result.dtype)
