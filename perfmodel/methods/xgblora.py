"""XGBLoRA: gradient boosting with LoRA of rank 1 on some of the blocks."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .lora import Lora
from .parts.base import Periodic, method, option
from .parts.checks import positive
from .parts.merging import merge_and_restart


@method(
    "xgblora",
    title="XGBLoRA",
    source="https://arxiv.org/abs/2410.19694",
    trains="rank-1 A, B, some blocks",
    adds="as lora; merges",
)
@dataclass(frozen=True)
class XgbLora(Lora):
    """LoRA of rank 1 on a random draw of blocks, merged every kappa steps before the next draw.

    Backward stops at the lowest block drawn. The program is that of a draw of mean depth: block i of n lies at the mean
    of the i-th smallest of n numbers drawn from all blocks, so its cost is the mean over draws.
    """

    r: Any = option(1, "rank; the paper's boosters have rank 1", positive)
    blocks: int | None = option(None, "blocks of a draw; default a third of them, as the paper's 11 of 32", positive)
    kappa: int = option(1000, "steps between two merges; changes no cost of a step", positive)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers_to_transform is not None:
            raise UserError("method xgblora: its blocks are drawn; give their number, blocks=, instead of layers")

    def check(self) -> None:
        super().check()
        assert self.architecture is not None
        if self.blocks is not None and self.blocks > self.layers:
            raise UserError(
                f"method xgblora: blocks {self.blocks} exceeds the {self.layers} blocks of {self.architecture.name}"
            )

    @property
    def drawn(self) -> tuple[int, ...]:
        """The blocks of a draw of mean depth, from 0."""
        n = self.blocks or -(-self.layers // 3)
        return tuple(round((i + 1) * (self.layers + 1) / (n + 1)) - 1 for i in range(n))

    def targets_layer(self, name: str, layer: int | None) -> bool:
        return layer in self.drawn and super().targets_layer(name, layer)

    def layer_key(self, layer: int) -> Hashable:
        return layer in self.drawn and super().layer_key(layer)

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("merge and restart", self.kappa, merge_and_restart),)
