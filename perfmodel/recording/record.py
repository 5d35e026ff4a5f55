"""Forward, backward, clipping, optimizer: a Step is recorded."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from .. import objectives, optimizers
from ..architectures.base import Architecture
from ..calls.launches import launch_for
from ..errors import UserError
from ..methods.parts.base import Method
from ..methods.parts.periodic import Periodic, PeriodicOps
from ..program.dims import Dim, decide, larger
from ..program.part import Group, Part
from ..program.ranks import Ranks
from ..program.software import LONG_ARGUMENTS
from ..setup import Setup
from ..tape.core import Tape, emit, recording
from ..tape.elementary import div
from ..tape.engine import run_backward
from ..tape.packages.zero3 import zero3_linear
from ..tape.tensor import Flow
from . import reuse as sharing
from .checks import check_step
from .collector import no_collector
from .deepspeed import zero3_alone
from .forward import Kept, forward_passes, running
from .parallel.context import context_of
from .parallel.form import ParallelForm
from .reuse import MicroBatches, Shared
from .step import Step

if TYPE_CHECKING:
    from .program import RecordedModel
    from .replay import Replay


def build(
    architecture: Architecture,
    method: Method,
    setup: Setup,
    device: str = "cuda",
    capability: str = "8.0",
    *,
    shared: Shared | None = None,
    view_replay: bool = False,
) -> Step:
    """Record a step.

    Args:
        method: bound to the architecture (`Method.bind`).
        device: "cuda" or "cpu", whose dispatch to mirror.
        capability: CUDA compute capability, which decides the attention kernel together with the setup's stack.
        shared: what was recorded for the same architecture and device, and receives what is recorded here.
        view_replay: as on fake tensors (`Tape`), for comparisons with a trace of them.

    Raises:
        UserError: setup and model do not fit (sequence too long, nothing trains, …).
        MixedStructure: array dims do not share one program; split the grid.
    """
    setup = zero3_alone.one_name(replace(setup, engine=method.engine or setup.engine))
    if not architecture.recorded:
        architecture, method = _trained_for(architecture, method, setup)
    check_step(architecture, method, setup)
    several = setup.offload != "none" or not decide(setup.gpus == 1)
    if several and architecture.recorded:
        from .replay import check_several

        check_several(setup)
    whole = architecture
    if setup.tp > 1:
        architecture = architecture.part_of(setup.tp)
        method = method.bind(architecture)
    if setup.pp > 1:
        raise UserError("pp: this question is not asked of the stages of a pipeline; use --pp 1")
    step = Step(architecture, method, setup, device, [], whole=whole)
    runs = running(step)[0]
    tape = Tape(device, capability, setup.stack, autocast=runs.amp, view_replay=view_replay)
    tape.context = context_of(setup)
    tape.linear = zero3_linear if step.zero else None
    tape.buffer_dtype = setup.dtype if setup.parallel == "fsdp2" and setup.dtype != runs.dtype else None
    inner = None
    if setup.in_backward:
        from . import in_backward  # with GaLore, whose update goes weight by weight, too

        inner = in_backward.begin(step, tape)
    if several or architecture.of_megatron:
        from .forms import parallel_form  # few ask for several

        if architecture.recorded:
            step.replay = _replay(step, capability)
        step.form = parallel_form(step, capability)
        tape.input_dtype = setup.amp if setup.parallel == "fsdp2" and step.form is not None else None
    with no_collector(), recording(tape):
        ending = _shared(step, tape, shared) if shared else _micro_batches(step, tape, {})
        record_update(step, tape, inner)
        ending()
        step.groups.append(Group(list(tape.parts)))
    step.periodic = [_besides(step, work, capability) for work in method.periodic()]
    return step


def _trained_for(architecture: Architecture, method: Method, setup: Setup) -> tuple[Architecture, Method]:
    """The model with the head of its objective, and the method on it."""
    objective = objectives.found(setup.objective)
    objective.check(method, setup)
    headed = objective.on(architecture)
    return headed, method if headed is architecture else method.bind(headed)


def _replay(step: Step, capability: str) -> "Replay":
    """The recorded program of a rank."""
    from .replay import Replay

    setup, model = running(step)[0], cast("RecordedModel", step.architecture)
    program = model.program(running(step)[1], setup, step.device, capability)
    made = Replay(program, setup, model.name, step.device, capability)
    step.parameters, step.notes = made.parameters, program.told
    return made


def _micro_batches(step: Step, tape: Tape, programs: dict[Any, Any]) -> Callable[[], None]:
    """Record the micro-batches; returns what ends with the step, to be called then.

    Args:
        programs: what was compiled already (`passes.compile`).
    """
    kept: Kept = {}
    if step.form is not None:
        return _exchanging(step, tape, step.form, kept, programs)
    if step.architecture.recorded:
        return _replayed(step, tape.capability)
    further, ending = step.setup.grad_accum - 1, 0
    tape.alike = further > 0 and not step.zero
    first, later = _micro_batch(step, tape, kept, programs)
    alike = tape.alike and not kept  # what modules keep dies in the next forward pass
    if alike and not later:
        later, ending = _further(tape, first)
    tape.alike = False
    step.groups.append(Group([_first(part) for part in first]))
    if further:
        step.groups.append(Group(later if alike else _micro_batch(step, tape, kept, programs)[0], further))

    def end() -> None:
        _forget(kept)
        tape.drop_graph(None)
        tape.part.free(ending)

    return end


def _exchanging(step: Step, tape: Tape, form: ParallelForm, kept: Kept, programs: dict[Any, Any]) -> Callable[[], None]:
    """The micro-batches of one of several GPUs, which exchange the gradients of the last one alone, or of each."""
    count, each = step.setup.grad_accum, step.setup.sync_each_batch
    tape.wrapping = form
    for times, reduces in ((1, each), (count - 2, each), (1, True))[0 if count > 1 else 2 :]:
        form.reduces = reduces
        if times > 0:
            replay = step.replay
            parts = _micro_batch(step, tape, kept, programs)[0] if replay is None else replay.micro_batch(form)
            step.groups.append(Group(parts, times))
    tape.wrapping = None
    step.active_unsharded = step.active
    step.parameters = form.updated(step.parameters)

    def end() -> None:
        _forget(kept)
        tape.drop_graph(None)

    return end


def _replayed(step: Step, capability: str) -> Callable[[], None]:
    """The micro-batches of a recorded program."""
    setup, model = step.setup, cast("RecordedModel", step.architecture)
    program = model.program(running(step)[1], setup, step.device, capability)
    made = program.micro_batches(setup.batch, setup.seq, setup.grad_accum, step.device, capability)
    step.groups = [Group(parts, repeat) for parts, repeat in made.groups]
    step.parameters, step.notes = made.parameters, made.notes
    return lambda: None


def _first(part: Part) -> Part:
    """A part without what only further micro-batches do."""
    part.ops = [op for op in part.ops if not op.attrs.later]
    part.later = None
    return part


def _further(tape: Tape, first: list[Part]) -> tuple[list[Part], Dim]:
    """The parts of micro-batches after one that they are like (`Tape.alike`), and what its graph still holds.

    The graph of a micro-batch dies when the next one has its loss.
    """
    tape.part = Part("end", "backward")
    tape.drop_graph(None)
    ending = -tape.part.delta
    assert tape.renewed is not None
    part, peak = tape.renewed
    if part.later is not None:
        part.later.highest = larger(peak, part.later.peak - ending)
        part.later.delta = part.later.delta - ending
    return [part.further() for part in first], ending


def _shared(step: Step, tape: Tape, shared: Shared) -> Callable[[], None]:
    """As `_micro_batches`, recorded only if no step before had the same."""
    wanted = sharing.key(running(step)[1], step.setup)
    if wanted is None:
        return _micro_batches(step, tape, shared.programs)
    known = shared.micro_batches.get(wanted)
    if known is not None:
        step.groups = [Group(parts, repeat) for parts, repeat in known.groups]
        step.parameters, step.notes = sharing.with_gradients(known.parameters, tape), known.notes
        step.form = copy(known.form)
        return lambda: tape.part.free(known.ending)
    end = _micro_batches(step, tape, shared.programs)
    groups = [(group.parts, group.repeat) for group in step.groups]
    parameters, form = sharing.with_gradients(step.parameters, None), copy(step.form)

    def end_and_note() -> None:
        before = tape.part.delta
        end()
        shared.micro_batches[wanted] = MicroBatches(groups, parameters, before - tape.part.delta, step.notes, form)

    return end_and_note


def _besides(step: Step, work: Periodic, capability: str) -> PeriodicOps:
    """Record periodic work on a tape of its own."""
    with recording(Tape(step.device, capability, step.setup.stack, autocast=step.setup.amp)) as tape, tape.no_grad():
        work.record(step)
        return PeriodicOps(work.what, work.every, Group(list(tape.parts)))


def _micro_batch(step: Step, tape: Tape, kept: Kept, programs: dict[Any, Any]) -> tuple[list[Part], list[Part]]:
    """Record forward and backward of a micro-batch; returns its parts, compiled if the setup says so.

    Of a compiled one, those of further micro-batches that are alike (`Tape.alike`) follow; else none.
    """
    setup, method = running(step)
    form = step.form
    if setup.compile != "none":
        tape.flow = Flow(apart=form is not None, cuts=form.cuts() if form is not None else None)
    else:
        tape.flow = None
    if step.zero_alone:
        tape.on_gradient = zero3_alone.hook(step, first=not step.parameters)
    tape.begin("inputs", "forward")
    # In none of the parts that are compiled: the last loss, and what modules kept of its pass
    before = tape.loss.storage if tape.flow is not None and tape.loss is not None else None
    replaced = dict(kept) if tape.flow is not None and not tape.flow.apart else {}
    parameters, loss, after = forward_passes(step, setup, method, kept)
    tape.renew(loss)
    if setup.grad_accum > 1 and objectives.found(setup.objective).scaled:
        tape.loss = loss = div(loss, setup.grad_accum)
    if not loss.requires_grad or not any(p.requires_grad for p in parameters):  # a checkpointed input's gradient alone
        raise UserError(f"method {method.spec()}: nothing trains in {step.architecture.name}")
    step.parameters = parameters
    tape.part = _backward_start(tape)
    seed = emit("ones_like", (loss,), (), loss.dtype)
    run_backward(loss, seed)
    del seed
    if step.zero_alone:
        zero3_alone.end_of_backward()
    if form is not None:
        tape.begin("exchange", "backward")
        with tape.no_grad():
            form.end_of_backward()
    if after is not None:
        tape.begin("statistics", "backward")
        with tape.no_grad():
            after()
            del after
    for p in step.parameters:
        p.accumulator = None
        if p.grad is not None:
            p.grad.storage.copies = p.count
    first, later = list(tape.parts), list[Part]()
    if tape.flow is not None:
        from ..passes.compile import compiled_parts  # half of what a step needs: only where it is asked for

        first, later = compiled_parts(setup, step.parameters, first, tape.flow, programs, alike=tape.alike)
        tape.flow, tape.part = None, first[-1]
        del before
        _forget(replaced)
    tape.parts.clear()
    tape.twins.clear()
    return first, later


def _backward_start(tape: Tape) -> Part:
    tape.backward_of(tape.part)
    return tape.part


def record_update(step: Step, tape: Tape, inner: optimizers.Update | None = None) -> None:
    """Record clipping, the optimizer as the method wants it, and the end of the gradients; sets the step's state.

    Args:
        inner: the update that was recorded inside backward.
    """
    before = len(tape.parts)
    with tape.no_grad():
        form, clips = step.form, step.setup.clip_grad
        own = inner if form is None else form.own_update(step.parameters, step.optimizer, clips=clips)
        if own is not None:
            update = own
        elif step.zero:
            update = zero3_alone.record_zero_update(step, step.optimizer)
        else:
            if clips and objectives.found(step.setup.objective).clips:
                cut = (Ranks(step.setup.tp),) if step.setup.sequence_parallel else ()  # what is cut are DTensors
                across = (*((form.ranks,) if form is not None and form.shares_norm else ()), *cut)
                part = tape.begin("clip", "optimizer")
                masters = form is not None and step.setup.parallel == "fsdp2" and step.setup.amp is not None
                dtype = "fp32" if masters else step.method.dtype_of_trained(step.setup.dtype)
                trained = optimizers.trainable(step.parameters)
                optimizers.clip_grad_norm(part, trained, across, step.stages, dtype, step.parameters if cut else ())
            update = optimizers.Update(tape, step.optimizer, step.parameters, step.head)
            step.method.update(update)
    first = next((part for part in tape.parts[before:] if part.ops), None)
    if first is not None:  # what is updated inside backward has nothing left to do here
        first.host.updates = 1
    tape.begin("zero_grad", "optimizer")
    for p in step.parameters:
        p.grad = None
    step.state_bytes, step.paged_bytes = update.state_bytes, update.paged_bytes
    if form is not None and form.offloads:
        from .parallel.offload import on_cores

        on_cores(tape.parts[before:])
        kept = sum(p.nbytes * p.count * (1 + p.used) for p in step.parameters if p.hosted)
        step.state_bytes, step.host_bytes = 0, kept + step.state_bytes
    else:
        step.host_bytes = update.hosted + sum(p.nbytes * p.count for p in step.parameters if p.hosted)
    room = step.setup.stack.list_room(tape.capability)
    if room != LONG_ARGUMENTS:
        for part in (*tape.parts, *(part for part, _ in step.parts())):
            for op in part.ops:
                launch_for(op, room)


def _forget(kept: Kept) -> None:
    """What modules kept goes at the end of the step: it was counted as live up to here."""
    for tensor, part in kept.values():
        tensor.storage.copies = part.repeat
    kept.clear()


def held_bytes(step: Step) -> Dim:
    """Bytes that method, trainer and engine keep from step to step beside parameters and optimizer state."""
    of_trainer = objectives.found(step.setup.objective).held_bytes(step.architecture, step.setup)
    exchanged = step.form.held_bytes(step.parameters) if step.form is not None else 0
    flat = zero3_alone.flat_bytes(step) if step.zero_alone else 0
    return step.method.held_bytes(step) + of_trainer + exchanged + flat + step.received_bytes
