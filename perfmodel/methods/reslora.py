"""ResLoRA: LoRA with residual paths from the same layer of earlier blocks.

The program is the authors' (github.com/microsoft/LMOps, reslora/myloralib/layers.py); adapters have the base's dtype.
"""

from bisect import bisect
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

from ..errors import UserError
from ..tape.tensor import Tensor
from .lora import Lora
from .parts.base import Linear, method, option
from .parts.checks import choice
from .parts.shortcuts import SHORTCUTS, Adapter


@method(
    "reslora",
    title="ResLoRA",
    source="https://arxiv.org/abs/2402.18039; github.com/microsoft/LMOps, reslora",
    trains="A, B",
    adds="lora + earlier blocks",
)
@dataclass(frozen=True)
class ResLora(Lora):
    """LoRA with shortcuts: of the input (is), of the adapters (bs), or of xAᵀ (ms) of the same layer in earlier blocks.

    is: the adapter reads x plus the previous block's x. bs: the adapters of the `pre_num` blocks before run on x too.
    ms: B reads xAᵀ plus that of the `pre_num` blocks before. Merge flags choose how it is merged after training; with
    some of them every layer reads a norm back in every forward, and the host waits.
    """

    shortcut: str = option("is", "is, bs or ms (the authors' res_flag 1, 2, 3)", choice(SHORTCUTS))
    pre_num: int = option(4, "earlier blocks that bs and ms reach back to; -1: all")
    merge_flag: int = option(0, "0, 3 (merge_bi) or 4 (merge_bw)")

    implementations: ClassVar[tuple[str, ...]] = ("peft",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pre_num < 1 and self.pre_num != -1:
            raise UserError(f"method reslora: pre_num must be from 1, or -1 for all, got {self.pre_num}")
        if self.merge_flag not in (0, 3, 4):
            raise UserError(f"method reslora: merge_flag must be 0, 3 or 4, got {self.merge_flag}")

    def sizes(self) -> tuple[str, ...]:
        return ("r", "shortcut")

    def dtype_beside(self, dtype: str) -> str:
        return self.dtype_of_base(dtype)

    @property
    def reach(self) -> int:
        """Blocks that a layer reaches back to, where there are so many."""
        return 1 if self.shortcut == "is" else self.layers if self.pre_num == -1 else self.pre_num

    def layer_key(self, layer: int) -> Hashable:
        """Blocks near either end of a stack have other blocks before or after them; those between are alike, unless a
        regex takes other layers of one than of another."""
        assert self.architecture is not None
        ends = list(accumulate(count for _, count in self.architecture.stacks))
        stack = bisect(ends, layer)
        row = range(ends[stack] - self.architecture.stacks[stack][1], ends[stack])
        matched = {i: key for i in row if (key := super(ResLora, self).layer_key(i))}
        if layer not in matched:
            return "frozen"
        adapted = list(matched)
        place, after = adapted.index(layer), len(adapted) - 1 - adapted.index(layer)
        near_an_end = place <= self.reach or after < self.reach
        return layer if near_an_end or len(set(matched.values())) > 1 else "between"

    def adapted(self, layer: Linear, x: Tensor, dtype: str) -> Tensor:
        if layer.scope.layer is None:
            raise UserError("method reslora: the head has no earlier block; leave out lm_head")
        if layer.scope.build.setup.checkpoint != "none":
            raise UserError("method reslora: shortcuts reach out of checkpointed blocks; leave out --checkpoint")
        adapter = Adapter(layer, self.weights(layer, dtype), self.dropout, self.reach, self.merge_flag)
        return SHORTCUTS[self.shortcut](adapter, layer(x), x)
