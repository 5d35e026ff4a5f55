"""What a rank of Megatron-Core's program does, with what would be one kernel of a GPU noted as one call."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from perfmodel.tracing.programs.dtypes import DTYPES
from perfmodel.tracing.trace import signature

from .. import parallel


class Waited(NamedTuple):
    """Compute waits for what was sent; how many collectives between ranks and how many products came before."""

    phase: str
    collectives: int
    products: int


class KernelRecorder(parallel.RankRecorder):  # type: ignore[no-untyped-call]
    """Also notes kernels that stand for several calls of ATen, products in their order, and waits.

    Attributes:
        multiplied: phase and FLOPs of each product and each attention.
        waits: in their order, those in a row once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multiplied: list[tuple[str, int]] = []
        self.waits: list[Waited] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.trace.flops.get(self.phase, 0)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self._multiply(self.trace.flops.get(self.phase, 0) - before)
        return out

    def _note(self, phase: str, func: Any, inputs: Any, outputs: Any, arguments: Any) -> None:
        if func._schema.name.endswith("_tensor_coalesced_"):  # whose schema does not say what it writes
            (into, given, *_), _ = arguments
            inputs, outputs = given, into
        super()._note(phase, func, inputs, outputs, arguments)

    def kernel(self, name: str, inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor], flops: int) -> None:
        """Note a call that is none of ATen's."""
        if not self.recording:
            return
        inputs, outputs = list(inputs), list(outputs)
        specs = ([(DTYPES[t.dtype], tuple(t.shape)) for t in tensors] for tensors in (inputs, outputs))
        self.trace.calls[self.phase][signature(name, *specs)] += 1
        self.trace.flops[self.phase] += flops
        self._multiply(flops)
        self.products += flops > 0
        for t in outputs:
            self._watch(t)
        self.trace.peak = max(self.trace.peak, self.live)

    def wait(self, ranks: int) -> None:
        """Note that compute waits for a collective of so many ranks."""
        waited = Waited(self.phase, sum(c.group > 1 for c in self.collectives), self.products)
        if self.recording and ranks > 1 and self.waits[-1:] != [waited]:
            self.waits.append(waited)

    def _multiply(self, flops: int) -> None:
        if flops:
            self.multiplied.append((self.phase, flops))


def as_kernel(
    name: str, inputs: Iterable[torch.Tensor], run: Callable[[], Any], flops: int = 0, into: Iterable[torch.Tensor] = ()
) -> Any:
    """Run what is one kernel on a GPU; recorders see that kernel and nothing inside.

    Args:
        run: makes its outputs, one or several.
        into: what it writes beside those.
    """
    with _disable_current_modes():
        out = run()
    made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, KernelRecorder):
            mode.kernel(name, inputs, [*made, *into], flops)
    return out
