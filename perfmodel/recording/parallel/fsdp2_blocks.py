"""FSDP2 around blocks and the whole alone, as programs wrap a model that do it by themselves: KempnerForge, torchtitan.

Where such a model is compiled no hook ends a graph beside the blocks: the last norm ends the base model's frame, and
behind it head and loss are one graph. An embedding is one where transformers hooks it.

Source: torch 2.13, _fully_shard/_fully_shard.py (`reshard_after_forward`); graphs were looked at
(`validate/oracle/compiled.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

from ...architectures.base import WORDS
from ...tape.core import begin_region, end_region, region
from ...tape.tensor import Tensor
from .fsdp2 import FullyShard
from .units import HEAD


class CutModules(FullyShard):
    """The hooks around units of accelerate's where ranks share layers, too: the words' and the head's have theirs."""

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What has a hook of its own is no module of PyTorch's to Dynamo, which compiles it."""
        alone = path == HEAD or path[:-1].endswith(WORDS)
        return super().module(path, region(run) if alone else run, x)


class ShardedBlocks(FullyShard):
    """The hooks.

    Args:
        hooks_words: whether the embedding has a hook: its output is made one that needs a gradient
            (`enable_input_require_grads`), or ranks share it.
    """

    def __init__(self, *given: Any, hooks_words: bool, **options: Any) -> None:
        super().__init__(*given, **options)
        self.hooks_words = hooks_words

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A module beside the blocks has no hook of FSDP's."""
        if path == HEAD:
            begin_region()
        elif self.hooks_words and path[:-1].endswith(WORDS):
            run = region(run)
        return run(x)

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Behind the loss."""
        end_region()
        return super().end(outputs)
