"""Ops that run one after another: parts with their host work and memory, and groups of parts that repeat."""

from dataclasses import dataclass, field, replace

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


@dataclass(eq=False)
class Part:
    """Ops that run `repeat` times in a row: a block of layers in forward or backward, the head, the optimizer.

    `host` counts what the host does besides the calls.
    `delta` is the net change of live bytes over one run, `peak` the highest point above its start. `later` has those
    of further micro-batches, where they differ (`Tape.alike`), and no ops.
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
