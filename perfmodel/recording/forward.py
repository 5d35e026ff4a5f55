"""The forward passes of a step, and what of setup and method runs in them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import objectives
from ..architectures.base import Build, Scope
from ..architectures.masks import model_buffer
from ..architectures.runs import Stage
from ..methods.parts.base import Method
from ..objectives.parts.base import OF_CRITIC, OF_REFERENCE
from ..program.dims import decide
from ..program.part import Part
from ..setup import Setup
from ..tape.core import tape
from ..tape.packages.ulysses import SharedHeads, loss_of_all
from ..tape.tensor import Parameter, Tensor
from .deepspeed import zero3_alone
from .step import Step

Kept = dict[Any, tuple[Tensor, Part]]  # attributes of modules (`Build.kept`)


def forward_passes(
    step: Step, setup: Setup, method: Method, kept: Kept, stage: Stage | None = None, received: Tensor | None = None
) -> tuple[list[Parameter], Tensor, Callable[[], None] | None]:
    """Record the passes of the objective; returns all parameters, the loss, and what is to be done after backward.

    Behind the parameters of the model are those of others, frozen ones last. Of a stage of a pipeline that is not the
    last one it is the hidden states in the place of the loss.
    """
    objective, architecture = objectives.found(setup.objective), step.architecture
    if objective.quiet:
        architecture, method = objectives.with_modules_off(architecture), objectives.without_dropout(method)
    known = {p.name: p for p in step.parameters}
    critic, frozen = (
        {name.removeprefix(of): known.pop(name) for name in list(known) if name.startswith(of)}
        for of in (OF_CRITIC, OF_REFERENCE)
    )
    build = Build(architecture, method, setup, known, labelled=objective.labelled, kept=kept)
    build.stage, build.received = stage, received
    if setup.cp > 1:  # the Trainer gives those of a rank's own tokens
        build.given_positions = model_buffer(setup.shape)
    passes = objectives.Passes(Scope(build), method, setup, frozen, critic)
    loss = objective.loss(passes)
    if isinstance(tape().context, SharedHeads):
        loss = loss_of_all(loss, model_buffer(setup.shape), tape().context.ranks)
    after, passes.after = passes.after or build.after, None  # else it would hold itself
    for of, others in ((OF_CRITIC, critic), (OF_REFERENCE, frozen)):
        for p in others.values():
            p.name = of + p.name.removeprefix(of)
    for p in frozen.values():
        p.elements = 0
    return [*build.parameters.values(), *critic.values(), *frozen.values()], loss, after


def running(step: Step) -> tuple[Setup, Method]:
    """Setup and method as the step's engine and the versions of its software run them."""
    setup, method = step.setup, step.method
    several = not decide(setup.gpus == 1) or setup.offload != "none"
    if step.architecture.of_megatron and setup.checkpoint != "none":
        setup = replace(setup, checkpoint="block-reentrant")  # `tensor_parallel.checkpoint`
    casts = setup.amp is not None and setup.parallel == "fsdp2"  # what is gathered, in place of autocast
    if several and setup.compile != "none" and setup.checkpoint == "block-reentrant":
        setup = replace(setup, checkpoint="block")  # to Dynamo both are one operator
    if step.zero or (several and (casts or setup.parallel in ("zero1", "zero2"))):
        setup, method = zero3_alone.under_zero(setup, method)
    elif several and setup.parallel == "fsdp1":
        setup = replace(setup, dtype=setup.computes_in)  # what is gathered, under autocast too
        method = method.in_one_dtype(setup.dtype) if getattr(method, "trained_dtype", None) else method
    return setup, method.under(setup.stack, setup.dtype)
