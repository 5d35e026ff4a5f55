"""QLoRA as transformers, peft and bitsandbytes run it: LoRA beside linear layers whose weights are 4-bit.

All linear layers of the model are quantised, the output head is not. Source: transformers/integrations/bitsandbytes.py,
bitsandbytes/nn/modules.py (`Linear4bit`), peft/tuners/lora/bnb.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from ..tape.core import tape
from ..tape.linalg import linear
from ..tape.packages.quantized import BLOCK, NESTED_BLOCK, Packed, linear_4bit
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.shape import clone
from ..tape.tensor import Parameter, Tensor
from .lora import Lora
from .parts.base import Linear, method, option
from .parts.checks import float_dtype


@method(
    "qlora",
    title="QLoRA",
    source="https://arxiv.org/abs/2305.14314; peft/tuners/lora/bnb.py",
    trains="A, B",
    adds="lora + dequantisation",
)
@dataclass(frozen=True)
class QLora(Lora):
    """LoRA on a base in 4-bit NormalFloat, which is dequantised in forward, in backward and in every recompute."""

    double_quant: bool = option(True, "whether the scales of the 4-bit blocks are quantised too")
    compute_dtype: str | None = option(
        None, "dtype of the GEMMs: bf16, fp16 or fp32; default the setup's dtype", float_dtype
    )
    prepared: bool = option(False, "peft's prepare_model_for_kbit_training: norms, embeddings and head in fp32")

    implementations: ClassVar[tuple[str, ...]] = ("peft",)

    def base_dtype(self, dtype: str) -> str:
        return "fp32" if self.prepared else dtype

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        if layer.name == "lm_head":
            return super().linear(layer, x)
        if not self.targets_layer(layer.name, layer.scope.layer):
            return self._base(layer, x)
        layer.scope.count_adapter()
        return self._adapted_4bit(layer, x, self.dtype_beside(layer.scope.dtype))

    def _adapted_4bit(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        result = self._base(layer, x)
        result = clone(result)  # "we need to defensively clone here" (peft)
        a, b = self.weights(layer, dtype)
        converts = not (tape().autocast and tape().device == "cuda")  # what `torch.is_autocast_enabled()` asks
        expected = result.dtype
        if converts:
            x = cast(x, dtype)
        output = mul(linear(linear(dropout(x, self.dropout), a), b), self.alpha)
        if converts:
            output = cast(output, expected)
        return add(result, output)

    def _base(self, layer: Linear, x: Tensor) -> Tensor:
        """bitsandbytes' `Linear4bit`."""
        dtype, compute = x.dtype, self.compute_dtype or layer.scope.dtype
        bias = (
            layer.scope.parameter(f"{layer.name}.bias", (layer.n_out,), "bias", dtype=dtype) if layer.has_bias else None
        )
        with tape().belonging_to("base"):
            x = cast(x, compute)
            y = linear_4bit(x, self._packed(layer), cast(bias, compute) if bias is not None else None)
            return cast(y, dtype)

    def _packed(self, layer: Linear) -> Packed:
        """The 4-bit weight of a layer with its scales."""
        size = layer.n_out * layer.n_in
        blocks = -(-size // BLOCK)
        values = _stored(layer, "weight", ((size + 1) // 2, 1), "u8", size)
        absmax = _stored(layer, "absmax", (blocks,), "u8" if self.double_quant else "fp32")
        nested = None
        if self.double_quant:
            second = _stored(layer, "nested_absmax", (-(-blocks // NESTED_BLOCK),), "fp32")
            code = _stored(layer, "nested_quant_map", (256,), "fp32")
            nested = (second, code, _stored(layer, "offset", (), "fp32"))
        return Packed(values, absmax, nested, (layer.n_out, layer.n_in), layer.scope.dtype)


def _stored(layer: Linear, name: str, shape: tuple[int, ...], dtype: str, elements: int = 0) -> Parameter:
    made = layer.scope.parameter(f"{layer.name}.{name}", shape, "weight" if elements else "scale", dtype=dtype)
    made.elements = elements
    return made
