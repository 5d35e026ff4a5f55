"""A stage of a pipeline under FSDP2: what is gathered stays from one micro-batch to the next, as far as it may.

Its schedule switches off, for every backward pass, that gradients are reduced and weights freed behind it; once the
stage has no more passes to do, its units are freed and reduced one after another, in the order of its modules. Forward
passes free as they do without a pipeline: never if the weights are to stay, which is torchtitan's default
(`get_fsdp_reshard_after_forward_policy`), else block by block, so that who comes behind a forward pass gathers again,
and who comes behind a backward pass does not. With mixed precision gradients are summed and reduced in fp32, as
torchtitan has it.

Sources: torch 2.13, distributed/pipelining/stage.py (`backward_maybe_with_nosync`, `perform_reduce_grad`), schedules.py
(`UNSHARD`, `RESHARD`); distributed/fsdp/_fully_shard/.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from ..program.ranks import Ranks
from ..program.streams import COMPUTE
from ..tape.core import new_tensor, tape
from ..tape.tensor import Grads, Node, Parameter, Tensor
from .parallel.fsdp2 import FullyShard
from .parallel.gathered import GATHERED, Gathered
from .parallel.units import ROOT, ShardedUnit, run_of

AGAIN = (
    "FSDP2 gathers a stage's weights again behind every forward pass; torchtitan leaves them gathered beside pipelines "
    "unless told otherwise (--no-reshard)"
)
State = tuple[tuple[bool, bool], ...]  # of each unit: whether it is there, and whether it is on its way


class ShardedStage(FullyShard):
    """The hooks of FSDP2 around a stage."""

    def __init__(
        self, units: Sequence[ShardedUnit], ranks: Ranks, across: Ranks | None, number: int, reduce_dtype: str | None
    ) -> None:
        super().__init__(units, ranks, None, across=across, reduce_dtype=reduce_dtype)
        self.reduces = False
        for held in self.units.values():
            held.event = f"{GATHERED} {number}"

    @property
    def notes(self) -> Sequence[str]:
        """That weights which are gathered again and again are a choice."""
        again = any(not held.unit.stays for held in self.units.values())
        return (AGAIN,) if again else ()

    @property
    def parameters(self) -> list[Parameter]:
        """Those of all units."""
        return [p for held in self.units.values() for p in held.unit.parameters]

    @property
    def state(self) -> State:
        """What is gathered now."""
        return tuple((bool(held.whole), held.coming is not None) for held in self.units.values())

    def become(self, state: State) -> None:
        """Gather and free as much, without the calls that do it."""
        for held, (whole, coming) in zip(self.units.values(), state, strict=True):
            if whole != bool(held.whole):
                held.whole = held.allocated(self.ranks) if whole else []
            if coming != (held.coming is not None):
                numel = sum(held.unit.numels) * self.ranks.size
                held.coming = new_tensor((numel,), held.unit.dtype) if coming else None

    def gather(self) -> None:
        """All units, on the compute stream (`UNSHARD`)."""
        for _, held in self._in_parts("gather", "forward"):
            if not held.whole:
                held.gather(self.ranks, on=COMPUTE)

    def copy_out(self) -> None:
        """What was gathered so, before the first pass that needs it."""
        for _, held in self._in_parts("gather", "forward"):
            if held.coming is not None:
                held.copied_out(self.ranks)

    def free(self) -> None:
        """All units (`RESHARD`)."""
        for _, held in self._in_parts("free", "backward"):
            held.whole.clear()

    def reduce(self) -> None:
        """`perform_reduce_grad`: all gradients, behind the last backward pass."""
        self.reduces = True
        for path, held in self._in_parts("reduce", "backward"):
            self._reduce(path, held)
        tape().begin("reduce", "backward")
        self.end_of_backward()
        self.reduces = False

    def _in_parts(self, name: str, phase: str) -> Iterator[tuple[str, Gathered]]:
        """Units as modules are found, those of like blocks in a part that counts as often."""
        order = [(path, self.units[path]) for path in (ROOT, *(path for path in self.units if path != ROOT))]
        for _, alike in groupby(order, key=lambda found: id(run_of(found[1].unit))):
            those = list(alike)
            made, run = tape().begin(name, phase), run_of(those[0][1].unit)
            made.repeat = run.repeat if run is not None else 1
            yield from those

    def end_of_micro_batch(self) -> None:
        """Units whose input needed no gradient."""
        for path, held in self.units.items():
            if path not in self.done:
                self._sum(held)
        self.done.clear()

    def _post_backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        """Gradients and weights stay."""
        (path,) = node.attrs
        self.done.add(path)
        self._sum(self.units[path])
        return tuple(grads)

    def _sum(self, held: Gathered) -> None:
        """`post_backward` without a reduction."""
        self._accumulate(held.unit.parameters)
        self._cast_to_wait(held.unit.parameters)
