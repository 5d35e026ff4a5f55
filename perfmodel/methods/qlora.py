"""QLoRA as transformers, peft and bitsandbytes run it: LoRA beside linear layers whose weights are 4-bit.

All linear layers of the model are quantised, the output head is not, nor are experts unless it is asked for: they then
are dequantised whenever their module runs, and what autograd keeps of them is the dequantised weight. Source:
transformers/integrations/bitsandbytes.py, bitsandbytes/nn/modules.py (`Linear4bit`), nn/parametrize.py,
peft/tuners/lora/bnb.py, axolotl/monkeypatch/moe_quant.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import UserError
from ..program.dims import Dim
from ..program.dtypes import ITEMSIZE
from ..program.software import SoftwareStack
from ..tape.packages.quantized import BLOCK, Packed, dequantize
from ..tape.tensor import Parameter, Tensor
from .parts.base import Linear, Scope, method
from .parts.four_bit import FourBit
from .parts.periodic import Recorded
from .parts.quantised import QuantisedLora, bias_of


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
    implementations: ClassVar[tuple[str, ...]] = ("peft", "axolotl", "unsloth")

    def check(self) -> None:
        super().check()
        if self.implementation != "peft" and (self.prepared or self.compute_dtype):
            what = "prepared=true" if self.prepared else "compute_dtype"
            raise UserError(f"method {self.name}: {self.implementation} is not modelled with {what}; leave it out")
        if self.implementation == "unsloth" and not self.double_quant:
            raise UserError(
                f"method {self.name}: Unsloth's kernels unpack no weights without double_quant; leave it out"
            )

    def held_bytes(self, step: Recorded) -> Dim:
        """Unsloth's buffers, as large as the largest weight that it unpacks, and that one's maxima."""
        if self.implementation != "unsloth" or self.why_unfused:
            return 0
        fused = set(self.fused_names)
        most = max(p.elements for p in step.parameters if p.elements and not fused.isdisjoint(p.name.split(".")))
        return most * ITEMSIZE[step.setup.dtype] + 4 * -(-most // BLOCK)

    def under(self, stack: SoftwareStack, dtype: str) -> "QLora":
        """Before 0.12 PEFT moves adapters to the dtype of the weight beside them, if it is a float's (`update_layer`):
        to that which holds the packed values."""
        return self if stack.upcasts_adapters or self.quant_storage == "u8" else self.in_one_dtype(self.quant_storage)

    def frozen(self, layer: Linear) -> tuple[Packed, Parameter | None]:
        sizes = (layer.n_out, layer.n_in)
        packed = self.packed(layer.scope, layer.name, f"{layer.name}.weight", sizes, self.quant_storage)
        return packed, bias_of(layer, layer.scope.dtype)

    def expert_weight(self, layer: Scope, name: str, shape: tuple[Any, ...]) -> Tensor:
        packed = self.packed(layer, name, name, shape)
        return dequantize(packed, packed.values)
