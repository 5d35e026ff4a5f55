"""A recorded program on a tape, between the hooks of what several GPUs do.

Its pieces (`pieces.py`) are nodes of the tape's graph, one behind another: a node's forward pass writes the calls
that a trace has of it, its backward pass those of that. So hooks around blocks, at adapters and at gradients find what
they find around a model that is written on the tape.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ..errors import UserError
from ..optimizers.parts.update import existing
from ..program.dims import Dim, larger
from ..program.marks import GRADIENT, USED, read_mark
from ..program.op import Op
from ..program.part import HostWork, Part
from ..setup import Setup
from ..tape.autograd import differentiate
from ..tape.core import Wrapping, new_tensor, tape
from ..tape.engine import run_backward
from ..tape.tensor import Grads, Node, Parameter, Tensor
from .deepspeed.stages import IN_BLOCK, layer_and_module
from .parallel.form import ParallelForm
from .pieces import Piece, Series, series_of
from .program import Evaluated, Program

# What of a setup several GPUs have with a recorded program, and the values
BESIDE: dict[str, tuple[Any, ...]] = {
    "tp": (1,), "cp": (1,), "pp": (1,), "objective": ("sft",),
    "fsdp_units": ("accelerate", "blocks"),
}  # fmt: skip


def check_several(setup: Setup) -> None:
    """Raise `UserError` where several GPUs are not modelled by a trace with the rest of a setup."""
    for name, known in BESIDE.items():
        if (value := getattr(setup, name)) not in known:
            use = f"--{name.replace('_', '-')} {known[0]}"
            raise UserError(f"{name}: {value} on several GPUs is not modelled by a trace; use {use}")


class Replay:
    """A recorded program as a rank runs it.

    Attributes:
        parameters: of the whole model; those of identical blocks once, with their number.
        late: as `Architecture.registers_late` has it.
    """

    def __init__(self, program: Program, setup: Setup, name: str, device: str, capability: str) -> None:
        self.name = name
        at = Evaluated(setup.batch, setup.seq, device, capability)
        made = [
            series_of([at.with_marks(part) for part in parts], name)
            for parts in (program.first, program.later)
            if parts
        ]
        self.passes, self.held = ([pair[i] for pair in made] for i in (0, 1))
        self.left: Dim = 0  # bytes that the graph of the micro-batch before holds, up to the next loss
        self.buffers = program.buffers
        self.parameters = in_order_of_use(once_a_block(program.parameters, self.passes[0]), self.passes[0])
        self.named = {p.name: p for p in self.parameters}
        self.late = modules_of_blocks(program.parameters)
        self.beside = {lists[0]: lists for series in self.passes[0] for lists in series.numbers}
        self.numbers: dict[str, int | None] = {}  # of the block that runs, by its list
        self.weights = weights_of(self.parameters, [s for series in self.passes[0] for s in series.pieces])
        self.leaf = existing((), "fp32")
        self.leaf.requires_grad = True

    def micro_batch(self, form: ParallelForm) -> list[Part]:
        """Record a micro-batch between the hooks of a form; returns its parts."""
        current = tape()
        again = any(p.grad is not None for p in self.parameters)
        current.begin("inputs", "forward")
        loss = self.forward(form, again=again)
        current.part.free(self.left)
        self.left = self.held[-1 if again else 0]
        run_backward(loss, existing(loss.shape, loss.dtype))
        current.begin("exchange", "backward")
        with current.no_grad():
            form.end_of_backward()
        parts = list(current.parts)
        current.parts.clear()
        current.twins.clear()
        return parts

    def forward(self, around: Wrapping, *, again: bool = False) -> Tensor:
        """Record the forward pass; returns the loss.

        Args:
            again: whether gradients of micro-batches before are there.
        """
        current, self.around = tape(), around
        around.begin()
        current.buffers += self.buffers
        current.part.host.weights += self.weights.get("", 0)
        x, link = existing((), "fp32"), existing((), "fp32")
        for series in self.passes[-1 if again else 0]:
            current.begin("traced", "forward").repeat = series.repeat
            for s in series.pieces:
                if series.repeat == 1 and s.path:
                    current.begin("traced", "forward")
                self._belong(s, current.part)
                x, link, given = self._between_hooks(s, x, link)
                if series.repeat == 1 and s.path:
                    current.begin("traced", "forward")
                if given:
                    x = self._ended(given)
        return x

    def _belong(self, s: Piece, part: Part) -> None:
        """Parameters of a block run in a part, those of lists beside its own, too."""
        for path in self.beside.get(s.row, ()):
            for p in self.parameters:
                if p.name.startswith(f"{path[:-1]}{s.number}."):
                    p.part = part

    def _between_hooks(self, s: Piece, x: Tensor, link: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """A piece: its output, what all that follows hangs on, and what the model gives."""
        made: list[Any] = []
        around = self.around

        def run(x: Tensor) -> Tensor:
            out, *rest = self._run(s, x, link)
            made.extend(rest)
            return out

        if s.path and not s.receives:
            x = x.alias()
        if s.block:
            x = around.block(s.name, run, x)
        elif s.path:
            x = around.module(s.name, run, x)
        else:
            x = run(x)
        return x, made[0], made[1]

    def _run(self, s: Piece, x: Tensor, link: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Its forward calls, and the node of its backward ones."""
        self.numbers |= dict.fromkeys(self.beside.get(s.row, ()), s.number)
        self._write(s.forward)
        self._account(s, "forward")
        inputs = [x, link, *([self.leaf] if s.trains else [])]
        node = differentiate("Piece", inputs, self._backward, (s, [(t.shape, t.dtype) for t in (x, link)]))
        out, behind = existing((), "fp32"), existing((), "fp32")
        given = [existing(spec.shape, spec.dtype) for spec in s.outputs or ()]
        if node is not None:
            differentiable = given if given else [out] if s.gives or not s.path else []
            node.produces(*(t for t in differentiable if t.is_floating), behind)
        return out, behind, given

    def _backward(self, node: Node, grads: Sequence[Tensor | None]) -> Grads:
        s, inputs = node.attrs
        self.numbers |= dict.fromkeys(self.beside.get(s.row, ()), s.number)
        tape().part.host.nodes -= 1  # the trace has counted nodes
        self._write(s.backward)
        self._account(s, "backward")
        return (*(existing(shape, dtype) for shape, dtype in inputs), *([None] if s.trains else []))

    def _write(self, ops: Sequence[Op]) -> None:
        """Append calls to the current part; what marks say happens between them."""
        part = tape().part
        for op in ops:
            mark = read_mark(op)
            if mark is None:
                part.ops.append(op)
                continue
            part.highest = larger(part.peak, part.delta + op.bytes_written)
            part.delta = part.delta + op.bytes_read
            if mark.what == USED:
                self.around.weight(self._parameter(mark.of))
            elif mark.what == GRADIENT:
                self._complete(self._parameter(mark.of))

    def _parameter(self, name: str) -> Parameter:
        """That of a name with a star in the place of the number of the block that runs."""
        row, star, rest = name.partition(".*.")
        found = self.named.get(f"{row}.{self.numbers.get(f'{row}.*')}.{rest}" if star else name)
        if found is None:
            raise UserError(
                f"gpus: several are not modelled by a trace of {self.name}, whose blocks share parameters; use --gpus 1"
            )
        return found

    def _complete(self, p: Parameter) -> None:
        """The gradient of a parameter is there, or has grown."""
        current = tape()
        p.used = True
        if current.on_gradient is not None:
            current.on_gradient(p, new_tensor(p.shape, p.dtype))
        elif p.grad is None:
            p.grad = new_tensor(p.shape, p.dtype)
            p.grad.storage.copies = p.count
        if current.after_gradient is not None:
            current.after_gradient(p)

    def _ended(self, given: list[Tensor]) -> Tensor:
        """Behind the call of the model; a search of the graph sees all its nodes."""
        host = tape().part.host
        before = host.searched
        first = self.around.end(given)[0]
        if host.searched != before:
            host.searched = before + sum(
                s.works["backward"].nodes * series.repeat
                for series in self.passes[0]
                for s in series.pieces
                if "backward" in s.works
            )
        return first

    def _account(self, s: Piece, phase: str) -> None:
        """What the host does besides calls."""
        host, work = tape().part.host, s.works.get(phase, HostWork())
        for one in fields(HostWork):
            setattr(host, one.name, getattr(host, one.name) + getattr(work, one.name))
        if s.path and (phase == "forward" or work.modules):  # or runs again
            host.weights += self.weights.get(s.name, 0)


