"""GraLoRA as PEFT runs it: the weight is cut into k × k blocks, each with an adapter of its own."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..tape.einsum import grouped
from ..tape.linalg import linear
from ..tape.pointwise import cast, dropout, mul
from ..tape.shape import permute, reshape, squeeze, unsqueeze, view
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import fraction, not_negative, positive
from .parts.targeted import Targeted


@method(
    "gralora",
    title="GraLoRA",
    source="https://arxiv.org/abs/2505.20355; peft/tuners/gralora/layer.py",
    trains="A, B of k x k blocks",
    adds="batched thin GEMMs",
)
@dataclass(frozen=True)
class Gralora(Targeted):
    """LoRA in k × k blocks of the weight: the first products share their input, the second gather their outputs."""

    r: Any = option(32, "rank, divided by k in each block", positive)
    k: int = option(2, "blocks along each side of the weight", positive)
    hybrid: int = option(0, "rank of a plain LoRA beside the blocks (hybrid_r)", not_negative)
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)

    takes_four_dims: ClassVar[bool] = False
    aliases: ClassVar[dict[str, str]] = {**Targeted.aliases, "gralora_k": "k", "hybrid_r": "hybrid"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if np.any(np.mod(self.r, self.k)):
            raise UserError(f"method {self.name}: r must be a multiple of k {self.k}, got {self.r}")

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        k, sub = self.k, self.r // self.k
        self.check_divides(layer, "k", "input", "output")
        previous_dtype = x.dtype
        result = layer(x)
        result_dtype = result.dtype
        a = layer.adapter("gralora_A", (k, layer.n_in // k, self.r), dtype)
        b = layer.adapter("gralora_B", (k, self.r, layer.n_out // k), dtype)
        flat = len(x.shape) == 2  # tokens without a batch, as OPT's MLP gets them
        if flat:
            x = unsqueeze(x, 1)
        batch, seq, n_in = x.shape
        inner = grouped(view(dropout(cast(x, dtype), self.dropout), (batch, seq, k, n_in // k)), a)
        inner = permute(view(inner, (batch, seq, k, k, sub)), (0, 1, 3, 2, 4))
        output = reshape(grouped(reshape(inner, (batch, seq, k, self.r)), b), (batch, seq, layer.n_out))
        if flat:
            output = squeeze(output, 1)
        result = layer.add_to(result, mul(cast(output, result_dtype), 2.0))
        if self.hybrid:
            output = self._general(layer, x, dtype)
            if flat:
                output = squeeze(output, 1)
            result = layer.add_to(result, mul(cast(output, result_dtype), 2.0))
        return cast(result, previous_dtype)

    def _general(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        a = layer.adapter("gralora_A_general.weight", (self.hybrid, layer.n_in), dtype)
        b = layer.adapter("gralora_B_general.weight", (layer.n_out, self.hybrid), dtype)
        return linear(linear(dropout(cast(x, dtype), self.dropout), a), b)
