"""VB-LoRA as PEFT runs it: the factors of all layers are mixed from one bank of vectors."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ..tape.elementary import sum_dim
from ..tape.gather import any_infinite, rows_of, top_values
from ..tape.linalg import linear
from ..tape.nn import softmax
from ..tape.pointwise import add, cast, dropout, mul
from ..tape.shape import reshape, transpose, unsqueeze
from ..tape.split import select
from ..tape.tensor import Tensor
from .parts.base import Linear, method, option
from .parts.checks import fraction, positive
from .parts.shared import SharedWeights


@method(
    "vblora",
    title="VB-LoRA",
    source="https://arxiv.org/abs/2405.15179; peft/tuners/vblora/layer.py",
    trains="vector bank, logits",
    adds="lora + topk, gathers",
)
@dataclass(frozen=True)
class VbLora(SharedWeights):
    """LoRA whose A and B are put together from the top-k vectors of a shared bank, chosen by trained logits."""

    breaks_graphs: ClassVar[bool] = True

    r: Any = option(4, "rank", positive)
    vectors: Any = option(256, "vectors in the bank (num_vectors)", positive)
    length: int = option(256, "elements of a vector (vector_length); divides the widths of the layer", positive)
    k: int = option(2, "vectors mixed into each piece (topk)", positive)
    dropout: float = option(0.0, "dropout on the adapter's input", fraction)

    aliases: ClassVar[dict[str, str]] = {
        **SharedWeights.aliases, "num_vectors": "vectors", "vector_length": "length", "topk": "k"
    }  # fmt: skip
    family: ClassVar[str] = "vblora"

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        previous_dtype = x.dtype
        result = layer(x)
        a, b = self._matrices(layer, dtype)
        x = cast(x, dtype)
        result = add(result, linear(linear(dropout(x, self.dropout), a), b))
        return cast(result, previous_dtype)

    def _matrices(self, layer: Linear, dtype: str) -> tuple[Tensor, Tensor]:
        """`_get_lora_matrices`: A (r, n_in) and B (n_out, r); whether a logit is infinite is asked every time."""
        self.check_divides(layer, "length", "input", "output")
        logits_a = layer.adapter("vblora_logits_A", (self.r, layer.n_in // self.length, self.vectors), dtype)
        logits_b = layer.adapter("vblora_logits_B", (layer.n_out // self.length, self.r, self.vectors), dtype)
        any_infinite(select(select(logits_a, 0), 0))
        bank = self.shared(layer, "vblora_vector_bank", (self.vectors, self.length), dtype)
        a = reshape(self._mixed(logits_a, bank), (self.r, layer.n_in))
        b = reshape(transpose(self._mixed(logits_b, bank), 1, 2), (layer.n_out, self.r))
        return a, b

    def _mixed(self, logits: Tensor, bank: Tensor) -> Tensor:
        """`_get_low_rank_matrix`: (…, vectors) → (…, length)."""
        top, indices = top_values(logits, self.k)
        weights = softmax(top)
        return sum_dim(mul(unsqueeze(weights, len(weights.shape)), rows_of(bank, indices)), -2)
