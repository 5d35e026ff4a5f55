"""What the predictions of one search share: a micro-batch does not depend on the optimizer that follows it.

A search on one device records the micro-batches of setups once that differ in their optimizer, or in options that
change nothing (`Method.plain`), and prices and counts their parts, and equal calls, once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np

from ..methods.parts.base import Method
from ..program.dims import Dim
from ..program.part import Part
from ..setup import Setup
from ..tape.core import Tape
from ..tape.grouped import ONE_KERNEL
from ..tape.tensor import Parameter, Storage
from ..values import immutable
from .parallel.form import ParallelForm

Sums = dict[str, Dim]
K = TypeVar("K")
V = TypeVar("V")


def recalled(known: dict[K, V], key: K, make: Callable[[], V]) -> V:
    """What is known under a key (of `Shared`), made if it is not."""
    if key not in known:
        known[key] = make()
    return known[key]


@immutable
class MicroBatches:
    """Recorded forward and backward passes, and what they leave behind.

    Attributes:
        groups: (parts, repeats) as `Step.groups` has them.
        parameters: with their gradients.
        ending: bytes that die with the step: the loss and what modules kept.
        notes: how a recorded program was made.
        form: what several GPUs did, with what it knows of them.
    """

    groups: list[tuple[list[Part], int]]
    parameters: list[Parameter]
    ending: Dim
    notes: list[str] = field(default_factory=list)
    form: ParallelForm | None = None


def with_gradients(parameters: list[Parameter], tape: Tape | None) -> list[Parameter]:
    """Copies of parameters, whose gradients lie in as many blocks of memory as before, on another tape or on none."""
    blocks: dict[int, Storage] = {}
    copies = []
    for p in parameters:
        q = p.copy()
        if p.grad is not None:
            old = p.grad.storage
            if id(old) not in blocks:
                blocks[id(old)] = Storage(old.nbytes, tape)
                blocks[id(old)].copies = old.copies
            q.grad = p.grad.alias()
            q.grad.storage = blocks[id(old)]
        copies.append(q)
    return copies


@dataclass(eq=False, repr=False)
class Shared:
    """What predictions on one device have in common.

    Attributes:
        micro_batches: by all that decides them.
        programs: what `torch.compile` makes, by what decides it (`passes.compile`).
        counts, durations, clocks, calls, works: of parts; what one run of it takes (`prediction.work`, `part_costs`).
        prices: device seconds of calls, and what else they take.
    """

    micro_batches: dict[Any, MicroBatches] = field(default_factory=dict)
    programs: dict[Any, Any] = field(default_factory=dict)
    counts: dict[Part, Sums] = field(default_factory=dict)
    durations: dict[Part, Any] = field(default_factory=dict)
    clocks: dict[Part, Any] = field(default_factory=dict)
    calls: dict[Part, Any] = field(default_factory=dict)
    works: dict[Part, Any] = field(default_factory=dict)
    prices: dict[Any, Any] = field(default_factory=dict)


def key(method: Method, setup: Setup) -> Any:
    """What decides the micro-batches of a model on a device; None where the optimizer has a say in them."""
    if setup.engine != "torch" or setup.in_backward or setup.offload != "none":
        return None
    return method.plain(setup.dtype).spec(), replace(setup, optimizer="adamw", clip_grad=Setup.clip_grad)


def step_key(method: Method, setup: Setup, kind: str, capability: str) -> Any:
    """What decides the whole step of a model: devices that agree in it run the same calls."""
    sizes = tuple([hashable(getattr(setup, f.name)) for f in fields(setup)])
    return method.spec(), sizes, kind, of_card(setup, kind, capability)


def of_card(setup: Setup, kind: str, capability: str) -> tuple[Any, ...]:
    """What of a card's compute capability decides a step.

    That is its generation, as far as kernels of attention and of experts go by it, and how much one launch over lists
    takes (`calls.sdpa`, `tape.grouped`, `program.software`).
    """
    if kind != "cuda":
        return ()
    stack, major = setup.stack, capability.split(".")[0]
    generation = major if major in ONE_KERNEL else int(major) >= 8
    return generation, stack.prefers_cudnn(capability), stack.list_room(capability)


def hashable(value: Any) -> Any:
    """A value as a part of a key."""
    return (value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value
