"""One optimizer step in the making: what optimizers and methods record it with.

An optimizer is a function of an `Update` and the parameters of one of its groups, registered under its name; its file
is found by that name. A method that wants another update than the setup's optimizer on one group of all that trains
overrides `Method.update`.

A loop over parameters is recorded once per run of like layers, as the forward pass is: `runs` gives the parameters of
one layer after another, and what is recorded for a run counts as often as there are such layers. Write the body of such
a loop as a function of one run, so that its local tensors die with the run that they belong to.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from ...program.dims import Dim, Shape, contiguous_strides, product, same_shape
from ...program.op import Spec
from ...program.part import Part
from ...registry import Registry
from ...tape.core import Tape, recording
from ...tape.tensor import Parameter, Storage, Tensor

Parameters = Sequence[Parameter]
Record = Callable[["Update", Parameters, bool], None]  # of (update, parameters, whether they decay)
_REGISTRY: Registry[Record] = Registry("perfmodel.optimizers", Path(__file__).parents[1])


def optimizer(name: str) -> Callable[[Record], Record]:
    """Register the program of an optimizer under a name."""

    def register(record: Record) -> Record:
        _REGISTRY.add(name, record)
        return record

    return register


def optimizer_names() -> tuple[str, ...]:
    """The optimizers of a setup; "adamw" is the form that PyTorch picks on the device."""
    return ("adamw", *_REGISTRY.all())


def is_optimizer(name: str) -> bool:
    """Whether a setup may name it; only its own file is loaded."""
    return name == "adamw" or _REGISTRY.get(name) is not None


def picked_form(name: str, device: str) -> str:
    """The form that PyTorch picks: foreach on CUDA, the loop on the CPU."""
    if name == "adamw":
        return "adamw-foreach" if device == "cuda" else "adamw-loop"
    return name


class Update:
    """The optimizer step of one recording.

    Attributes:
        tape: records the ops.
        optimizer: the setup's optimizer, as `picked_form` returns it.
        everything: all parameters of the model, frozen ones included.
        head: weights of one head of an attention layer, hidden² / heads; None: not known.
        parameters: those that received a gradient.
        states: tensors that are kept between steps on the device, as they are named.
        host_states: those on the host (step counters).
        paged_states: those in memory that host and device share, which no allocator of PyTorch holds.
        hosted: bytes of what is offloaded: masters, states and gradients in the host's memory.
    """

    def __init__(self, tape: Tape, optimizer: str, everything: Parameters, head: int | None = None) -> None:
        self.tape = tape
        self.optimizer = optimizer
        self.everything = list(everything)
        self.head = head
        self.parameters = [p for p in everything if p.used]
        self.states: list[Spec] = []
        self.host_states: list[Spec] = []
        self.paged_states: list[Spec] = []
        self.hosted: Dim = 0

    @property
    def state_bytes(self) -> Dim:
        """Bytes that are kept between steps, but for paged ones."""
        return sum(s.nbytes for s in (*self.states, *self.host_states))

    @property
    def paged_bytes(self) -> Dim:
        """Bytes of paged states."""
        return sum(s.nbytes for s in self.paged_states)

    def group(self, parameters: Parameters, *, decay: bool = True, optimizer: str | None = None) -> None:
        """Record the setup's optimizer (or another) on one parameter group; nothing if it is empty.

        Args:
            decay: whether the group's weights decay.
        """
        if parameters:
            record = _REGISTRY.get(optimizer or self.optimizer)
            assert record is not None, f"a setup knows no optimizer {self.optimizer!r}"
            record(self, parameters, decay)

    def part(self, repeat: int = 1) -> Part:
        """Begin a part of the optimizer step that runs `repeat` times in a row."""
        part = self.tape.begin("optimizer", "optimizer")
        part.repeat = repeat
        return part

    def runs(self, parameters: Parameters) -> Iterator[list[Parameter]]:
        """The parameters of one layer after another, like layers once: a part for each, begun before it is given."""
        for count, run in runs(parameters):
            self.part(count)
            yield run

    def state(
        self, like: Parameter, shape: Shape | None = None, dtype: str | None = None, *, paged: bool = False
    ) -> Tensor:
        """A tensor that every copy of a parameter keeps between steps; of its shape and dtype unless said otherwise."""
        held = existing(like.shape if shape is None else shape, dtype or like.dtype)
        (self.paged_states if paged else self.states).append(Spec(held.dtype, held.shape, like.count))
        return held

    def shared_state(self, shape: Shape, dtype: str) -> Tensor:
        """A tensor that the optimizer keeps once, for all parameters."""
        self.states.append(Spec(dtype, shape))
        return existing(shape, dtype)

    def host_counter(self, like: Parameter) -> Tensor:
        """The fp32 step counter of a parameter, which `torch.optim` keeps on the host."""
        self.host_states.append(Spec("fp32", (), like.count))
        return existing((), "fp32")

    def renew(self, new: Tensor) -> Tensor:
        """A new tensor takes the place of a state of its size, which dies here; returns the new one."""
        self.tape.part.free(new.storage.nbytes)
        new.storage.tape = None
        return new


def replace_gradient(p: Parameter, new: Tensor) -> None:
    """A new gradient takes the place of the old one, in the part of a run: for every layer that the run stands for."""
    if p.grad is not None:
        p.grad.storage.copies = 1
    p.grad = new
    new.storage.copies = p.count


def runs(parameters: Parameters) -> Iterator[tuple[int, list[Parameter]]]:
    """Consecutive parameters of one layer, with the number of such layers."""
    for (_, count), run in groupby(parameters, key=lambda p: (id(p.part), p.count)):
        yield count, list(run)


def existing(shape: Shape, dtype: str) -> Tensor:
    """A contiguous tensor that was there before the step."""
    return Tensor(shape, dtype, contiguous_strides(shape), product(shape), Storage(0, None))


def gradient(p: Parameter) -> Tensor:
    """The gradient of a parameter that received one, as an op gets it: ask once for each operand."""
    grad = p.grad if p.grad is not None else existing(p.shape, p.dtype)
    return grad if p.placement is None else p.placement.redistributed(grad, p.shape)


def both_gradients(p: Parameter) -> tuple[Tensor, Tensor]:
    """The gradient for an op that takes it twice."""
    grad = gradient(p)
    return grad, gradient(p) if moves(p) else grad


def gradients_anew(parameters: Parameters) -> list[Tensor]:
    """Gradients that an op on lists gets brought to where their parameters lie; they live as long as the result."""
    return [gradient(p) for p in parameters if moves(p) for _ in range(p.count)]


def moves(p: Parameter) -> bool:
    """Whether each use of a parameter's gradient brings it anew to where the parameter lies."""
    return p.placement is not None and p.placement.moves


def recorded(parameters: Parameters, name: str, device: str = "cuda") -> Update:
    """A step of an optimizer on the trainable ones of some parameters, recorded for what it keeps of them."""
    tape = Tape(device)
    update = Update(tape, picked_form(name, device), parameters)
    with recording(tape), tape.no_grad():
        update.group(update.parameters)
    return update


def copy_in(p: Parameter, dtype: str) -> Parameter:
    """A parameter of another dtype that stands for a copy of one, with a gradient of its own to come."""
    copy = Parameter(p.name, p.shape, dtype, kind=p.kind, trainable=True)
    copy.count, copy.part, copy.used, copy.embeds = p.count, p.part, True, p.embeds
    return copy


def state_bytes(parameters: Parameters, name: str) -> Dim:
    """Bytes that an optimizer keeps for the trainable ones of some parameters."""
    return recorded(parameters, name).state_bytes


def moments(p: Parameter, name: str) -> int:
    """Tensors of the parameter's shape that an optimizer keeps of it."""
    return sum(same_shape(s.shape, p.shape) for s in recorded([p], name).states)
