"""Base layers that bitsandbytes keeps in 4 bit (`Linear4bit`), whatever adapts them."""

from dataclasses import dataclass
from typing import ClassVar

from ...program.dims import product
from ...program.dtypes import ITEMSIZE
from ...tape.core import tape
from ...tape.packages.quantized import BLOCK, NESTED_BLOCK, Packed, linear_4bit
from ...tape.pointwise import cast
from ...tape.tensor import Tensor
from .base import Linear, Method, Scope, option
from .checks import float_dtype, storage_dtype
from .quantised import bias_of, stored


@dataclass(frozen=True)
class FourBit(Method):
    """A subclass says which layers run `base`."""

    double_quant: bool = option(True, "whether the scales of the 4-bit blocks are quantised too")
    compute_dtype: str | None = option(
        None, "dtype of the GEMMs: bf16, fp16 or fp32; default the setup's dtype", float_dtype
    )

    quant_storage: str = option(
        "u8", "dtype that holds the packed values: u8, or for FSDP bf16, fp16 or fp32 as the rest has", storage_dtype
    )

    in_few_bits: ClassVar[bool] = True

    def base(self, layer: Linear, x: Tensor) -> Tensor:
        """y of a quantised base layer."""
        dtype, compute = x.dtype, self.compute_dtype or layer.scope.dtype
        bias = bias_of(layer, dtype)
        packed = self.packed(
            layer.scope, layer.name, f"{layer.name}.weight", (layer.n_out, layer.n_in), self.quant_storage
        )
        with tape().belonging_to("base"):
            y = linear_4bit(cast(x, compute), packed, cast(bias, compute) if bias is not None else None)
            return cast(y, dtype)

    def packed(self, scope: Scope, module: str, name: str, shape: tuple[int, ...], storage: str = "u8") -> Packed:
        """The 4-bit weight of that name and shape, with the scales of its module."""
        size, held = int(product(shape)), 2 * ITEMSIZE[storage]
        blocks = -(-size // BLOCK)
        values = stored(scope, name, ((size + 1) // held, 1), storage, size)
        absmax = stored(scope, f"{module}.absmax", (blocks,), "u8" if self.double_quant else "fp32")
        nested = None
        if self.double_quant:
            second = stored(scope, f"{module}.nested_absmax", (-(-blocks // NESTED_BLOCK),), "fp32")
            code = stored(scope, f"{module}.nested_quant_map", (256,), "fp32")
            nested = (second, code, stored(scope, f"{module}.offset", (), "fp32"))
        return Packed(values, absmax, nested, shape, scope.dtype)
