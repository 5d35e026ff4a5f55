"""On whose account a call of a real program runs, as the tape keeps it (`Op.owner`): the base model's or an adapter's.

In forward the module that runs tells: what an adapter of peft runs besides the layer that it wraps is the adapter's. In
backward the autograd node tells, which has the owner of its forward call. A sum of gradients that would not be there
without an adapter is the adapter's, the sum over micro-batches is "accumulation".
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._C._autograd import _get_sequence_nr

BASE, ADAPTER, ACCUMULATION = "base", "adapter", "accumulation"
LEAF = 2**63  # nodes that accumulate a leaf's gradient have the highest number that there is


class Owners:
    """Owners of calls, by the modules that run and the nodes that they leave.

    Args:
        model: what trains.
        bare: the model without what peft puts around it.
    """

    def __init__(self, model: torch.nn.Module, bare: torch.nn.Module) -> None:
        around = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        inside = [m.get_base_layer() for m in around]
        kept = {id(p) for m in inside for p in m.parameters()}
        self.adapters = {id(m) for m in around} | ({id(model)} - {id(bare)})
        self.wrapped = {id(m) for m in inside} | _words(bare)
        self.bare = bare
        self.trained = {id(p) for m in around for p in m.parameters()} - kept
        self.running = [BASE]
        self.by_node: dict[int, str] = {}
        self.made: dict[int, str] = {}  # storage -> who wrote it last

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the modules that run."""
        call = torch.nn.Module.__call__

        def followed(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            owner = ADAPTER if id(module) in self.adapters else BASE if id(module) in self.wrapped else self.running[-1]
            self.running.append(owner)
            try:
                return call(module, *args, **kwargs)
            finally:
                self.running.pop()

        forward = self.bare.forward

        def of_bare(*args: Any, **kwargs: Any) -> Any:  # some tuners call it past the module
            self.running.append(BASE)
            try:
                return forward(*args, **kwargs)
            finally:
                self.running.pop()

        with patch.object(torch.nn.Module, "__call__", followed), patch.object(self.bare, "forward", of_bare):
            yield

    def of(self, phase: str, name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> tuple[str, bool]:
        """Whose call it is, and whether a checkpoint runs it again."""
        node = torch._C._current_autograd_node() if phase == "backward" else None
        again = phase == "backward" and (len(self.running) > 1 or (node is not None and torch.is_grad_enabled()))
        if node is None or again:
            owner = self.running[-1]
            self.by_node.setdefault(_get_sequence_nr() - 1, owner)
        else:
            owner = self._of_node(node, name, inputs)
        if phase == "backward" and not again:
            mixed = name == "add.Tensor" and not all(map(self._of_an_adapter, inputs))
            self.made.update({_memory(t): BASE if mixed else owner for t in outputs})
        return owner, again

    def _of_node(self, node: Any, name: str, inputs: list[torch.Tensor]) -> str:
        number = node._sequence_nr()
        if number >= LEAF:
            return ADAPTER if id(node.variable) in self.trained else ACCUMULATION
        if name == "add.Tensor" and any(map(self._of_an_adapter, inputs)):
            return ADAPTER
        return self.by_node.get(number, BASE)

    def _of_an_adapter(self, t: torch.Tensor) -> bool:
        return self.made.get(_memory(t)) == ADAPTER


def _words(bare: Any) -> set[int]:
    """The embedding of the words, which tuners of virtual tokens call by themselves."""
    try:
        return {id(bare.get_input_embeddings())}
    except (AttributeError, NotImplementedError):  # not of transformers, or of images
        return set()


def _memory(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)
