"""What the ranks of a pipeline do, and in which order: passes of micro-batches, and what they send one another.

Stage s of S lies on rank s mod p. Every micro-batch goes forward through the stages in their order and backward in the
opposite one; a schedule says in which order a rank does its share. An order is a value, so that it can be counted,
compared with the real program's and put on clocks.

Sources: torch 2.13, distributed/pipelining/schedules.py (`ScheduleGPipe`, `Schedule1F1B`, `ScheduleInterleaved1F1B`,
`_add_send_recv`, `_add_unshard_reshard`); https://arxiv.org/abs/1811.06965 (GPipe), https://arxiv.org/abs/2104.04473
(1F1B, interleaved).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from ...errors import UserError

FORWARD, BACKWARD = "forward", "backward"


class Pass(NamedTuple):
    """A micro-batch through a stage, `way` forward or backward."""

    way: str
    stage: int
    micro: int


class Post(NamedTuple):
    """Transfers that are begun together, each named by the pass whose result it carries to the next stage."""

    sends: tuple[Pass, ...] = ()
    receives: tuple[Pass, ...] = ()


class Wait(NamedTuple):
    """The compute stream waits for transfers that were begun."""

    post: Post


class Reduce(NamedTuple):
    """Behind a stage's last backward pass: gradients are reduced, and divided by the number of micro-batches."""

    stage: int


class Gather(NamedTuple):
    """All shards of a stage are gathered, to be there when one of its passes begins."""

    stage: int


class Free(NamedTuple):
    """What is gathered of a stage goes."""

    stage: int


Action = Pass | Post | Wait | Reduce | Gather | Free
ACTIVE = 3  # stages of a rank that are gathered at a time (`_add_unshard_reshard`)


