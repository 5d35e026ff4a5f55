"""QLoRA as transformers, peft and bitsandbytes run it: LoRA beside linear layers whose weights are 4-bit.

All linear layers of the model are quantised, the output head is not. Source: transformers/integrations/bitsandbytes.py,
bitsandbytes/nn/modules.py (`Linear4bit`), peft/tuners/lora/bnb.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..tape.core import tape
from ..tape.packages.quantized import BLOCK, NESTED_BLOCK, Packed, linear_4bit
from ..tape.pointwise import cast
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import float_dtype
from .parts.quantised import QuantisedLora, bias_of, stored


@method(
    "qlora",
    title="QLoRA",
    source="https://arxiv.org/abs/2305.14314; peft/tuners/lora/bnb.py",
    trains="A, B",
    adds="lora + dequantisation",
)
@dataclass(frozen=True)
class QLora(QuantisedLora):
    """LoRA on a base in 4-bit NormalFloat, which is dequantised in forward, in backward and in every recompute."""

    double_quant: bool = option(True, "whether the scales of the 4-bit blocks are quantised too")
    compute_dtype: str | None = option(
        None, "dtype of the GEMMs: bf16, fp16 or fp32; default the setup's dtype", float_dtype
    )

    clones: ClassVar[bool] = True  # "we need to defensively clone here" (peft)

    def base(self, layer: Linear, x: Tensor) -> Tensor:
        dtype, compute = x.dtype, self.compute_dtype or layer.scope.dtype
        bias = bias_of(layer, dtype)
        with tape().belonging_to("base"):
            x = cast(x, compute)
            y = linear_4bit(x, self._packed(layer), cast(bias, compute) if bias is not None else None)
            return cast(y, dtype)

    def _packed(self, layer: Linear) -> Packed:
        """The 4-bit weight of a layer with its scales."""
        size = layer.n_out * layer.n_in
        blocks = -(-size // BLOCK)
        values = stored(layer, "weight", ((size + 1) // 2, 1), "u8", size)
        absmax = stored(layer, "absmax", (blocks,), "u8" if self.double_quant else "fp32")
        nested = None
        if self.double_quant:
            second = stored(layer, "nested_absmax", (-(-blocks // NESTED_BLOCK),), "fp32")
            code = stored(layer, "nested_quant_map", (256,), "fp32")
            nested = (second, code, stored(layer, "offset", (), "fp32"))
        return Packed(values, absmax, nested, (layer.n_out, layer.n_in), layer.scope.dtype)
