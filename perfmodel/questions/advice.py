"""What to run instead: the fastest setup that fits, what each change buys, and time against memory.

The samples of an optimizer step stay the same. Quality is outside the model: a choice of methods is the user's, by name
or by the number of parameters that have to train.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, product
from math import prod
from typing import Any

from ..architectures import Architecture
from ..devices import host as hosts
from ..devices.device import GivenDevice, profile_of
from ..devices.host import GivenHost
from ..devices.profile import DeviceProfile
from ..errors import UserError, check_number, one_or_several
from ..methods import Method
from ..prediction import memory
from ..prediction.given import setup_given
from ..prediction.predict import Model, Prediction, predict, resolve
from ..recording.collector import no_collector
from ..recording.reuse import Shared
from ..setup import Setup
from ..shown import Shown
from .catalogue import sized
from .knobs import Knob, KnobPosition, in_half_of, knobs, offloading
from .splits import Load

EXHAUSTIVE = 96  # combinations of one method that are all tried; of more, one knob is turned at a time
Progress = Callable[[int, int, str], None]  # methods done, methods in all, what is being tried


@dataclass(frozen=True)
class Candidate:
    """One setup of the search.

    Attributes:
        changes: labels of what differs from the start, in the order of the knobs.
        fits: whether it runs within the memory limit and trains enough.
    """

    changes: tuple[str, ...]
    prediction: Prediction
    fits: bool

    @property
    def seconds(self) -> float:
        """Mean step time, s."""
        return float(self.prediction.mean_step)

    @property
    def peak(self) -> int:
        """Peak memory, B."""
        return int(self.prediction.memory.peak)

    def order(self) -> tuple[bool, float, float]:
        """Sorts what fits first, by time; what does not, by memory, then by time."""
        return (not self.fits, self.seconds if self.fits else float(self.peak), self.seconds)

    def as_dict(self) -> dict[str, Any]:
        """Plain values (SI)."""
        p = self.prediction
        return {
            "method": p.method, "changes": list(self.changes), "setup": p.setup.as_dict(), "step_s": self.seconds,
            "peak_bytes": self.peak, "trainable_params": int(p.trainable_params), "fits": self.fits,
        }  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What one change does to the step before it.

    Attributes:
        seconds: change of the step time, s; negative is faster.
        nbytes: change of the peak, B.
    """

    label: str
    seconds: float
    nbytes: int
    after: Candidate

    def as_dict(self) -> dict[str, Any]:
        """Plain values (SI); differences have names of their own."""
        return {
            "change": self.label, "step_change_s": self.seconds, "peak_change_bytes": self.nbytes,
            "fits": self.after.fits,
        }  # fmt: skip


