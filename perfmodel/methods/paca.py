"""PaCA: some input columns of each target weight train in place.

The program is the authors' (github.com/WooSunghyeon/paca, peft/tuners/paca/layer.py): a forward writes the trained
columns into the weight and runs one GEMM. GPT-2's Conv1D stores inputs as rows, so there rows train.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..tape.core import tape
from ..tape.custom import index_buffer, partial_linear, write_columns
from ..tape.pointwise import cast, mul
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import float_dtype, positive
from .parts.targeted import Targeted, base_bias, base_weight


@method(
    "paca",
    title="PaCA",
    source="https://arxiv.org/abs/2503.01905",
    trains="r input columns of W",
    adds="column writes, gather",
)
@dataclass(frozen=True)
class Paca(Targeted):
    """Partial connections: r random input columns of each target weight train; backward keeps only those of X."""

    adapter_dtype: str | None = option(
        None, "dtype of the trained columns: bf16, fp16 or fp32; default the weight's", float_dtype
    )
    r: Any = option(8, "input columns that train", positive)
    alpha: float = option(8.0, "scale numerator; changes no cost")

    def dtype_beside(self, dtype: str) -> str:
        return self.adapter_dtype or dtype

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if np.any(np.greater(self.r, layer.n_in)):
            raise UserError(f"method paca: r {np.max(self.r)} exceeds the {layer.n_in} inputs of {layer.name}")
        weight, bias = base_weight(layer), base_bias(layer)
        shape = (self.r, layer.n_out) if layer.conv1d else (layer.n_out, self.r)
        trained = layer.adapter("paca_w", shape, dtype)
        indices = index_buffer(self.r)
        with tape().no_grad():
            write_columns(weight, indices, mul(cast(trained, weight.dtype), self.alpha))
        return partial_linear(x, weight, mul(trained, self.alpha), bias, indices, is_conv1d=layer.conv1d)
