"""A stage of a pipeline as its rank runs it: passes of micro-batches, recorded once each, known where they come again.

A pass differs from another by what becomes of gradients, by what is freed of the micro-batch before, and by what of the
stage is gathered as it begins. Which graph of a forward pass a backward pass goes through makes no difference.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from ..architectures.heads import OUTPUT
from ..architectures.runs import Stage
from ..optimizers.parts.update import runs
from ..program.part import Part
from ..program.ranks import Ranks
from ..tape.core import Tape, emit, record, recording
from ..tape.engine import run_backward
from ..tape.tensor import Parameter, Storage, Tensor
from .forward import Kept, forward_passes, running
from .parallel.ddp import Replicated
from .parallel.megatron import MainGradients
from .parallel.schedules import BACKWARD, FORWARD, Free, Gather, Pass, Reduce
from .parallel.units import Survey, sharing
from .stage_fsdp2 import ShardedStage
from .step import Step

StageForm = Replicated | MainGradients | ShardedStage | None


class PassGraph(NamedTuple):
    """What a forward pass leaves for a backward one.

    Attributes:
        part: its last one.
        out: hidden states, or the loss.
        received: what it was made of, behind the first stage.
        logits: of the last stage, where no variable of the schedule holds them.
        accumulators: where gradients of parameters arrive in it.
    """

    part: Part
    out: Tensor
    received: Tensor | None
    logits: Any
    accumulators: dict[Parameter, Any]


class StageProgram:
    """What a stage runs.

    Args:
        form: what its replicas do.
        message: makes what stages send one another.
        holds: whether local variables of the schedule outlive a pass: those of 1F1B do, from one to the next.
    """

    def __init__(
        self, step: Step, tape: Tape, stage: Stage, form: StageForm, message: Callable[[], Tensor], *, holds: bool
    ) -> None:
        self.step, self.tape, self.stage, self.form = step, tape, stage, form
        self.message, self.holds = message, holds
        self.kept: Kept = {}
        self.own = form.parameters if isinstance(form, ShardedStage) else list[Parameter]()
        self.graphs: list[PassGraph] = []
        self.closed = False  # whether all that it does is known
        self.coming = False  # whether it is gathered ahead, and not copied out yet
        self.known: dict[Hashable, tuple[list[Part], Any]] = {}
        self.now = self._state

    def run(self, action: Pass | Reduce | Gather | Free) -> list[Part]:
        """The parts of one of its actions."""
        micros = self.step.setup.grad_accum
        if isinstance(action, Reduce):
            return self._once("end", self._ended)
        if isinstance(action, Pass):
            parts = self._once("copy out", lambda: self._sharded(ShardedStage.copy_out)) if self.coming else []
            self.coming = False
            if action.way == FORWARD:
                return parts + self._once((FORWARD, action.micro > 0), self._forward)
            last = action.micro == micros - 1 and isinstance(self.form, (Replicated, MainGradients))
            return parts + self._once((BACKWARD, action.micro > 0, last), lambda: self._backward(reduces=last))
        self.coming = isinstance(action, Gather)
        does = ShardedStage.gather if self.coming else ShardedStage.free
        return self._once("gather" if self.coming else "free", lambda: self._sharded(does))

    def _once(self, what: Hashable, recorded: Callable[[], None]) -> list[Part]:
        """The parts of what is done as things stand, recorded if they are not known."""
        key = what, self.now
        if key not in self.known:
            assert not self.closed, f"a rank that is not like another: {what}"
            if isinstance(self.form, ShardedStage):
                self.tape.part = Part("aside", FORWARD)
                self.form.become(self.now)
            recorded()
            self.known[key] = list(self.tape.parts), self._state
            self.tape.parts.clear()
        parts, self.now = self.known[key]
        return parts

    def updated(self) -> list[Parameter]:
        """What a rank holds of the stage's parameters, once it is through."""
        self.closed = True
        return self.form.updated(self.own) if isinstance(self.form, ShardedStage) else self.own

    @property
    def _state(self) -> Any:
        return self.form.state if isinstance(self.form, ShardedStage) else ()

    def _sharded(self, what: Callable[[ShardedStage], None]) -> None:
        assert isinstance(self.form, ShardedStage)
        with self.tape.no_grad():
            what(self.form)

    def _forward(self) -> None:
        """A forward pass, whose graph is put with the others."""
        step, tape, form = self.step, self.tape, self.form
        known = {p.name for p in step.parameters}
        tape.begin("inputs", FORWARD)
        if isinstance(form, Replicated):
            form.reduces, form.synchronised = False, False  # buffers went out before the first step alone
        tape.wrapping = form
        out, received = stage_pass(step, self.stage, self.message, self.kept)
        tape.wrapping = None
        self.own += [p for p in step.parameters if p.name not in known]
        if isinstance(form, MainGradients) and not self.stage.last:
            out.storage = Storage(0, None)  # `deallocate_output_tensor`, once it is sent
        logits = self.kept.get(OUTPUT) if self.holds else self.kept.pop(OUTPUT, None)
        met = {p: p.accumulator for p in step.parameters if p.accumulator is not None}
        for p in met:
            p.accumulator = None
        self.graphs.append(PassGraph(tape.part, out, received, logits, met))

    def _backward(self, *, reduces: bool) -> None:
        """A backward pass through any graph.

        Args:
            reduces: whether its gradients are exchanged with other replicas, bucket by bucket.
        """
        step, tape, form = self.step, self.tape, self.form
        if not self.graphs:
            self._aside()
        graph = self.graphs.pop(0)
        for p, accumulator in graph.accumulators.items():
            p.accumulator = accumulator
        tape.part, tape.wrapping = graph.part, form
        if isinstance(form, (Replicated, MainGradients)):
            form.reduces = reduces
            form.begin()
        out, received = graph.out, graph.received
        if out.requires_grad:
            tape.backward_of(tape.part)
            run_backward(out, emit("ones_like", (out,), (), out.dtype) if self.stage.last else self.message())
        tape.begin("exchange", BACKWARD)
        with tape.no_grad():
            if isinstance(form, ShardedStage):
                form.end_of_micro_batch()
            elif isinstance(form, MainGradients):
                form.end_of_pass(beside=form.overlaps and self.stage.first)
            elif isinstance(form, Replicated) and form.ready:
                form.end_of_backward()
        tape.wrapping = None
        for p in step.parameters:
            p.accumulator = None
            if p.grad is not None:
                p.grad.storage.copies = p.count
        if received is not None and received.node is not None and self.holds:
            self.kept["gradient"] = received.node.saved.pop(), tape.part
        del out, received, graph
        if not self.graphs:
            tape.twins.clear()

    def _aside(self) -> None:
        """Make a graph where those of recorded forward passes are gone."""
        form, made = self.form, list(self.tape.parts)
        self.tape.parts.clear()
        before = self._state
        self._forward()
        self.tape.parts[:] = made
        if isinstance(form, ShardedStage):
            self.tape.part = Part("aside", FORWARD)
            form.become(before)

    def _ended(self) -> None:
        """Gradients are reduced of shards, and divided, as losses are means over a micro-batch; variables go."""
        tape, own = self.tape, self.own
        tape.part = Part("aside", BACKWARD)
        self.graphs.clear()
        tape.twins.clear()
        with tape.no_grad():
            if isinstance(self.form, ShardedStage):
                self.form.reduce()
                own = self.form.updated(own)
            elif isinstance(self.form, MainGradients):
                tape.begin("exchange", BACKWARD)
                self.form.finalize()
            own = [p for p in own if p.grad is not None]
            scales = self.step.setup.grad_accum > 1 and not isinstance(self.form, MainGradients)
            for count, run in runs(own) if scales else ():
                tape.begin("scale", BACKWARD).repeat = count
                for p in run:
                    assert p.grad is not None
                    record("div_.Tensor", (p.grad,), (p.grad,))
        tape.begin("end", BACKWARD)
        self.kept.clear()