@dataclass(frozen=True)
class Advice(Shown):
    """The answer of `advise`.

    Attributes:
        start: where the user is.
        best: the fastest that fits; None if nothing does.
        path: from start to best, one change after another; their times sum to the whole difference.
        alone: every change by itself, from the start.
        front: candidates that nothing beats in both time and memory, by memory.
        tried: setups that were predicted.
        exhaustive: whether these were all combinations.
        limit: memory limit, B.
    """

    start: Candidate
    best: Candidate | None
    path: list[Change]
    alone: list[Change]
    front: list[Candidate]
    tried: int
    exhaustive: bool
    limit: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON of `advise`."""
        return {
            "start": self.start.as_dict(), "best": self.best.as_dict() if self.best else None,
            "path": [c.as_dict() for c in self.path], "alone": [c.as_dict() for c in self.alone],
            "front": [c.as_dict() for c in self.front], "tried": self.tried, "exhaustive": self.exhaustive,
            "limit_bytes": self.limit,
        }  # fmt: skip


Positions = tuple[int, ...]  # of each knob of a method


@dataclass
class _Space:
    """The setups of one method: memoised predictions, by the positions of its knobs."""

    model: Architecture
    method: Method
    setup: Setup
    knobs: list[Knob]
    evaluate: Callable[[Architecture, Setup, Method, tuple[str, ...]], Candidate]
    prefix: tuple[str, ...]  # the change of method or dtype, if any

    def __post_init__(self) -> None:
        self.known: dict[Positions, Candidate | None] = {}

    def at(self, positions: Positions) -> Candidate | None:
        """The candidate at some positions; None where the combination is refused."""
        if positions not in self.known:
            chosen = [knob[i] for knob, i in zip(self.knobs, positions, strict=True)]
            labels = (*self.prefix, *(choice.label for choice in chosen if choice.label))
            try:
                model, setup, method = self.model, self.setup, self.method
                for choice in chosen:
                    model, setup, method = choice.applied(model, setup, method)
                self.known[positions] = self.evaluate(model, setup, method, labels)
            except UserError:  # a combination that the method or the model does not have
                self.known[positions] = None
        return self.known[positions]

    @property
    def origin(self) -> Positions:
        """Every knob as the user has it."""
        return (0,) * len(self.knobs)

    @property
    def size(self) -> int:
        """All combinations."""
        return prod(map(len, self.knobs))

    def search(self) -> None:
        """Try all combinations, or turn one knob at a time until no choice of any is better.

        A round goes over the knobs from the last to the first and keeps the best choice of each: what makes a step
        faster comes before what trades time for memory. So most knobs are settled when the dearest is turned, and after
        the round that changes nothing every setup that is one choice away has been tried, but for those that are behind
        one that was (`Load`). A round that ends behind what was tried on the way (a choice that others are refused
        beside) goes on from there.
        """
        if self.size <= EXHAUSTIVE:
            for positions in product(*(range(len(knob)) for knob in self.knobs)):
                self.at(positions)
            return
        here = self.origin
        if not self.prefix:  # what each change buys from where the user is
            list(self.neighbours(here))
        before = None
        while here != before:
            before = here
            for k in reversed(range(len(self.knobs))):
                here = min([here, *self.turned(here, k)], key=self._order)
            here = min([here, *self.known], key=self._order)

    def turned(self, here: Positions, k: int, *, one_way: bool = False) -> Iterator[Positions]:
        """The other choices of one knob, tried; of other cuts of a model only those that may be better.

        Args:
            one_way: without those that cut it both by layers and within.
        """
        tried: dict[Load, Candidate | None] = {}
        now = self.at(here)
        best = now.seconds if now and now.fits else float("inf")
        for i, choice in enumerate(self.knobs[k]):
            load, both = choice.load, choice.setup.keys() >= {"tp", "pp"}
            if i == here[k] or (load and ((one_way and both) or load.behind(tried, best))):
                continue
            positions = (*here[:k], i, *here[k + 1 :])
            candidate = self.at(positions)
            if candidate and candidate.fits:
                best = min(best, candidate.seconds)
            if load:
                tried[load] = candidate
            yield positions

    def neighbours(self, here: Positions) -> Iterator[Positions]:
        """One knob turned, tried."""
        for k in range(len(self.knobs)):
            yield from self.turned(here, k, one_way=True)

    def _order(self, positions: Positions) -> tuple[bool, float, float]:
        candidate = self.at(positions)
        return candidate.order() if candidate else (True, float("inf"), float("inf"))

    def best(self) -> Positions | None:
        """The positions of the best candidate that fits; of equals the one that turns fewest knobs."""
        fitting = [p for p, c in self.known.items() if c and c.fits]
        return min(fitting, key=lambda p: (self._order(p), sum(map(bool, p))), default=None)


def advise(
    model: Model,
    method: str | Method = "lora",
    setup: Setup | None = None,
    device: GivenDevice = "l40s",
    *,
    methods: str | Method | Sequence[str | Method] = (),
    memory_bytes: float | None = None,
    min_trainable: float | None = None,
    host: GivenHost = "default",
    progress: Progress | None = None,
    **options: Any,
) -> Advice:
    """Search for the fastest way to train that fits; `perfmodel.advise` says what it takes and raises.

    Args:
        progress: called before each setup is tried.
    """
    architecture, start_method = resolve(model, method)
    on = profile_of(device)
    setup = setup_given(setup, options, architecture, [on])
    by = hosts.host_of(host, on)
    if not isinstance(setup.batch, int) or not isinstance(setup.seq, int):
        raise UserError("advise takes one batch and one seq; for grids use sweep")
    limit, least = _limit(memory_bytes, on), _least(min_trainable)

    shared: dict[Any, Shared] = defaultdict(Shared)  # by vocabulary, all of a model that a knob turns, and by dtype

    spaces, searched = list[_Space](), list[_Space]()
    tried = count(1)

    def evaluate(model: Architecture, setup: Setup, method: Method, changes: tuple[str, ...]) -> Candidate:
        if progress:
            progress(len(searched), len(spaces), f"{method.spec()}, setup {next(tried)}")
        alike = shared[model.vocab, setup.dtype, setup.amp]
        p = predict(model, replace(method, architecture=None), setup, on, host=by, shared=alike)
        fits = bool(memory.fits(p.memory.peak, limit, on.kind, p.memory.buffers)) and p.trainable_params >= least
        return Candidate(changes, p, fits)

    start = evaluate(architecture, setup, start_method, ())
    others = [resolve(architecture, m)[1] for m in one_or_several("methods", methods, (str, Method))]
    if min_trainable is not None:
        others += sized(architecture, setup, on, min_trainable)
    half = in_half_of(on.hardware.half, setup)
    for m in _distinct([start_method, *others]):
        label = ", ".join(filter(None, ("" if m.spec() == start_method.spec() else m.spec(), half.label)))
        _, own, _ = half.applied(architecture, setup, m)
        spaces.append(_Space(architecture, m, own, knobs(architecture, own, m), evaluate, (label,) if label else ()))
    if not spaces[0].prefix:
        spaces[0].known[spaces[0].origin] = start
    for space in spaces:
        with no_collector():  # most of what a search makes is kept
            space.search()
        searched.append(space)
    if all(space.best() is None for space in spaces):
        spaces += [more for space in spaces for more in _offloaded(space)]
    return _answer(start, spaces, limit)


def _offloaded(space: _Space) -> Iterator[_Space]:
    """The setups of a method, with more and more in the host's memory, until some fit."""
    for position in offloading(space.setup):
        model, setup, method = position.applied(space.model, space.setup, space.method)
        label = ", ".join((*space.prefix, position.label))
        found = _Space(model, method, setup, knobs(model, setup, method), space.evaluate, (label,))
        with no_collector():
            found.search()
        yield found


