"""Ops that run one after another: parts with their host work and memory, and groups of parts that repeat."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .dims import Dim, larger
from .op import Op
from .streams import MAIN, Run

PHASES = ("forward", "backward", "optimizer")


@dataclass(slots=True)
class HostWork:
    """What a run of a part makes the host do besides its calls, which Python or autograd do at their own pace.

    Attributes:
        nodes: autograd nodes.
        modules: Python calls of layers.
        adapters: Python calls of adapters.
        checkpoints: calls of `torch.utils.checkpoint`.
        hooks: Python hooks on saved tensors.
        weights: parameters of the modules that run.
        returns: parameters of the modules whose backward runs here.
        gradients: hooks on complete gradients (`Tape.on_gradient`).
        graphs: compiled graphs that are entered here.
        searched: nodes of the graph that are looked at for what gets no gradient.
        units: hooks around units of parameters that are gathered together, forward or backward.
        updates: updates of the parameters that begin here.
    """

    nodes: int = 0
    modules: int = 0
    adapters: int = 0
    checkpoints: int = 0
    hooks: int = 0
    weights: int = 0
    returns: int = 0
    gradients: int = 0
    graphs: int = 0
    searched: int = 0
    units: int = 0
    updates: int = 0


class OpenTurn(NamedTuple):
    """What of a part is recorded once and runs `times` times in a row: where the part stood as it began."""

    times: int
    ops: int
    host: HostWork
    delta: Dim
    highest: Dim
    further: tuple[Dim, Dim] | None  # delta and highest of further micro-batches


@dataclass(eq=False)
class Part:
    """Ops that run `repeat` times in a row: a block of layers in forward or backward, the head, the optimizer.

    `host` counts what the host does besides the calls.
    `delta` is the net change of live bytes over one run, `peak` the highest point above its start. `later` has those
    of further micro-batches, where they differ (`Tape.alike`), and no ops.
    `turn` is what is being recorded, if it repeats (`take_turns`).
    `compiled` marks code that a compiler made (no Python between its calls), `captured` code that a CUDA graph runs.
    """

    name: str
    phase: str
    repeat: int = 1
    ops: list[Op] = field(default_factory=list)
    host: HostWork = field(default_factory=HostWork)
    compiled: bool = False
    captured: bool = False
    delta: Dim = 0
    highest: Dim = 0
    rising: bool = False
    later: "Part | None" = None
    turn: "OpenTurn | None" = None

    @property
    def runs(self) -> list[Run] | None:
        """Where its ops run; None if all do on the compute stream and wait for no other."""
        runs = [op.runs for op in self.ops]
        return None if runs.count(MAIN) == len(runs) else runs

    def allocate(self, nbytes: Dim) -> None:
        """Bytes come alive in this part."""
        self.delta = self.delta + nbytes
        self.rising = True
        if self.later is not None:
            self.later.allocate(nbytes)

    def free(self, nbytes: Dim) -> None:
        """Bytes die in this part."""
        if self.rising:
            self._note_peak()
        self.delta = self.delta - nbytes
        if self.later is not None:
            self.later.free(nbytes)

    def passes_through(self, other: "Part") -> None:
        """What another part does to live bytes happens here, within this one."""
        self.highest = larger(self.peak, self.delta + other.peak)
        self.delta = self.delta + other.delta

    def take_turns(self, times: int) -> None:
        """What is recorded from here to the next call of this runs `times` times in a row."""
        if self.turn is not None:
            self._repeat(self.turn)
        self.turn = None
        if times > 1:
            further = self.later.climb() if self.later is not None else None
            self.turn = OpenTurn(times, len(self.ops), replace(self.host), *self.climb(), further)

    def climb(self) -> tuple[Dim, Dim]:
        """Live bytes and their highest point so far; the latter is counted anew from here."""
        found = self.delta, self.peak
        self.highest = self.delta
        return found

    def _repeat(self, turn: OpenTurn) -> None:
        again = turn.times - 1
        self.ops += self.ops[turn.ops :] * again
        for name in HostWork.__slots__:
            now = getattr(self.host, name)
            setattr(self.host, name, now + (now - getattr(turn.host, name)) * again)
        self._grow(again, turn.delta, turn.highest)
        if self.later is not None and turn.further is not None:
            self.later._grow(again, *turn.further)

    def _grow(self, again: int, delta: Dim, highest: Dim) -> None:
        """Live bytes go on as since `delta`, so many times again; `highest` is how high they were before that."""
        more = (self.delta - delta) * again
        self.highest = larger(highest, larger(self.peak, self.peak + more))
        self.delta = self.delta + more

    def further(self) -> "Part":
        """This part in a further micro-batch, which also does what the first leaves out (`Attrs.later`)."""
        later, ops = self.later or self, [op.settled() for op in self.ops]
        return replace(self, ops=ops, delta=later.delta, highest=later.peak, later=None)

    @property
    def peak(self) -> Dim:
        """Highest point of live bytes above the start of a run."""
        self._note_peak()
        return self.highest

    def _note_peak(self) -> None:
        """Live bytes are highest where they stop rising."""
        self.rising = False
        self.highest = larger(self.highest, self.delta)


@dataclass
class Group:
    """Parts that run one after another, `repeat` times over (micro-batches)."""

    parts: list[Part]
    repeat: int = 1
