"""Trainable tokens as PEFT runs them: some rows of the embedding train, the rest of the model is frozen."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import UserError
from ..tape.gather import replace_rows
from ..tape.linalg import linear
from ..tape.nn import embedding
from ..tape.pointwise import cast
from ..tape.tensor import Parameter, Storage, Tensor
from .parts.base import Method, Scope, method, option
from .parts.checks import positive


@method(
    "trainable_tokens",
    title="trainable tokens",
    source="peft/tuners/trainable_tokens/layer.py",
    trains="rows of the embedding",
    adds="a copy of the table",
)
@dataclass(frozen=True)
class TrainableTokens(Method):
    """A few rows of the embedding train; every use of it copies the whole table to put them in."""

    tokens: Any = option(2, "rows that train (the length of token_indices)", positive)

    aliases: ClassVar[dict[str, str]] = {"token_indices": "tokens"}

    def sizes(self) -> tuple[str, ...]:
        return ("tokens",)

    def check(self) -> None:
        arch = self.architecture
        assert arch is not None
        if np.any(np.greater(self.tokens, arch.vocab)):
            raise UserError(f"method {self.name}: tokens {np.max(self.tokens)} exceeds the vocabulary of {arch.name}")
        if arch.traits.head != "causal":
            raise UserError(f"method {self.name}: the tied head of {arch.name} is not modelled; use lora or bitfit")

    def words(self, model: Scope, weight: Parameter, ids: Tensor) -> Tensor:
        return embedding(self._merged(model, weight), ids)

    def head(self, scope: Scope, hidden: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
        return linear(hidden, self._merged(scope, weight))  # PEFT's layer around a tied head leaves its bias out

    def _merged(self, model: Scope, weight: Parameter) -> Tensor:
        """`get_merged_weights`: the table with the trained rows in it."""
        rows = (self.tokens, weight.shape[1])
        delta = model.parameter("trainable_tokens_delta", rows, "adapter", dtype="fp32", trainable=True)
        indices = Tensor((self.tokens,), "i64", (1,), self.tokens, Storage(0, None))
        return replace_rows(weight, indices, cast(delta, weight.dtype))