def _limit(memory_bytes: float | None, on: DeviceProfile) -> float:
    if memory_bytes is None:
        return on.capacity
    check_number("memory_bytes", memory_bytes)
    if not memory_bytes > 0:
        raise UserError(f"memory must be positive, got {memory_bytes}")
    return min(memory_bytes, on.capacity)


def _least(min_trainable: float | None) -> float:
    if min_trainable is None:
        return 0.0
    check_number("min_trainable", min_trainable)
    if not 0 <= min_trainable < float("inf"):
        raise UserError(f"min_trainable must be a number of parameters from 0, got {min_trainable}")
    return min_trainable


def _distinct(found: list[Method]) -> list[Method]:
    return list({m.spec(): m for m in found}.values())


def _answer(start: Candidate, spaces: list[_Space], limit: float) -> Advice:
    known = [c for space in spaces for c in space.known.values() if c]
    placed = [(space, p) for space in spaces if (p := space.best()) is not None]
    best = min(placed, key=lambda found: found[0]._order(found[1]), default=None)
    return Advice(
        start=start,
        best=best[0].at(best[1]) if best else None,
        path=_path(start, *best) if best else [],
        alone=_alone(start, spaces),
        front=_front([c for c in known if c.fits]),
        tried=sum(len(space.known) for space in spaces),
        exhaustive=all(len(space.known) == space.size for space in spaces),
        limit=limit,
    )


def _path(start: Candidate, space: _Space, goal: Positions) -> list[Change]:
    """From the start to the goal: the method first, then always the knob that gains most."""
    here = space.origin
    path: list[Change] = []
    now = start
    if space.prefix and (first := space.at(here)):
        path.append(_change(space.prefix[0], now, first))
        now = first
    while here != goal:
        steps = [(*here[:k], goal[k], *here[k + 1 :]) for k in range(len(goal)) if here[k] != goal[k]]
        possible = [p for p in steps if space.at(p)] or [goal]
        here_next = min(possible, key=lambda p: _seconds(space.at(p)))
        after = space.at(here_next)
        assert after is not None
        turned = [knob[i].label for knob, i, old in zip(space.knobs, here_next, here, strict=True) if i != old]
        path.append(_change(" + ".join(turned), now, after))
        now, here = after, here_next
    return path


def _seconds(candidate: Candidate | None) -> float:
    return candidate.seconds if candidate else float("inf")


def _change(label: str, before: Candidate, after: Candidate) -> Change:
    return Change(label, after.seconds - before.seconds, after.peak - before.peak, after)


def _alone(start: Candidate, spaces: list[_Space]) -> list[Change]:
    """Each change by itself, those that gain most time first."""
    changes = []
    for space in spaces:
        if space.prefix:
            found = [(space.prefix[0], space.at(space.origin))]
        else:
            found = [(_label(space, p), space.at(p)) for p in space.neighbours(space.origin)]
        changes += [_change(label, start, after) for label, after in found if after]
    return sorted(changes, key=lambda c: c.seconds)


def _label(space: _Space, positions: Positions) -> str:
    chosen: list[KnobPosition] = [knob[i] for knob, i in zip(space.knobs, positions, strict=True) if i]
    return " + ".join(c.label for c in chosen)


def _front(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both time and memory, by memory."""
    front: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.peak, c.seconds, len(c.changes))):
        if not front or c.seconds < front[-1].seconds:
            front.append(c)
    return front
