"""LoRA on a base in 8 bit (`load_in_8bit`), as transformers, peft and bitsandbytes run it.

All linear layers of the model are quantised, the output head is not, nor are experts unless it is asked for. Source:
transformers/integrations/bitsandbytes.py, bitsandbytes/nn/modules.py (`Linear8bitLt`), peft/tuners/lora/bnb.py,
axolotl/monkeypatch/moe_quant.py.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.core import tape
from ..tape.packages.int8 import Rounded, linear_8bit, whole_rows
from ..tape.tensor import Tensor
from .parts.base import Linear, Scope, method, option
from .parts.checks import not_negative
from .parts.quantised import QuantisedLora, bias_of, stored


@method(
    "lora_8bit",
    title="LoRA on an 8-bit base",
    source="https://arxiv.org/abs/2208.07339; peft/tuners/lora/bnb.py",
    trains="A, B",
    adds="lora + rounding",
)
@dataclass(frozen=True)
class Lora8bit(QuantisedLora):
    """LoRA on a base in LLM.int8(): products in 8-bit integers forward, with a dequantised weight backward."""

    outliers: int = option(
        6, "columns of a layer's input beyond the threshold; data, 6 at 6.7B parameters", not_negative
    )

    clones: ClassVar[bool] = False
    told_of_four_dims: ClassVar[str] = (
        "8-bit layers of four dimensions, as transformers 5.24 has them and bitsandbytes refuses"
    )

    def expert_weight(self, layer: Scope, name: str, shape: tuple[Any, ...]) -> Tensor:
        rows = shape[0] * shape[1]
        values = stored(layer, name, shape, "i8", rows * shape[2])
        scales = stored(layer, f"{name}.row_stats", (rows,), "fp32")
        return whole_rows(values, scales)

    def base(self, layer: Linear, x: Tensor) -> Tensor:
        values = stored(layer.scope, f"{layer.name}.weight", (layer.n_out, layer.n_in), "i8", layer.n_out * layer.n_in)
        scales = stored(layer.scope, f"{layer.name}.SCB", (layer.n_out,), "fp32")
        bias = bias_of(layer, x.dtype)
        with tape().belonging_to("base"):
            return linear_8bit(x, Rounded(values, scales, min(self.outliers, layer.n_in)), bias)
