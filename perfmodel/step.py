"""Forward, backward, clipping, optimizer: the Step."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from . import optimizers
from .architectures.base import Architecture, Build, Scope
from .errors import UserError
from .methods.base import Method
from .setup import Setup
from .tape import autograd
from .tape.core import Op, Parameter, Part, Tape, Tensor, emit, new_tensor, recording
from .tape.dims import Dim

PHASES = ("forward", "backward", "optimizer")


@dataclass
class Group:
    """Parts that run one after another, `repeat` times over (micro-batches)."""

    parts: list[Part]
    repeat: int = 1


@dataclass
class Step:
    """One optimizer step as ordered parts of ops, with the parameters it trains.

    `groups` holds the first micro-batch, the further ones (if any), and clipping with the optimizer.
    """

    architecture: Architecture
    method: Method
    setup: Setup
    device: str
    parameters: list[Parameter]
    groups: list[Group] = field(default_factory=list)

    def parts(self) -> Iterator[tuple[Part, int]]:
        """Every part with how often it runs in the step."""
        for group in self.groups:
            for part in group.parts:
                yield part, part.repeat * group.repeat

    def ops(self) -> Iterator[tuple[Part, Op, int]]:
        """Every op with its part and how often it runs."""
        for part, count in self.parts():
            for op in part.ops:
                yield part, op, count

    @property
    def trainable(self) -> Dim:
        """Elements that train."""
        return sum(p.numel * p.count for p in self.parameters if p.requires_grad)

    @property
    def total(self) -> Dim:
        """Elements of all parameters."""
        return sum(p.numel * p.count for p in self.parameters)

    @property
    def weight_bytes(self) -> Dim:
        """Bytes of all parameters."""
        return sum(p.nbytes * p.count for p in self.parameters)

    @property
    def optimizer(self) -> str:
        """The optimizer form that runs."""
        return optimizers.resolve(self.setup.optimizer, self.device)

    @property
    def state_bytes(self) -> Dim:
        """Bytes of optimizer state."""
        return optimizers.state_bytes(optimizers.trainable(self.parameters), self.setup.optimizer)


def build(
    architecture: Architecture, method: Method, setup: Setup, device: str = "cuda", capability: str = "8.0"
) -> Step:
    """Record a step.

    Args:
        method: bound to the architecture (`Method.bind`).
        device: "cuda" or "cpu", whose dispatch to mirror.
        capability: CUDA compute capability, which decides the attention kernel.

    Raises:
        UserError: setup and model do not fit (sequence too long, nothing trains, …).
        MixedStructure: array dims do not share one program; split the grid.
    """
    tape = Tape(device, capability, autocast=setup.amp)
    step = Step(architecture, method, setup, device, [])
    collecting = gc.isenabled()
    gc.disable()  # the tape frees by reference count; a pass of the cycle collector would only cost time
    try:
        with recording(tape):
            _micro_batch(step, tape)
            step.groups.append(Group(list(tape.parts)))
            if setup.grad_accum > 1:
                tape.parts.clear()
                tape.twins.clear()
                _micro_batch(step, tape)
                step.groups.append(Group(list(tape.parts), setup.grad_accum - 1))
            tape.parts.clear()
            _update(step, tape)
            step.groups.append(Group(list(tape.parts)))
            _zero_grad(step, tape)
            tape.loss = None
    finally:
        if collecting:
            gc.enable()
    return step


def _micro_batch(step: Step, tape: Tape) -> None:
    setup = step.setup
    shape = (setup.batch, setup.seq)
    tape.begin("inputs", "forward")
    build = Build(step.architecture, step.method, setup, {p.name: p for p in step.parameters})
    inputs = [_input(shape) for _ in range(3)]
    with tape.autocasting():
        loss = step.architecture.forward(Scope(build), *inputs)
    tape.loss = loss
    if setup.grad_accum > 1:
        tape.loss = loss = _divide(loss)
    if not loss.requires_grad:
        raise UserError(f"method {step.method.spec()}: nothing trains in {step.architecture.name}")
    step.parameters = list(build.parameters.values())
    tape.part = _backward_start(tape)
    seed = emit("ones_like", (loss,), (), loss.dtype)
    autograd.run_backward(loss, seed)
    for p in step.parameters:
        p.accumulator = None
        if p.grad is not None:
            p.grad.storage.copies = p.count


def _backward_start(tape: Tape) -> Part:
    tape.backward_of(tape.part)
    return tape.part


def _input(shape: tuple[Dim, ...]) -> Tensor:
    from .architectures.masks import table

    return table(shape)


def _divide(loss: Tensor) -> Tensor:
    node = autograd.differentiate("DivBackward0", (loss,), _divide_backward)
    return emit("div.Tensor", (loss,), (), loss.dtype, node=node)


def _divide_backward(node: autograd.Node, grads: Sequence[Tensor | None]) -> autograd.Grads:
    (g,) = grads
    assert g is not None
    return (emit("div.Tensor", (g,), (), g.dtype),)


def _update(step: Step, tape: Tape) -> None:
    specs = optimizers.trainable(step.parameters)
    with tape.no_grad():
        if step.setup.clip_grad:
            optimizers.clip_grad_norm(tape.begin("clip", "optimizer"), specs)
        optimizers.record_step(tape.begin("optimizer", "optimizer"), specs, step.optimizer)


def _zero_grad(step: Step, tape: Tape) -> None:
    for p in step.parameters:
        p.grad = None


__all__ = ["PHASES", "Group", "Step", "build", "new_tensor"]
