"""Work that comes beside the steps: once per run, or every so many steps (merges, SVDs, re-initialisation, pre-passes).

A method lists it in `Method.periodic`; its ops are recorded on a tape of their own, counted and priced like those of a
step. The figures of the step stay without them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from typing import Any, NamedTuple, Protocol

from ... import optimizers
from ...architectures.base import Architecture
from ...errors import UserError
from ...program.dims import Dim, same_shape
from ...program.part import Group, Part
from ...setup import Setup
from ...tape.core import record, tape
from ...tape.pointwise import fill
from ...tape.tensor import Parameter
from ...values import immutable


class Recorded(Protocol):
    """What a method may ask of a step that was recorded."""

    architecture: Architecture
    setup: Setup
    device: str
    parameters: list[Parameter]
    state_bytes: Dim

    @property
    def optimizer(self) -> str:
        """The optimizer form that runs."""


@immutable
class Periodic:
    """Work that a method does besides its steps.

    Attributes:
        what: a few words for tables.
        every: steps between two of it; None: once per run.
        record: records its ops, without autograd, into parts that it begins (`layers_alike`); gets the recorded step.
    """

    what: str
    every: int | None
    record: Callable[[Recorded], None]

    def __post_init__(self) -> None:
        if self.every is not None and not isinstance(self.every, int):
            raise UserError(f"{self.what}: the steps between two of it must be one integer, got {self.every!r}")


class PeriodicOps(NamedTuple):
    """Recorded periodic work: its parts, one after another."""

    what: str
    every: int | None
    group: Group


@immutable
class PeriodicCost:
    """What periodic work costs each time it comes; seconds, FLOPs and bytes may be arrays over the grid."""

    what: str = field(metadata={"label": True})
    every: int | None = field(metadata={"label": True})
    seconds: Any
    flops: Dim
    bytes: Dim

    @property
    def seconds_per_step(self) -> Any:
        """Seconds that it adds to a step on average; None for what comes once per run."""
        return None if self.every is None else self.seconds / self.every

    def as_dict(self) -> dict[str, Any]:
        """The JSON of one entry."""
        names = ("what", "every", "seconds", "flops", "bytes", "seconds_per_step")
        return {name: getattr(self, name) for name in names}


@contextmanager
def layers_alike(what: str, times: int) -> Iterator[Part]:
    """A part for ops that run once in each of `times` identical layers, dispatched from Python."""
    part = tape().begin(what, "optimizer")
    part.repeat = times
    yield part


def adapted_layers(step: Recorded, *names: str) -> Iterator[tuple[Parameter, ...]]:
    """Base weight and adapters (by their names inside the layer) of every adapted layer; alike layers come once."""
    by_name = {p.name: p for p in step.parameters}
    for full in list(by_name):
        layer = full.removesuffix("." + names[0])
        if layer != full:
            yield (by_name[layer + ".weight"], *(by_name[f"{layer}.{name}"] for name in names))


def trained(step: Recorded) -> list[Parameter]:
    """The parameters that train."""
    return [p for p in step.parameters if p.requires_grad]


def fresh_states(step: Recorded, parameters: Sequence[Parameter], dtype: str | None = None) -> None:
    """The optimizer's state begins anew: what it makes for a parameter (or its copy in a dtype) without a state.

    All fill their tensors with zeros, but SGD clones the gradient into its momentum. Source: torch/optim/adam.py
    `_init_group`, sgd.py `_multi_tensor_sgd`.
    """
    for p in parameters:
        p = optimizers.copy_in(p, dtype) if dtype else p
        with layers_alike("optimizer state", p.count):
            for state in optimizers.recorded([p], step.optimizer, step.device).states:
                if step.optimizer == "sgd-momentum":
                    record("clone", (p,), (p,))
                elif same_shape(state.shape, p.shape):
                    fill("zeros_like", state.shape, state.dtype, like=p)
                else:
                    fill("zeros", state.shape, state.dtype)