def in_order_of_use(parameters: Sequence[Parameter], series: Sequence[Series]) -> list[Parameter]:
    """Parameters as the tape has them: those of a block as its forward pass comes to them, where the block stands."""
    used: dict[str, int] = {}
    for each in series:
        for s in each.pieces:
            for op in s.forward:
                mark = read_mark(op)
                if mark is not None and mark.what == USED:
                    used.setdefault(mark.of.replace("*", str(s.number), 1), len(used))
    first: dict[str, int] = {}
    keys = {}
    for i, p in enumerate(parameters):
        block = IN_BLOCK.match(p.name)
        keys[p] = first.setdefault(block.group() if block else p.name, i), used.get(p.name, len(used) + i)
    return sorted(parameters, key=keys.__getitem__)


def modules_of_blocks(parameters: Sequence[Parameter]) -> tuple[str, ...]:
    """Modules within blocks in the order in which they were made, each behind what it is in."""
    found = dict[str, None]()
    for p in parameters:
        _, module = layer_and_module(p)
        found |= dict.fromkeys((module.partition(".")[0], module))
    return tuple(found)


def weights_of(parameters: Sequence[Parameter], pieces: Sequence[Piece]) -> dict[str, int]:
    """How many parameters each module has that is marked, by its path; what no other has is the model's."""
    paths = sorted({s.name for s in pieces if s.path}, key=len, reverse=True)
    found: dict[str, int] = {}
    for p in parameters:
        if p.kind != "scale":
            path = next((path for path in paths if p.name.startswith(path)), "")
            found[path] = found.get(path, 0) + 1
    return found


def once_a_block(parameters: Sequence[Parameter], series: Sequence[Series]) -> list[Parameter]:
    """The parameters of a model, those of identical blocks once, with their number."""
    counts = {
        f"{path[:-1]}{n}.": 0 if i % each.repeat else each.repeat
        for each in series
        for lists, numbers in each.numbers.items()
        for i, n in enumerate(numbers)
        for path in lists
    }
    found = []
    for p in parameters:
        count: Dim = next((n for start, n in counts.items() if p.name.startswith(start)), 1)
        if count:
            made = p.copy()
            made.count = count
            found.append(made)
    return found