class Schedule(NamedTuple):
    """Which order, and how many stages are on each rank."""

    name: str
    chunks: int = 1

    @classmethod
    def parse(cls, spec: str) -> "Schedule":
        """From 1f1b, gpipe or interleaved:v=CHUNKS, as a setup has it."""
        name, _, chunks = spec.partition(":v=")
        return cls(name, int(chunks or 1))

    def check(self, ranks: int, micros: int) -> None:
        """Raise `UserError` for numbers of micro-batches that PyTorch refuses."""
        if self.name == "1f1b" and micros < ranks:
            raise UserError(
                f"pp {ranks} with {micros} micro-batches: 1f1b needs as many as there are stages; "
                f"use --grad-accum {ranks} or more"
            )
        rounds = max(1, micros // ranks)
        if self.name == "interleaved" and micros % rounds:
            raise UserError(
                f"pp {ranks} with {micros} micro-batches: interleaved needs a multiple of the {rounds} rounds; "
                f"use --grad-accum {ranks * rounds}"
            )

    def orders(
        self, ranks: int, micros: int, returns: Callable[[int], bool], *, sharded: bool = False
    ) -> list[list[Action]]:
        """What each rank does, in its order.

        Args:
            returns: whether a stage sends a gradient back to the one before it.
            sharded: whether stages are gathered of shards: interleaved ones ahead of their passes.
        """
        pipeline = Pipeline(ranks * self.chunks, micros, returns)
        if self.name == "interleaved":
            passes = [list(_interleaved(rank, ranks, self.chunks, micros)) for rank in range(ranks)]
            return _with_transfers(pipeline, [list(_with_gathers(own)) for own in passes] if sharded else passes)
        one = _one_forward_one_backward if self.name == "1f1b" else _fill_and_drain
        return [[a for a in one(pipeline, stage) if a not in (Post(), Wait(Post()))] for stage in range(ranks)]


class Pipeline(NamedTuple):
    """So many stages, through which so many micro-batches go."""

    stages: int
    micros: int
    returns: Callable[[int], bool]

    def next_stage(self, done: Pass) -> int | None:
        """Which stage the result of a pass goes to."""
        if done.way == FORWARD:
            return done.stage + 1 if done.stage + 1 < self.stages else None
        return done.stage - 1 if done.stage and self.returns(done.stage) else None

    def sent(self, way: str, stage: int, micro: int) -> tuple[Pass, ...]:
        """What a stage sends behind a pass: one transfer or none."""
        done = Pass(way, stage, micro)
        return () if self.next_stage(done) is None else (done,)

    def received(self, way: str, stage: int, micro: int) -> tuple[Pass, ...]:
        """What a stage receives before a pass."""
        before = stage - 1 if way == FORWARD else stage + 1
        return self.sent(way, before, micro) if 0 <= before < self.stages else ()


def _fill_and_drain(of: Pipeline, stage: int) -> Iterator[Action]:
    """GPipe: all forward passes, then all backward ones."""
    for way in (FORWARD, BACKWARD):
        posts = []
        for micro in range(of.micros):
            came = Post(receives=of.received(way, stage, micro))
            yield from (came, Wait(came), Pass(way, stage, micro))
            posts.append(Post(sends=of.sent(way, stage, micro)))
            yield posts[-1]
        yield from map(Wait, posts)
    yield Reduce(stage)


def _one_forward_one_backward(of: Pipeline, stage: int) -> Iterator[Action]:
    """1F1B: as many forward passes as there are stages from here on, then a backward and a forward pass in turn.

    In turn what is sent one way and what is received from there are begun together.
    """
    warm = min(of.micros, of.stages - stage)
    sending = Post()
    for micro in range(warm):
        came = Post(receives=of.received(FORWARD, stage, micro))
        yield from (came, Wait(came), Pass(FORWARD, stage, micro), Wait(sending))
        sending = Post(sends=of.sent(FORWARD, stage, micro))
        if micro < warm - 1:
            yield sending
    left = sending.sends
    for back in range(of.micros):
        forth = back + warm
        both = Post(left if forth <= of.micros else (), of.received(BACKWARD, stage, back))
        yield from (both, Wait(both), Pass(BACKWARD, stage, back))
        returned = of.sent(BACKWARD, stage, back)
        if forth < of.micros:
            both = Post(returned, of.received(FORWARD, stage, forth))
            yield from (both, Wait(both), Pass(FORWARD, stage, forth))
            left = of.sent(FORWARD, stage, forth)
            continue
        if forth > of.micros:
            yield Wait(sending)
        sending = Post(sends=returned)
        yield sending
    yield from (Wait(sending), Reduce(stage))


def _interleaved(rank: int, ranks: int, chunks: int, micros: int) -> Iterator[Action]:
    """The passes of interleaved 1F1B: micro-batches go in rounds through a rank's chunks, one after another."""
    a_round = micros // max(1, micros // ranks)
    total = chunks * micros
    warm = min((chunks - 1) * a_round + 2 * (ranks - 1 - rank), total)
    met: Counter[tuple[str, int]] = Counter()

    def step(way: str, number: int) -> Pass:
        chunk = number // a_round % chunks
        stage = (chunk if way == FORWARD else chunks - 1 - chunk) * ranks + rank
        met[way, stage] += 1
        return Pass(way, stage, met[way, stage] - 1)

    for number in range(total + warm):
        if number < total:
            yield step(FORWARD, number)
        if number >= warm:
            done = step(BACKWARD, number - warm)
            yield done
            if done.micro == micros - 1:
                yield Reduce(done.stage)


def _with_gathers(order: list[Action]) -> Iterator[Action]:
    """The order of a rank with the stages gathered that come next, in the place of those that do not."""
    active: set[int] = set()
    for i, action in enumerate(order):
        if isinstance(action, Pass):
            coming = list(islice(dict.fromkeys(a.stage for a in order[i:] if isinstance(a, Pass)), ACTIVE))
            gone, new = [s for s in active if s not in coming], [s for s in coming if s not in active]
            active.difference_update(gone)
            active.update(new)
            yield from map(Free, gone)
            yield from map(Gather, new)
        yield action
    yield from map(Free, active)


def _with_transfers(of: Pipeline, passes: list[list[Action]]) -> list[list[Action]]:
    """Passes with their transfers: sent behind the pass that makes it, awaited before the one that needs it.

    A receive is begun where its rank stands when the sender comes to it, all ranks taking one action in turn.
    """
    ranks = len(passes)
    made: list[list[Action]] = [[] for _ in passes]
    known: list[set[Pass]] = [set() for _ in passes]
    left = [iter(order) for order in passes]
    heads = [next(order, None) for order in left]
    while any(head is not None for head in heads):
        for rank, head in enumerate(heads):
            if head is None:
                continue
            if isinstance(head, Pass):
                needed = of.received(*head)
                if not known[rank].issuperset(needed):
                    continue
                made[rank] += [Wait(Post(receives=needed))] if needed else []
                made[rank].append(head)
                target = of.next_stage(head)
                if target is not None:
                    made[rank].append(Post(sends=(head,)))
                    made[target % ranks].append(Post(receives=(head,)))
                    known[target % ranks].add(head)
            else:
                made[rank].append(head)
            heads[rank] = next(left[rank], None)
    for order in made:
        order += [Wait(a) for a in reversed(order) if isinstance(a, Post) and a.sends]
    return made
