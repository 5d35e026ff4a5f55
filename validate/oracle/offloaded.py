"""What a program that offloads does, on a machine without a GPU: the host's memory and the device's are told apart.

Here both are the CPU, so copies between them would be left out: where the program names a device to copy to, it is made
to name the CPU by its number, which PyTorch takes for another device than the one without a number.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

NUMBERED = torch.device("cpu:0")
COPY = torch.ops.aten._to_copy.default
COPY_INTO = torch.ops.aten.copy_.default


class HostMemory:
    """Storages that live in the host's memory, which the device's does not count.

    Attributes:
        makes: whether all that is made now is made there.
        crossed: (dtype, elements) of each copy from one memory into what is there already of the other.
    """

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self.makes = False
        self.crossed: list[tuple[torch.dtype, int]] = []

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """These live there."""
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in self.keys:
                self.keys.add(storage._cdata)
                weakref.finalize(storage, self.keys.discard, storage._cdata)

    def has(self, t: torch.Tensor) -> bool:
        """Whether a tensor does."""
        return t.untyped_storage()._cdata in self.keys

    def note(self, func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor], arguments: Any) -> None:
        """A copy from one memory to the other, or what is made there."""
        if func is COPY_INTO and self.has(inputs[0]) != self.has(inputs[1]):
            self.crossed.append((inputs[0].dtype, inputs[0].numel()))
        crosses = func is COPY and arguments[1].get("device") == NUMBERED
        if self.makes or (crosses and not self.has(inputs[0])):
            self.hold(outputs)


class _Numbered:
    """torch, whose devices have numbers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: str) -> torch.device:
        """The CPU by its number."""
        return torch.device(f"{name}:0")


@contextmanager
def copies_across(model: Any) -> Iterator[None]:
    """Let FSDP2 copy shards to a device, and gradients back, as with a GPU."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for p in group.fsdp_params:
                p.device = NUMBERED
    with patch.object(_fsdp_collectives, "torch", _Numbered()):
        yield
