"""A step of a pipeline: what each of its ranks runs, in its order.

A stage has some blocks, the first one also the embedding and the last one the head. Every micro-batch goes through all
of them, forward and back; in which order is the schedule's (`parallel.schedules`). What a stage receives needs a
gradient where anything below trains; where nothing does, no gradient is sent back, and stages below run no backward.

Sources: torch 2.13, distributed/pipelining/stage.py (`PipelineStage`), schedules.py; the model is cut as torchtitan
does it: the layers of other stages are removed, and each stage makes positions and mask by itself.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from ..architectures.base import Architecture
from ..architectures.runs import Stage, times_in_a_row
from ..errors import UserError
from ..methods.parts.base import Method
from ..optimizers.parts.update import existing
from ..program.dims import decide
from ..program.op import Attrs, Op, Spec
from ..program.part import Group, Part
from ..program.ranks import Ranks
from ..setup import Setup
from ..tape.core import Tape, recording
from ..tape.tensor import Tensor
from .checks import check_step
from .collector import no_collector
from .forward import running
from .parallel import ddp
from .parallel.collectives import SENT
from .parallel.context import check_shared_sequences, context_of
from .parallel.form import check_form
from .parallel.schedules import FORWARD, Action, Pass, Post, Schedule, Wait
from .record import record_update
from .stage import StageForm, StageProgram, sharded_stage, stage_pass
from .step import Step

METHODS = ("full", "lora", "dora", "top_k")  # of whose stages the program is modelled
REPLICAS = ("ddp", "fsdp2")  # forms of replicas beside which it is
ALONE: dict[str, Any] = {
    "kernels": "torch",
    "images": 0,
    "group_by_length": False,
    "offload": "none",
    "ddp": "plain",
    "objective": "sft",
    "fsdp_units": "accelerate",
    "sync_each_batch": False,
}
LONGEST_PATTERN = 64  # actions of an order until they come again alike


@dataclass(eq=False)
class RankStep:
    """The step of one rank of a pipeline.

    Attributes:
        step: all of it, in its order; its parts are those of `actions` and `update`.
        stages: those that it has.
        programs: what each of them runs.
        actions: what it does until its gradients are there, each with its parts.
        update: clipping and the optimizer.
        message: what stages send one another: hidden states, or their gradient.
    """

    rank: int
    step: Step
    stages: list[Stage]
    programs: list[StageProgram]
    actions: list[tuple[Action, list[Part]]]
    update: list[Part]
    message: Spec

    @property
    def in_flight(self) -> int:
        """The most micro-batches whose backward is outstanding, all its stages together."""
        now = most = 0
        for action, _ in self.actions:
            if isinstance(action, Pass):
                now += 1 if action.way == FORWARD else -1
                most = max(most, now)
        return most


def build_ranks(
    architecture: Architecture, method: Method, setup: Setup, device: str = "cuda", capability: str = "8.0"
) -> list[RankStep]:
    """Record the step of every rank of a pipeline, those of one data-parallel group; ranks that are alike once.

    Args as of `record.build`.

    Raises:
        UserError: setup, model and method do not fit, or are not modelled in stages.
        MixedStructure: array dims do not share one program; split the grid.
    """
    schedule = Schedule.parse(setup.pp_schedule)
    check_pipeline(architecture, method, setup, schedule)
    whole = architecture
    if decide(setup.replicas * setup.cp == 1):  # there is nothing to shard
        setup = replace(setup, parallel="ddp", reshard=True, shard_group=None)
    if setup.tp > 1:
        architecture = whole.part_of(setup.tp)
        method = method.bind(architecture)
    how = Recorder(whole, architecture, method.under(setup.stack, setup.dtype), setup, device, capability, schedule)
    stages = how.stages()
    orders = schedule.orders(setup.pp, setup.grad_accum, lambda stage: stages[stage].given, sharded=how.sharded)
    found: list[RankStep] = []
    alike: dict[Hashable, RankStep] = {}
    for rank, order in enumerate(orders):
        own = stages[rank :: setup.pp]
        key = tuple(map(how.key, own)), how.key_of_order(order)
        found.append(how.rank_step(rank, stages, order, alike.get(key)))
        alike.setdefault(key, found[-1])
    return found


def check_pipeline(architecture: Architecture, method: Method, setup: Setup, schedule: Schedule) -> None:
    """Raise `UserError` where stages are not modelled with the rest of a setup."""
    if architecture.recorded:
        raise UserError("pp: stages are not modelled by a trace; use --pp 1")
    check_step(architecture, method, setup)
    if not architecture.of_megatron:
        check_form(setup, method)
        check_shared_sequences(setup, architecture)
    for name, usual in ALONE.items():
        if getattr(setup, name) != usual:
            raise UserError(f"pp: stages are not modelled with {name} {getattr(setup, name)}; use --pp 1")
    if not decide(setup.replicas == 1) and setup.parallel not in REPLICAS and not architecture.of_megatron:
        own = ", whose pipeline module is another program" if setup.parallel.startswith("zero") else ""
        use = " or ".join(REPLICAS)
        raise UserError(f"pp: stages are not modelled with {setup.parallel}{own}; use --parallel {use}")
    known = method.name in METHODS and getattr(method, "implementation", "peft") == "peft"
    if not known or getattr(method, "inner", "full") != "full":
        raise UserError(f"pp: stages are not modelled with {method.spec()}; {', '.join(METHODS)} by peft are")
    if setup.checkpoint == "block-reentrant" and not architecture.of_megatron:
        raise UserError(
            "pp: reentrant checkpoints refuse torch.autograd.grad, by which PyTorch's stages learn what they exchange; "
            "use --checkpoint block"
        )
    architecture.staged()
    count = setup.pp * schedule.chunks
    if count > architecture.layers:
        raise UserError(f"pp: {count} stages are more than the {architecture.layers} blocks of {architecture.name}")
    schedule.check(setup.pp, setup.grad_accum)


class Recorder(NamedTuple):
    """Records ranks of one pipeline; `architecture` is what one of those has that share the layers of the whole."""

    whole: Architecture
    architecture: Architecture
    method: Method
    setup: Setup
    device: str
    capability: str
    schedule: Schedule

    def stages(self) -> list[Stage]:
        """All stages, with what they are given.

        Blocks that are over go to the first stages, one each: a rank's stages are a round apart, so that no rank has
        two blocks more than another, nor the last one, which has the head, more than any.
        """
        count = self.setup.pp * self.schedule.chunks
        each, over = divmod(self.architecture.layers, count)
        ends = [i * each + min(i, over) for i in range(count + 1)]
        found: list[Stage] = []
        known: dict[Hashable, bool] = {}
        given = False
        for i in range(count):
            stage = Stage(i, count, range(ends[i], ends[i + 1]), given)
            found.append(stage)
            key = self.key(stage)
            if key not in known:
                tape, step = self._begin()
                with no_collector(), recording(tape):
                    tape.begin("inputs", "forward")
                    known[key] = stage_pass(step, stage, self._message, {})[0].requires_grad
            given = known[key]
        if not given:
            raise UserError(f"method {self.method.spec()}: nothing trains in {self.architecture.name}")
        return found

    def key(self, stage: Stage) -> Hashable:
        """What decides a stage's program; its place does not."""
        of_blocks = [(self.architecture.layer_kind(i), self.method.layer_key(i)) for i in stage.blocks]
        return stage.first, stage.last, stage.given, tuple(of_blocks)

    def key_of_order(self, order: Sequence[Action]) -> Hashable:
        """What of an order decides which programs its rank runs: of shards, what comes behind what."""
        if not self.sharded:
            return None
        done = [
            (type(a), a.stage // self.setup.pp, (a.way, a.micro > 0) if isinstance(a, Pass) else None)
            for a in order
            if not isinstance(a, (Post, Wait))
        ]
        return frozenset(pairwise(done))

    @property
    def sharded(self) -> bool:
        """Whether replicas of a stage have shards of it."""
        return self.setup.parallel == "fsdp2" and not decide(self.setup.replicas * self.setup.cp == 1)

    def rank_step(self, rank: int, of_all: list[Stage], order: list[Action], alike: RankStep | None) -> RankStep:
        """The step of one rank; `alike` has the same programs, in another order."""
        stages = of_all[rank :: self.setup.pp]
        if alike is not None:
            step, programs, update = alike.step, alike.programs, alike.update
            actions = self._actions(order, programs)
        else:
            tape, step = self._begin()
            with no_collector(), recording(tape):
                programs = [self._program(step, tape, stage) for stage in stages]
                actions = self._actions(order, programs)
                step.form = programs[0].form
                step.parameters = [p for program in programs for p in program.updated()]
                record_update(step, tape)
            update = list(tape.parts)
        micros = self.setup.grad_accum
        groups = [*as_groups([parts for _, parts in actions if parts]), Group(update)]
        buffers = sum((not s.first) + (not s.last and of_all[s.number + 1].given) for s in stages)
        found = RankStep(rank, step, stages, programs, actions, update, self._message().spec)
        if self.architecture.of_megatron:  # which receives into new memory
            buffers, micros = int(not stages[0].first), found.in_flight
        found.step = replace(step, groups=groups, received_bytes=buffers * micros * self._message().nbytes)
        return found

    def _actions(self, order: Sequence[Action], programs: Sequence[StageProgram]) -> list[tuple[Action, list[Part]]]:
        """What a rank does, with the parts of it."""
        posts: dict[Hashable, list[Part]] = {}
        found: list[tuple[Action, list[Part]]] = []
        for action in order:
            if isinstance(action, Post):
                ways = tuple([done.way for done in action.sends]), tuple([done.way for done in action.receives])
                found.append((action, posts.setdefault(ways, [self._transfer(*ways)])))
            else:
                found.append(
                    (action, [] if isinstance(action, Wait) else programs[action.stage // self.setup.pp].run(action))
                )
        return found

    def _message(self) -> Tensor:
        """What stages send one another: hidden states, or the gradient of them."""
        dtype = self.setup.amp if self.sharded and self.setup.amp else self.setup.dtype
        rows, tokens = self.setup.shape
        tokens = tokens // self.setup.tp if self.setup.sequence_parallel else tokens
        first = (tokens, rows) if self.architecture.of_megatron else (rows, tokens)
        return existing((*first, self.architecture.hidden), dtype)

    def _begin(self) -> tuple[Tape, Step]:
        step = Step(self.architecture, self.method, self.setup, self.device, [], whole=self.whole)
        runs = running(step)[0]
        tape = Tape(self.device, self.capability, self.setup.stack, autocast=runs.amp)
        tape.context = context_of(self.setup)
        tape.buffer_dtype = self.setup.dtype if self.setup.dtype != runs.dtype else None
        return tape, step

    def _program(self, step: Step, tape: Tape, stage: Stage) -> StageProgram:
        """A stage with what its replicas do."""
        form: StageForm = None
        if self.architecture.of_megatron:
            from .parallel.megatron import main_gradients  # few ask for it

            form = main_gradients(self.setup)
        elif self.sharded:
            form = sharded_stage(step, self._begin()[0], stage, self._message)
        elif not decide(self.setup.replicas == 1):
            form = ddp.Replicated(Ranks(self.setup.replicas, self.setup.tp))
        return StageProgram(step, tape, stage, form, self._message, holds=self.schedule.name == "1f1b")

    def _transfer(self, sends: Sequence[str], receives: Sequence[str]) -> Part:
        """Messages that are begun together."""
        part = Part("transfer", (*receives, *sends)[0])
        pair = Attrs(ranks=Ranks(2, self.setup.gpus // self.setup.pp))
        message = self._message().spec
        for name, of in (("c10d::send", sends), ("c10d::recv_", receives)):
            part.ops += [Op(name, (message,), (), message.nbytes, 0, attrs=pair, runs=SENT) for _ in of]
        return part


def as_groups(actions: Sequence[list[Part]]) -> list[Group]:
    """Actions in their order as groups of parts: a pattern that comes again alike is one that repeats."""
    keys = [tuple(map(id, parts)) for parts in actions]
    found: list[Group] = []
    first = 0
    while first < len(keys):
        period, times = max(
            ((p, times_in_a_row(keys, first, p)) for p in range(1, LONGEST_PATTERN + 1)),
            key=lambda found: (found[1] > 1) * found[0] * found[1],
        )
        period, times = (period, times) if times > 1 else (1, 1)
        found.append(Group([part for parts in actions[first : first + period] for part in parts], times))
        first += period * times
    return found
