"""Prefix tuning as PEFT runs it: trained keys and values before those of the text, in every block."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..architectures.runs import runs_of_layers
from ..errors import UserError
from ..tape.core import tape
from ..tape.linalg import linear
from ..tape.nn import embedding
from ..tape.pointwise import cast, fill, tanh
from ..tape.prefix import first_in_cache, split_layers, unbind_pair
from ..tape.shape import narrow, permute, view
from ..tape.tensor import Tensor
from .parts.base import Scope, method, option
from .parts.checks import positive
from .parts.virtual import VirtualTokens


@method(
    "prefix_tuning",
    title="prefix tuning",
    source="https://arxiv.org/abs/2101.00190; peft/tuners/prefix_tuning/model.py",
    trains="keys, values of a prefix",
    adds="longer attention",
)
@dataclass(frozen=True)
class PrefixTuning(VirtualTokens):
    """Trained keys and values in a cache before the text: attention grows, linear layers do not."""

    projection: bool = option(False, "whether an MLP makes them (prefix_projection)")
    width: Any = option(None, "hidden width of that MLP; default the width of the keys", positive)

    fills_cache: ClassVar[bool] = True
    aliases: ClassVar[dict[str, str]] = {
        **VirtualTokens.aliases, "prefix_projection": "projection", "encoder_hidden_size": "width"
    }  # fmt: skip

    def check(self) -> None:
        super().check()
        assert self.architecture is not None
        if self.architecture.traits.cache is None:
            raise UserError(
                f"method {self.name}: the program of {self.architecture.name} takes no cache as PEFT fills it; "
                "use prompt_tuning or lora"
            )

        windows = [w for i in range(self.layers) if (w := self.architecture.window_of(i)) is not None]
        if (
            self.architecture.traits.cache == "by layer"
            and windows
            and np.any(np.greater_equal(self.tokens, min(windows)))
        ):
            raise UserError(
                f"method {self.name}: tokens {np.max(self.tokens)} reach the sliding window {min(windows)} of "
                f"{self.architecture.name}; use fewer"
            )

    def inputs(self, model: Scope, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if model.build.setup.checkpoint != "none":
            raise UserError(f"method {self.name}: PEFT's prefix tuning does not work with activation checkpointing")
        attention, labels = super().inputs(model, attention, labels)
        model.begin("prefix")
        self._fill_cache(model, attention.shape[0])
        return attention, labels

    def _fill_cache(self, model: Scope, batch: Any) -> None:
        """`get_prompt`: embed, cut into layers, and copy into a cache, before the base model runs."""
        arch = self.architecture
        assert arch is not None
        by_layer = arch.traits.cache == "by layer"
        past = self._encode(model, self.indices(batch), arch.kv_heads * arch.head_dim)
        past = cast(past, model.dtype)
        past = view(past, (batch, self.tokens, 2 * arch.layers, arch.kv_heads, arch.head_dim))
        runs = runs_of_layers(arch, self, ends_apart=tape().wrapping is not None)
        layers = [(first + i, times) for first, period, times in runs for i in range(period)]
        parts = split_layers(permute(past, (2, 0, 3, 1, 4)), [times for _, times in layers])
        if by_layer:
            fill("arange", (self.tokens,), "i64")  # positions, which nothing reads
        for (layer, times), part in zip(layers, parts, strict=True):
            tape().begin("prefix of blocks", "forward").repeat = times
            key, value = unbind_pair(part if by_layer else narrow(part, 0, 2))
            window = arch.window_of(layer) if by_layer else None
            model.build.past.append((self._cached(key, window), self._cached(value, window)))
        tape().begin("prefix", "forward")  # where the tensor that was cut dies, once

    def _cached(self, x: Tensor, window: int | None) -> Tensor:
        """`update` of a layer's empty cache; a sliding one keeps what its window reaches."""
        x = first_in_cache(x)
        return x if window is None else narrow(x, -2, self.tokens)

    def _encode(self, model: Scope, indices: Tensor, token_dim: int) -> Tensor:
        assert self.architecture is not None
        all_layers = 2 * self.architecture.layers * token_dim
        if not self.projection:
            return embedding(self.weight(model, "embedding.weight", self.tokens, all_layers), indices)
        width = token_dim if self.width is None else self.width
        x = embedding(self.weight(model, "embedding.weight", self.tokens, token_dim), indices)
        x = linear(
            x, self.weight(model, "transform.0.weight", width, token_dim), self.weight(model, "transform.0.bias", width)
        )
        return linear(
            tanh(x),
            self.weight(model, "transform.2.weight", all_layers, width),
            self.weight(model, "transform.2.bias", all_layers),
        )
