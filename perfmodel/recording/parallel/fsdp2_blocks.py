"""FSDP2 around blocks and the whole alone, as programs wrap a model that do it by themselves: KempnerForge, torchtitan.

Where such a model is compiled no hook ends a graph beside the blocks: the last norm ends the base model's frame, and
behind it head and loss are one graph. An embedding is one where transformers hooks it.

Source: torch 2.13, _fully_shard/_fully_shard.py (`reshard_after_forward`); graphs were looked at
(`validate/oracle/compiled.py`).
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from ...architectures.base import WORDS
from ...tape.core import begin_region, end_region, region, tape
from ...tape.pointwise import cast
from ...tape.tensor import Parameter, Tensor
from .fsdp2 import FullyShard
from .units import HALVES, HEAD, run_of


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


class ShardedHalves(ShardedBlocks):
    """The hooks where both halves of each LoRA are units, too.

    PEFT's layers call them as modules. What goes into A is cast to the dtype that its weight is kept in, as PEFT asks
    the shard, unless it is still gathered, and then to that in which it is. A Function in a layer's place calls no
    modules: Axolotl's gathers both halves before it, once a step, and they are reduced behind all else.

    Sources: axolotl 067b021, monkeypatch/accelerate/fsdp2.py (`fsdp2_prepare_model`), kernels/lora.py
    (`get_lora_parameters`); LLaMA-Factory v1, plugins/trainer_plugins/distributed/fsdp2.py (`prepare_model`).

    Args:
        by_function: whether layers are a Function's.
    """

    def __init__(self, *given: Any, by_function: bool, **options: Any) -> None:
        super().__init__(*given, **options)
        self.by_function = by_function

    def weight(self, p: Parameter) -> Tensor:
        """A Function's is gathered here (`FSDPModule.unshard`)."""
        half = self.units.get(p.name.removesuffix("weight"))
        if self.by_function and half is not None:
            self._unshard(half, forward=False)
        return p

    def _reduce_rest(self, paths: Sequence[str]) -> None:
        """Halves that no gradient has ended, which all of a Function's are, layer by layer."""
        super()._reduce_rest([path for path in paths if not path.endswith(HALVES)])
        left = [self.units[path] for path in paths if path.endswith(HALVES) and path not in self.done]
        for _, alike in groupby(left, lambda half: id(run_of(half.unit))):
            halves = list(alike)
            run = run_of(halves[0].unit)
            assert run is not None
            tape().begin("exchange", "backward").repeat = run.repeat
            for half in halves:
                self._reduce(half.unit.path, half)
        if left:
            tape().begin("exchange", "backward")

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A half of a LoRA is called between hooks of its own."""
        if not path.endswith(HALVES) or path not in self.units:
            return super().module(path, run, x)
        half = self.units[path]
        (whole, shard), *_ = half.unit.pairs
        x = cast(x, shard.dtype) if path.endswith(HALVES[0]) and not half.whole else x
        return FullyShard.module(self, path, run, cast(x, whole.dtype))