def stage_pass(step: Step, stage: Stage, message: Callable[[], Tensor], kept: Kept) -> tuple[Tensor, Tensor | None]:
    """Record a forward pass of a stage: its output, the loss of the last one, and what it received for it.

    Args:
        kept: what modules and the schedule's own variables hold until the next pass.
    """
    received = None
    if not stage.first:
        received = message()
        received.requires_grad = stage.given
    step.parameters, out, _ = forward_passes(step, *running(step), kept, stage, received)
    return out, received


def sharded_stage(step: Step, tape: Tape, stage: Stage, message: Callable[[], Tensor]) -> ShardedStage:
    """What replicas of a stage do under FSDP2: a forward pass tells which parameters each of its units has."""
    known, survey = {p.name for p in step.parameters}, Survey()
    with recording(tape):
        tape.wrapping = survey
        tape.begin("inputs", FORWARD)
        stage_pass(step, stage, message, {})
    ranks, across = sharing(Ranks(step.setup.replicas * step.setup.cp, step.setup.tp), step.setup)
    own = [p for p in step.parameters if p.name not in known]
    units = survey.units(own, ranks.size, step.setup, tied=False, staged=True)
    reduced = step.setup.reduce_dtype or ("fp32" if step.setup.amp else None)
    return ShardedStage(units, ranks, across, stage.number, reduced)
