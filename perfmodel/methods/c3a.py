"""C³A as PEFT runs it: the update is a block-circular convolution, computed by Fourier transforms."""

from dataclasses import dataclass
from typing import ClassVar

from ..tape.elementary import div
from ..tape.pointwise import cast
from ..tape.spectrum import block_circular_convolution
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import positive
from .parts.targeted import Targeted


@method(
    "c3a",
    title="C3A",
    source="https://arxiv.org/abs/2407.19342; peft/tuners/c3a/layer.py",
    trains="circulant blocks",
    adds="fp32 FFTs",
)
@dataclass(frozen=True)
class C3a(Targeted):
    """y = xWᵀ + w ⊛ x: blocks of features are convolved with trained kernels, in fp32 at the frequencies."""

    block_size: int = option(256, "features of a block; divides the widths of the layer", positive)

    takes_conv1d: ClassVar[bool] = False
    family: ClassVar[str] = "c3a"

    def sizes(self) -> tuple[str, ...]:
        return ("block_size",)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        size = self.block_size
        self.check_divides(layer, "block_size", "input", "output")
        previous_dtype = x.dtype
        result = layer(x)
        x = cast(x, "fp32")
        kernel = cast(layer.adapter("c3a_kernel", (layer.n_out // size, layer.n_in // size, size), dtype), "fp32")
        x = div(block_circular_convolution(x, kernel), x.shape[-1])
        result = layer.add_to(result, cast(x, result.dtype))
        return cast(result, previous_dtype)
