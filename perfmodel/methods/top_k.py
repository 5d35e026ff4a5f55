"""Only the last K blocks train: the remedy that "LoRA Is Slower Than You Think" points to."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import UserError
from ..tape.tensor import Tensor
from .lora import Lora
from .parts.base import Linear, Method, method, option
from .parts.checks import choice, float_dtype, fraction, positive

OF_LORA = ("r", "targets", "dropout", "adapter_dtype")  # options that mean nothing where whole weights train


@method(
    "top_k",
    title="last blocks",
    source="https://arxiv.org/abs/2507.08833",
    trains="last K blocks (or A, B)",
    adds="nothing (or as lora)",
)
@dataclass(frozen=True)
class TopK(Method):
    """Only the last K blocks train, their weights or LoRA inside them; backward stops below."""

    k: int = option(4, "number of blocks, counted from the output", positive)
    inner: str = option("full", "what trains inside them: full or lora", choice(("full", "lora")))
    r: Any = option(8, "rank (inner=lora)", positive)
    targets: tuple[str, ...] = option((), "targets (inner=lora)")
    dropout: float = option(0.0, "adapter dropout (inner=lora)", fraction)
    adapter_dtype: str | None = option(None, "adapter dtype (inner=lora)", float_dtype)
    trained_dtype: str | None = option(None, "dtype of what trains (inner=full); default the base's", float_dtype)
    spread: bool = option(False, "not the last: the last of every L/K of L blocks, where LLaMA-Pro adds its own")
    checkpoint_frozen: bool = option(True, "whether --checkpoint covers frozen blocks too; LLaMA-Factory's does not")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._lora()

    def in_words(self) -> str:
        lora = replace(self._lora(), architecture=self.architecture)
        which = f"{self.k} blocks at equal distances" if self.spread else f"the top {self.k} blocks"
        return f"{'full fine-tuning' if self.inner == 'full' else lora.in_words()} of {which}"

    def sizes(self) -> tuple[str, ...]:
        return ("k", "r") if self.inner == "lora" else ("k",)

    def _lora(self) -> Lora:
        return Lora(r=self.r, targets=self.targets, dropout=self.dropout, adapter_dtype=self.adapter_dtype)

    def check(self) -> None:
        if self.k > self.layers:
            assert self.architecture is not None
            raise UserError(f"method top_k: k {self.k} exceeds the {self.layers} blocks of {self.architecture.name}")
        if self.spread and self.layers % self.k:
            raise UserError(f"method top_k: spread: {self.layers} blocks are no multiple of k {self.k}")
        idle = next((f for f in OF_LORA if not np.array_equal(getattr(self, f), getattr(type(self), f))), None)
        if self.inner == "full" and idle:
            raise UserError(f"method top_k: {idle} goes with inner=lora")
        if self.inner == "lora":
            self.inside.check()
            if self.trained_dtype:
                raise UserError("method top_k: trained_dtype goes with inner=full; use adapter_dtype")

    @property
    def inside(self) -> Lora:
        """The LoRA of the K blocks."""
        top = tuple(filter(self.has, range(self.layers)))
        return replace(self._lora(), layers_to_transform=top, architecture=self.architecture)

    def has(self, layer: int) -> bool:
        """Whether a block is one of the K."""
        return (layer + 1) % (self.layers // self.k) == 0 if self.spread else layer >= self.layers - self.k

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return self.inner == "full" and layer is not None and self.has(layer)

    def dtype_of_trained(self, dtype: str) -> str:
        return self.trained_dtype or dtype

    def in_one_dtype(self, dtype: str) -> "TopK":
        return replace(super().in_one_dtype(dtype), trained_dtype=None)

    def checkpoints(self, layer: int) -> bool:
        return self.checkpoint_frozen or self.has(layer)

    def copies(self, name: str, kind: str) -> bool:
        return self.inner == "lora" and self.inside.copies(name, kind)

    def layer_key(self, layer: int) -> Hashable:
        return self.has(layer)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        return self.inside.linear(layer, x) if self.inner == "lora" else layer(x)
