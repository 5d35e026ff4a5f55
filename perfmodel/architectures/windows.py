"""Layers that attend within a sliding window beside layers that attend to all, by `layer_types` of the config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..tape.tensor import Tensor
from .base import Scope
from .config import Config
from .llama import FULL, SLIDING, Llama, Masks


def alternating(config: Config, every: int, window: int) -> dict[str, Any]:
    """Dims of layers of which one in `every` attends to all and the others slide, unless the config lists their types.

    Args:
        window: the model type's own width of the window in tokens.
    """
    usual = [SLIDING if (i + 1) % every else FULL for i in range(config.count("num_hidden_layers"))]
    return {"window": config.count("sliding_window", default=window), "layer_types": layer_types(config, usual)}


def layer_types(config: Config, usual: Sequence[str]) -> tuple[str, ...]:
    """How each layer attends; `usual` where the config does not list it."""
    return config.each_of("layer_types", usual, (FULL, SLIDING))


@dataclass(frozen=True)
class TwoTables(Llama):
    """Layers that slide have rotary tables of their own: those of the others come first."""

    def rotary_tables(self, position_ids: Tensor, dtype: str) -> tuple[Tensor, ...]:
        return tuple(
            t for _ in set(self.layer_types) for t in super(TwoTables, self).rotary_tables(position_ids, dtype)
        )

    def block(self, layer: Scope, x: Tensor, mask_of: Masks, *rotary: Tensor) -> Tensor:
        cos, sin = rotary[-2:] if self.reach(layer.index) == SLIDING else rotary[:2]
        return super().block(layer, x, mask_of, cos, sin)
