"""The optimizer inside backward: a weight is updated as soon as its gradient is complete, which is freed then.

PyTorch calls a hook after it has accumulated a gradient, which steps an optimizer that has this one weight.
Source: `torch.Tensor.register_post_accumulate_grad_hook`; llamafactory/train/trainer_utils.py (`optimizer_hook`).
"""

from collections.abc import Callable, Iterator

from ..errors import UserError
from ..methods.galore import GaLore
from ..methods.parts.base import Method
from ..optimizers.parts.update import Parameters, Update
from ..program.op import Spec
from ..program.part import Part
from ..tape.core import Tape, tape
from ..tape.tensor import Parameter, Tensor
from .step import Step

COMPILED = "ao-"  # torchao's optimizers, which are graphs of their own


class Inside(Update):
    """An optimizer step that goes on inside the part that runs now, weight by weight."""

    def part(self, repeat: int = 1) -> Part:
        """The part of backward that made the gradient."""
        return self.tape.part

    def runs(self, parameters: Parameters) -> Iterator[list[Parameter]]:
        """One weight after another."""
        return ([p] for p in parameters)

    def stand_for(self, states: int, on_host: int, copies: int) -> None:
        """What was kept since there were so many states is kept by so many layers."""
        for kept, first in ((self.states, states), (self.host_states, on_host)):
            kept[first:] = [Spec(s.dtype, s.shape, copies) for s in kept[first:]]


def begin(step: Step, on: Tape) -> Update:
    """Let every gradient that a tape records be followed by the update of its weight, which is returned.

    Raises:
        UserError: the update does not go weight by weight.
    """
    if step.zero or type(step.method).update not in (Method.update, GaLore.update):
        what = "DeepSpeed" if step.zero else step.method.name
        raise UserError(f"in_backward: {what} updates several weights together; leave in_backward out")
    if step.architecture.recorded:
        raise UserError("in_backward: --traced takes the step of all weights after backward; leave one of them out")
    if step.optimizer.startswith((COMPILED, "paged-")):
        raise UserError(f"in_backward: optimizer {step.optimizer} inside backward is not modelled; use adamw")
    update = Inside(on, step.optimizer, (), step.head)
    on.on_gradient = _hook(step.method, update)
    return update


def _hook(method: Method, update: Inside) -> Callable[[Parameter, Tensor], None]:
    def run(p: Parameter, grad: Tensor) -> None:
        current, known = tape(), (len(update.states), len(update.host_states))
        current.part.host.gradients += 1
        p.grad, copies, p.count = grad, p.count, 1
        update.parameters = [p]
        with current.no_grad(), current.belonging_to("optimizer"):
            method.update(update)
        update.stand_for(*known, copies)
        p.grad, p.count = None, copies

    return run
