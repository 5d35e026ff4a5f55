"""A recorded program: the micro-batches of a step as a value, for any batch and length that it was solved for.

What a trace of real PyTorch gives and what the tape writes are the same thing: parts of ops with multiplicity, host
work, parameters. A `Program` holds them with numbers that may be polynomials in batch and length
(`program.polynomials`), so that one recording answers for a whole grid of sizes, on any device of its kind and before
any optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from ..architectures.base import Architecture
from ..architectures.traits import Traits
from ..methods.parts.base import Method
from ..program.dims import Dim, larger
from ..program.marks import is_mark
from ..program.op import Op, Spec
from ..program.part import Part
from ..program.polynomials import Polynomial, Size, value
from ..program.routing import Routing
from ..setup import Setup
from ..tape.grouped import attrs_of_experts
from ..tape.tensor import Parameter, Tensor
from ..values import once
from .reuse import MicroBatches

GROUPED = "_grouped_mm"
Numbers = tuple[Any, ...]  # ints or polynomials, of which the largest counts


@dataclass(frozen=True)
class LiveBytes:
    """Most live bytes of a model above its weights, grown from traces of the model with few of its blocks.

    What a block holds is taken from the larger model where two differ: in a small one the peak may lie elsewhere.

    Attributes:
        checked: of the largest trace, in either half of the step (before and after the middle of a backward pass).
        least: of the smallest trace; more: of those with one more block of a kind. None where the whole was traced.
        times: blocks of each kind that the smallest trace lacks.
    """

    checked: tuple[Numbers, Numbers]
    least: tuple[Numbers, Numbers] = ((), ())
    more: tuple[tuple[Numbers, Numbers], ...] = ()
    times: tuple[int, ...] = ()

    def at(self, batch: Dim, seq: Dim) -> Dim:
        """The bytes at a batch and a length."""

        def most(numbers: Numbers) -> Any:
            found: Any = 0
            for number in numbers:
                found = larger(found, value(number, batch, seq))
            return found

        ends = []
        for half in (0, 1):
            end, least = most(self.checked[half]), most(self.least[half])
            adds = [most(more[half]) - least for more in self.more]
            grown = sum((min(2, n) * more for n, more in zip(self.times, adds, strict=True)), 0)
            further = (end - least - grown) / max(1, len(adds))
            for n, more in zip(self.times, adds, strict=True):
                end = end + max(0, n - 2) * (more + further)
            ends.append(end)
        return _whole(larger(*ends))


def _whole(nbytes: Any) -> Dim:
    return nbytes.astype(np.int64) if isinstance(nbytes, np.ndarray) else int(nbytes)


@dataclass(frozen=True)
class Program:
    """Recorded forward and backward passes.

    Attributes:
        first, later: parts of the first micro-batch, and of further ones where there are any.
        parameters: of the whole model, each once.
        live: activations, and gradients that are complete.
        buffers: of all modules.
        traced, blocks: of how many blocks the largest trace was made, and how many the model has.
        at: the one size that it holds for; None: any.
        made_with: versions of the packages whose program it is.
        notes: what a reader of a prediction must know.
    """

    first: tuple[Part, ...]
    later: tuple[Part, ...]
    parameters: tuple[Parameter, ...]
    live: LiveBytes
    buffers: tuple[Spec, ...]
    traced: int
    blocks: int
    at: Size | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def extrapolated(self) -> bool:
        """Whether not all blocks were traced."""
        return self.traced < self.blocks

    @property
    def told(self) -> list[str]:
        """What a reader of a prediction should know about the recording."""
        if self.extrapolated:
            how = (
                f"traced with up to {self.traced} of its {self.blocks} blocks; that the others add the same was "
                "checked call by call"
            )
        else:
            how = "traced whole"
        if self.has_experts:
            how = f"every expert of its mixtures is taken to get as many tokens; {how}"
        versions = ", ".join(f"{name} {version}" for name, version in self.made_with.items())
        return [*self.notes, f"{how} ({versions})" if versions else how]

    @once
    def has_experts(self) -> bool:
        """Whether some of its products are by expert."""
        return any(op.name == GROUPED for part in self.first for op in part.ops)

    def micro_batches(self, batch: Dim, seq: Dim, count: int, device: str, capability: str) -> MicroBatches:
        """`count` micro-batches of a size.

        Raises:
            UserError: of experts whose products the device does not have.
        """
        evaluated = Evaluated(batch, seq, device, capability)
        first = [evaluated.part(part) for part in self.first]
        first[0].highest = self.live.at(batch, seq)
        if first[-1].repeat > 1:
            first.append(Part("traced", "backward"))
        first[-1].allocate(sum(p.nbytes * p.count for p in self.parameters if p.used))  # they wait for the update
        groups = [(first, 1)]
        if count > 1:
            groups.append(([evaluated.part(part) for part in self.later], count - 1))
        return MicroBatches(groups, [p.copy() for p in self.parameters], 0, self.told)


class Evaluated:
    """Parts and ops of a program at one size; equal numbers become one object, as on a tape.

    With a kind of device and its compute capability, products by expert are as it has them.
    """

    def __init__(self, batch: Dim, seq: Dim, device: str = "", capability: str = "") -> None:
        self.size, self.on = (batch, seq), (device, capability)
        self.numbers: dict[Polynomial, Dim] = {}
        self.ops: dict[int, Op] = {}

    def part(self, part: Part) -> Part:
        """A part at the size, without marks."""
        return replace(part, ops=[self.op(op) for op in part.ops if not is_mark(op.name)])

    def with_marks(self, part: Part) -> Part:
        """A part at the size, with its marks."""
        return replace(part, ops=[self.op(op) for op in part.ops])

    def op(self, op: Op) -> Op:
        """An op at the size."""
        made = self.ops.get(id(op))
        if made is None:
            made = self.ops[id(op)] = copy(op)
            made.inputs, made.outputs = self.specs(op.inputs), self.specs(op.outputs)
            made.bytes_read, made.bytes_written = self.number(op.bytes_read), self.number(op.bytes_written)
            if op.name == GROUPED and self.on[0]:
                weights = made.outputs[0] if op.attrs.layout == "nt" else made.inputs[1]
                made.attrs = attrs_of_experts(op.attrs.layout, weights.dtype, Routing(weights.shape[0]), *self.on)
        return made

    def specs(self, specs: Sequence[Spec]) -> tuple[Spec, ...]:
        """What it sees of tensors."""
        return tuple(Spec(s.dtype, tuple(map(self.number, s.shape)), self.number(s.copies)) for s in specs)

    def number(self, number: Any) -> Dim:
        """A dim, or bytes."""
        if not isinstance(number, Polynomial):
            return number
        if number not in self.numbers:
            self.numbers[number] = number.at(*self.size)
        return self.numbers[number]


Recorder = Callable[[Method, Setup, str, str], Program]  # of method, setup, kind of device, compute capability


@dataclass(frozen=True)
class RecordedModel(Architecture):
    """A model whose programs are not written on the tape but recorded elsewhere, and what methods must know of it.

    Attributes:
        linears: its linear layers, by their whole paths.
        path: where its longest row of blocks lies in the module tree.
        found: what it is like.
        limits: lengths from which on its program may be another, ascending.
        recorder: gives the program of a method in a setup; batch and seq may be arrays.
    """

    linears: tuple[str, ...] = ()
    path: str = ""
    found: Traits | None = None
    limits: tuple[int, ...] = ()
    recorder: Recorder | None = field(default=None, repr=False, compare=False)

    recorded: ClassVar[bool] = True

    @property
    def traits(self) -> Traits:  # type: ignore[override]
        """What it is like, as its modules say."""
        assert self.found is not None
        return self.found

    @property
    def layer_path(self) -> str:  # type: ignore[override]
        """Where its longest row of blocks lies."""
        return self.path

    def linear_names(self) -> list[str]:
        """Its linear layers, by their whole paths."""
        return list(self.linears)

    def program(self, method: Method, setup: Setup, device: str, capability: str) -> Program:
        """What was recorded of a method in a setup; arguments and errors as of `recording.record.build`."""
        assert self.recorder is not None
        return self.recorder(method, setup, device, capability)


def recorded_module(name: str) -> RecordedModel:
    """A module of which no more is known than its program."""
    return RecordedModel(
        name=name, model_type="module", layers=1, hidden=0, heads=0, kv_heads=0, head_dim=0, intermediate=0, vocab=0,
        max_positions=None, tied=False, found=Traits("causal", its_own_norm, ()),
    )  # fmt: skip


def its_own_norm(parameter: Any, x: Tensor, setup: Setup) -> Tensor:
    """The norm of a recorded model: nobody has to write it."""
    raise TypeError("a recorded model runs its own norms")
