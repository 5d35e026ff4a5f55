"""BAdam: block coordinate descent, Adam on one block of layers at a time."""

from collections.abc import Hashable
from dataclasses import dataclass, replace

from ..errors import UserError
from ..optimizers import Update
from ..optimizers.parts.ops import in_place
from ..optimizers.parts.update import copy_in, gradient
from ..tape.pointwise import cast
from ..tape.shape import clone
from ..tape.tensor import Parameter
from .parts.base import Method, Periodic, method, option
from .parts.checks import positive
from .parts.periodic import Recorded, fresh_states, layers_alike, trained


@method(
    "badam",
    title="BAdam",
    source="https://arxiv.org/abs/2404.02827",
    trains="one block at a time",
    adds="block switches",
)
@dataclass(frozen=True)
class BAdam(Method):
    """One block of layers trains, all else is frozen; backward stops at that block.

    The lower the active block, the longer the backward: over a run the cost of a step is the mean over `cycle`. The
    setup's optimizer works on fp32 copies of the active weights and their gradients (`BlockOptimizer`). That it also
    empties the allocator's cache after every step is left out.
    """

    block: int | None = option(None, "the active block, 0 next to the embedding; default the middle one, near the mean")
    interval: int = option(50, "steps between two switches; changes no cost of a step", positive)
    checkpoint_frozen: bool = option(True, "whether --checkpoint covers frozen blocks too; LLaMA-Factory's does not")

    def check(self) -> None:
        assert self.architecture is not None
        if self.block is not None and not 0 <= self.block < self.layers:
            raise UserError(
                f"method badam: block {self.block} is outside 0-{self.layers - 1} of {self.architecture.name}"
            )

    @property
    def active(self) -> int:
        """The block that trains."""
        return self.layers // 2 if self.block is None else self.block

    def cycle(self) -> list["BAdam"]:
        """The programs of a whole cycle, one a block: their mean is the cost of a step."""
        return [replace(self, block=i) for i in range(self.layers)]

    def update(self, update: Update) -> None:
        masters = [_master(update, p) for p in update.parameters]
        update.part()
        for p, master in zip(update.parameters, masters, strict=True):
            master.grad, p.grad = cast(gradient(p), "fp32"), None
        update.group([m for m in masters if not m.name.endswith("bias")])
        update.group([m for m in masters if m.name.endswith("bias")])
        update.part()
        for p, master in zip(update.parameters, masters, strict=True):
            in_place("copy_", p, cast(master, p.dtype))
        for master in masters:
            master.grad = None

    def periodic(self) -> tuple[Periodic, ...]:
        return (Periodic("switch of the block", self.interval, _switch),)

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        return layer == self.active

    def checkpoints(self, layer: int) -> bool:
        return self.checkpoint_frozen or layer == self.active

    def layer_key(self, layer: int) -> Hashable:
        return layer == self.active


def _master(update: Update, p: Parameter) -> Parameter:
    """The fp32 copy of a weight that the optimizer works on, one tensor: only one block trains."""
    update.state(p, dtype="fp32")
    return copy_in(p, "fp32")


def _switch(step: Recorded) -> None:
    """fp32 copies of the new block; the optimizer's state begins anew (badam/block_optim.py)."""
    for p in trained(step):
        with layers_alike("fp32 copy", p.count):
            cast(clone(p), "fp32")
    fresh_states(step, trained(step), dtype="fp32")
