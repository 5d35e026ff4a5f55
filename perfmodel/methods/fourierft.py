"""FourierFT as PEFT runs it: a few trained coefficients of the update's spectrum."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..tape.gather import index_put
from ..tape.linalg import linear
from ..tape.pointwise import add, cast, fill, mul
from ..tape.spectrum import inverse_fft2, real, to_complex
from ..tape.split import select
from ..tape.tensor import Tensor
from ..tape.transfers import moved_to_device
from .parts.base import Linear, method, option
from .parts.checks import positive
from .parts.targeted import Targeted


@method(
    "fourierft",
    title="FourierFT",
    source="https://arxiv.org/abs/2405.03003; peft/tuners/fourierft/layer.py",
    trains="n coefficients",
    adds="dense FFT, full GEMM",
)
@dataclass(frozen=True)
class FourierFt(Targeted):
    """y = xWᵀ + x·F⁻¹(c)ᵀ: a weight-sized inverse transform of n coefficients in every forward."""

    n: Any = option(1000, "trained coefficients of each layer's spectrum (n_frequency)", positive)

    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "n_frequency": "n"}
    family: ClassVar[str] = "fourierft"

    def sizes(self) -> tuple[str, ...]:
        return ("n",)

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if np.any(np.greater(self.n, layer.n_in * layer.n_out)):
            raise UserError(f"method {self.name}: n {np.max(self.n)} exceeds the elements of {layer.name}'s weight")
        previous_dtype = x.dtype
        result = layer(x)
        delta = self._delta(layer, dtype)
        x = cast(x, delta.dtype)
        result = add(result, linear(x, delta))
        return cast(result, previous_dtype)

    def _delta(self, layer: Linear, dtype: str) -> Tensor:
        """`get_delta_weight`; the transform is done in fp32 whatever the coefficients are."""
        spectrum = layer.adapter("fourierft_spectrum", (self.n,), dtype)
        dense = fill("zeros", (layer.n_out, layer.n_in), "fp32")
        places = moved_to_device((2, self.n), "i64")  # no parameter and no buffer, so that it stays where PEFT drew it
        dense = index_put(dense, select(places, 0), select(places, 0), cast(spectrum, "fp32"))
        return cast(mul(real(inverse_fft2(to_complex(dense))), 150.0), spectrum.dtype)
