"""What the predictions of one search share: a micro-batch does not depend on the optimizer that follows it.

A search on one device records the micro-batches of setups once that differ in their optimizer, or in options that
change nothing (`Method.plain`), and prices and counts their parts, and equal calls, once.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from ..methods.parts.base import Method
from ..program.dims import Dim
from ..program.part import Part
from ..setup import Setup
from ..tape.core import Tape
from ..tape.grouped import ONE_KERNEL
from ..tape.tensor import Parameter, Storage
from ..values import immutable
from .step import Step

Sums = dict[str, Dim]


@immutable
class MicroBatches:
    """Recorded forward and backward passes, and what they leave behind.

    Attributes:
        groups: (parts, repeats) as `Step.groups` has them.
        parameters: with their gradients.
        ending: bytes that die with the step: the loss and what modules kept.
        notes: how a recorded program was made.
    """

    groups: list[tuple[list[Part], int]]
    parameters: list[Parameter]
    ending: Dim
    notes: list[str] = field(default_factory=list)


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
        counts, durations, clocks, calls: of parts; what one run of it takes (`part_costs`).
        prices: device seconds of calls, and what else they take.
    """

    micro_batches: dict[Any, MicroBatches] = field(default_factory=dict)
    programs: dict[Any, Any] = field(default_factory=dict)
    counts: dict[Part, Sums] = field(default_factory=dict)
    durations: dict[Part, Any] = field(default_factory=dict)
    clocks: dict[Part, Any] = field(default_factory=dict)
    calls: dict[Part, Any] = field(default_factory=dict)
    prices: dict[Any, Any] = field(default_factory=dict)


def key(method: Method, setup: Setup) -> Any:
    """What decides the micro-batches of a model on a device; None where the optimizer has a say in them."""
    if setup.engine != "torch" or setup.in_backward:
        return None
    return method.plain(setup.dtype).spec(), replace(setup, optimizer="adamw", clip_grad=Setup.clip_grad)


@dataclass(eq=False, repr=False)
class Steps:
    """Recorded steps of one model, whatever the device.

    Attributes:
        known: by `step_key`.
        counts: of their parts, as `Shared` has them.
    """

    known: dict[Any, Step] = field(default_factory=dict)
    counts: dict[Part, Sums] = field(default_factory=dict)


def step_key(method: Method, setup: Setup, kind: str, capability: str) -> Any:
    """What decides the whole step of a model: devices that agree in it run the same calls.

    Of a card's compute capability that is its generation, as far as kernels of attention and of experts go by it, and
    how much one launch over lists takes (`calls.sdpa`, `tape.grouped`, `program.software`).
    """
    of_card: tuple[Any, ...] = ()
    if kind == "cuda":
        stack, major = setup.stack, capability.split(".")[0]
        generation = major if major in ONE_KERNEL else int(major) >= 8
        of_card = generation, stack.prefers_cudnn(capability), stack.list_room(capability)
    values = (getattr(setup, f.name) for f in fields(setup))
    sizes = ((v.shape, v.tobytes()) if isinstance(v, np.ndarray) else v for v in values)
    return method.spec(), tuple(sizes), kind, of_card
