"""MiSS as PEFT runs it: one trained matrix shared by all shards of the input."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..program.dims import decide
from ..tape.elementary import sum_dim
from ..tape.linalg import matmul
from ..tape.pointwise import add, cast, dropout
from ..tape.shape import pad_last, reshape
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import fraction, positive
from .parts.targeted import Targeted


@method(
    "miss",
    title="MiSS",
    source="https://arxiv.org/abs/2409.15371; peft/tuners/miss/layer.py",
    trains="a matrix for all shards",
    adds="sum of shards, thin GEMM",
)
@dataclass(frozen=True)
class Miss(Targeted):
    """y = xWᵀ + (Σ of x's shards of r elements)·D: the sum replaces LoRA's first matrix."""

    r: Any = option(64, "elements of a shard", positive)
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)

    takes_conv1d: ClassVar[bool] = False

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if np.any(np.greater(self.r, layer.n_in)):
            raise UserError(f"method miss: r {np.max(self.r)} exceeds the input width {layer.n_in} of {layer.name}")
        previous_dtype = x.dtype
        result = layer(x)
        miss = layer.adapter("miss_block", (self.r, layer.n_out), dtype)
        if not decide(np.equal(layer.n_in % self.r, 0)):
            x = pad_last(x, self.r - layer.n_in % self.r)
        x = cast(x, dtype)
        shards = (*x.shape[:-1], x.shape[-1] // self.r, self.r)
        result = add(result, matmul(sum_dim(reshape(dropout(x, self.dropout), shards), -2), miss))
        return cast(result, previous_dtype)
