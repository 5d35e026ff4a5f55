"""QLoRA as transformers, peft and bitsandbytes run it: LoRA beside linear layers whose weights are 4-bit.

All linear layers of the model are quantised, the output head is not, nor are experts unless it is asked for: they then
are dequantised whenever their module runs, and what autograd keeps of them is the dequantised weight. Source:
transformers/integrations/bitsandbytes.py, bitsandbytes/nn/modules.py (`Linear4bit`), nn/parametrize.py,
peft/tuners/lora/bnb.py, axolotl/monkeypatch/moe_quant.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..program.software import SoftwareStack
from ..tape.packages.quantized import dequantize
from ..tape.tensor import Tensor
from .parts.base import Scope, method
from .parts.four_bit import FourBit
from .parts.quantised import QuantisedLora


@method(
    "qlora",
    title="QLoRA",
    source="https://arxiv.org/abs/2305.14314; peft/tuners/lora/bnb.py",
    trains="A, B",
    adds="lora + dequantisation",
)
@dataclass(frozen=True)
class QLora(FourBit, QuantisedLora):
    """LoRA on a base in 4-bit NormalFloat, which is dequantised in forward, in backward and in every recompute."""

    clones: ClassVar[bool] = True  # "we need to defensively clone here" (peft)

    def under(self, stack: SoftwareStack, dtype: str) -> "QLora":
        """Before 0.12 PEFT moves adapters to the dtype of the weight beside them, if it is a float's (`update_layer`):
        to that which holds the packed values."""
        return self if stack.upcasts_adapters or self.quant_storage == "u8" else self.in_one_dtype(self.quant_storage)

    def expert_weight(self, layer: Scope, name: str, shape: tuple[Any, ...]) -> Tensor:
        packed = self.packed(layer, name, name, shape)
        return dequantize(packed, packed.values)
