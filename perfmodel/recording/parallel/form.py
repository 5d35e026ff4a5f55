"""What a program of several GPUs is to the recording of a step."""

from collections.abc import Callable
from typing import Any, Protocol

from ...errors import UserError
from ...methods.parts.base import Method
from ...optimizers import Update
from ...program.dims import Dim
from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.tensor import Parameter, Tensor
from .offload import check_offload

CUT = ("full", "lora")  # methods whose program on tensor-parallel layers is modelled

# What of a setup is modelled on one GPU alone, and the value that several have
ALONE = {
    "compile": "none", "engine": "torch", "cuda_graphs": False, "in_backward": False, "objective": "sft", "fp8": "none",
    "int8": "none", "qat": "none",
}  # fmt: skip


class ParallelForm(Protocol):
    """Hooks of one micro-batch, and what is left for the optimizer.

    Attributes:
        ranks: the GPUs that gradients are reduced over.
        reduces: whether this micro-batch's gradients are exchanged: those of the last one are (`no_sync`).
        shares_norm: whether ranks hold different gradients, so that their norm takes an all-reduce.
        offloads: whether the host clips and updates, on what lives in its memory.
    """

    ranks: Ranks
    reduces: bool
    shares_norm: bool
    offloads: bool

    def begin(self) -> None:
        """Before the forward pass."""

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block of the model between its hooks."""

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The embedding of the words, a norm or the head between its hooks."""

    def weight(self, p: Parameter) -> None:
        """A parameter of an adapter is about to be used."""

    def end(self, loss: Tensor) -> Tensor:
        """Behind the forward pass; returns the loss, hooked."""

    def end_of_backward(self) -> None:
        """Behind the last gradient."""

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update | None:
        """Clipping and the update of a form that brings its own; None where the method's runs."""

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """What a rank holds of the model's parameters, with the gradients that its optimizer works on."""

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """Bytes that are kept from step to step beside parameters and optimizer state."""


class OfBlocks:
    """Of a form whose units are blocks, and all else together."""

    offloads = False

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Its parameters are there."""
        return run(x)

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update | None:
        """The method's on what a rank holds."""
        return None


class WholeUnits(OfBlocks):
    """Of a form whose units hold adapters like all else."""

    def weight(self, p: Parameter) -> None:
        """It came with its block."""


def check_form(setup: Setup, method: Method) -> None:
    """Raise `UserError` where several GPUs are not modelled with the rest of a setup."""
    check_offload(setup)
    for name, usual in ALONE.items():
        if getattr(setup, name) != usual and not (name == "engine" and setup.parallel == "zero3"):
            what = f"{name} {getattr(setup, name)}"
            if setup.offload != "none":
                raise UserError(f"offload: not modelled with {what}; use --offload none")
            raise UserError(f"gpus: several are not modelled with {what}; use --gpus 1")
    if setup.tp > 1 and (method.name not in CUT or getattr(method, "implementation", "peft") != "peft"):
        raise UserError(f"tp: {method.name} on layers that are cut is not modelled; {' and '.join(CUT)} are")
    if setup.parallel != "ddp" and type(method).update is not Method.update:
        raise UserError(f"method {method.name} updates whole weights by itself: with several GPUs use --parallel ddp")
