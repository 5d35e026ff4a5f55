"""What a program of several GPUs is to the recording of a step."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ... import setup as options
from ...errors import UserError
from ...methods.parts.base import Method
from ...optimizers import Update
from ...program.dims import Dim
from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.core import Wrapping
from ...tape.tensor import Cuts, Parameter, Tensor
from .offload import check_offload
from .tokens import check_tokens

CUT = ("full", "lora")  # methods whose program on tensor-parallel layers is modelled

# Objectives that several have; of others the trainers prepare models in ways that are not modelled
OBJECTIVES = tuple(name for name in options.OBJECTIVES if name != "ebft")

# Forms and methods whose compiled program is that of PyTorch: others were not compared, or Dynamo breaks their graphs
COMPILED, COMPILED_METHODS = ("ddp", "fsdp2"), ("full", "lora", "top_k", "bitfit", "norm")

# What of a setup is modelled on one GPU alone, and the value that several have
ALONE = {
    "engine": "torch", "cuda_graphs": False, "in_backward": False, "fp8": "none",
    "int8": "none", "qat": "none",
}  # fmt: skip


# What goes with halves of LoRAs as units of their own, of a setup and of a method
BESIDE_HALVES: dict[str, tuple[Any, ...]] = {
    "compile": ("none",), "tp": (1,), "cp": (1,), "objective": ("sft",), "checkpoint": ("none", "block"),
}  # fmt: skip
OF_HALVES: dict[str, tuple[Any, ...]] = {
    "name": ("lora", "rslora", "pissa"), "implementation": ("peft", "axolotl"), "modules_to_save": ((),),
}  # fmt: skip


class ParallelForm(Protocol):
    """Hooks of one micro-batch, and what is left for the optimizer.

    Attributes:
        ranks: the GPUs that gradients are reduced over, or scattered.
        reduces: whether this micro-batch's gradients are exchanged: those of the last one are (`no_sync`).
        shares_norm: whether ranks hold different gradients, so that their norm takes an all-reduce.
        everyone, inside, reference: as of `tape.core.Wrapping`.
        offloads: whether the host clips and updates, on what lives in its memory.
        notes: what an answer has to say of it.
    """

    ranks: Ranks
    reduces: bool
    shares_norm: bool
    offloads: bool
    inside: bool

    @property
    def notes(self) -> Sequence[str]:
        """As above."""
        return ()

    @property
    def everyone(self) -> Ranks | None:
        """As of `tape.core.Wrapping`."""

    @property
    def reference(self) -> Wrapping | None:
        """As of `tape.core.Wrapping`."""

    def cuts(self) -> Cuts | None:
        """What cuts a compiled model into graphs, new for each pass; None: hooks do."""

    def begin(self) -> None:
        """Before a forward pass."""

    def block(self, path: str, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A block of the model between its hooks."""

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The embedding of the words, a norm or the head between its hooks."""

    def weight(self, p: Parameter) -> Tensor:
        """What there is of a parameter that is about to be used beside its module: of an adapter, or of a head."""

    def end(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Behind a forward pass; returns what it gives, the loss or logits first, hooked."""

    def end_of_backward(self) -> None:
        """Behind the last gradient."""

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update | None:
        """Clipping and the update of a form that brings its own; None where the method's runs."""

    def updated(self, parameters: list[Parameter]) -> list[Parameter]:
        """What a rank holds of the model's parameters, with the gradients that its optimizer works on."""

    def held_bytes(self, parameters: list[Parameter]) -> Dim:
        """Bytes that are kept from step to step beside parameters and optimizer state."""

    def gradient_bytes(self, parameters: Sequence[Parameter]) -> Dim:
        """Bytes of the gradients that a rank's optimizer works on."""


class OfBlocks:
    """Of a form whose units are blocks, and all else together."""

    inside = True
    offloads = False
    ranks: Ranks
    across: Ranks | None = None

    @property
    def notes(self) -> Sequence[str]:
        """Nothing."""
        return ()

    @property
    def everyone(self) -> Ranks | None:
        """Those of all replicas."""
        return self.ranks if self.across is None else Ranks(self.ranks.size * self.across.size)

    @property
    def reference(self) -> Wrapping | None:
        """None: a frozen model is whole on every rank."""
        return None

    def cuts(self) -> Cuts | None:
        """None: hooks around units do."""
        return None

    def module(self, path: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Its parameters are there."""
        return run(x)

    def own_update(self, parameters: list[Parameter], optimizer: str, *, clips: bool) -> Update | None:
        """The method's on what a rank holds."""
        return None

    def gradient_bytes(self, parameters: Sequence[Parameter]) -> Dim:
        """One for each parameter that a rank holds, in its dtype."""
        return sum(p.nbytes * p.count for p in parameters if p.used)


class WholeUnits(OfBlocks):
    """Of a form whose units hold adapters like all else."""

    def weight(self, p: Parameter) -> Tensor:
        """It came with its block."""
        return p


def check_form(setup: Setup, method: Method) -> None:
    """Raise `UserError` where several GPUs are not modelled with the rest of a setup."""
    check_offload(setup)
    for name, usual in ALONE.items():
        if getattr(setup, name) != usual and not (name == "engine" and setup.parallel == "zero3"):
            what = f"{name} {getattr(setup, name)}"
            if setup.offload != "none":
                raise UserError(f"offload: not modelled with {what}; use --offload none")
            raise UserError(f"gpus: several are not modelled with {what}; use --gpus 1")
    if setup.offload != "none" and setup.objective != "sft":
        raise UserError(f"offload: not modelled with objective {setup.objective}; use --offload none")
    if setup.objective not in OBJECTIVES:
        raise UserError(f"gpus: several are not modelled with objective {setup.objective}; use --gpus 1")
    if setup.tp > 1 and setup.objective != "sft":
        raise UserError(f"tp: layers that GPUs share are not modelled with objective {setup.objective}; use --tp 1")
    if setup.objective == "ppo" and (setup.parallel != "ddp" or setup.ddp == "find-unused"):
        use = "--parallel ddp" if setup.parallel != "ddp" else "--ddp plain"
        raise UserError(f"gpus: of objective ppo DDP alone is modelled, plain or with a static graph; use {use}")
    if not setup.reshard and setup.parallel not in ("fsdp1", "fsdp2"):
        raise UserError(
            f"reshard: {setup.parallel} has no weights to leave gathered; use --parallel fsdp2, or --reshard"
        )
    if setup.fsdp_units == "adapters":
        check_halves(setup, method)
    if setup.fsdp_units != "accelerate" and setup.parallel != "fsdp2":
        raise UserError(
            f"fsdp_units: {setup.parallel} gathers in its own way; use --parallel fsdp2, or --fsdp-units accelerate"
        )
    if setup.reduce_dtype is not None and setup.parallel not in ("fsdp1", "fsdp2"):
        raise UserError(
            f"reduce_dtype: {setup.parallel} reduces gradients as they are; use --parallel fsdp2, or leave it out"
        )
    if setup.sync_each_batch and setup.parallel.startswith("zero"):
        raise UserError(f"sync_each_batch: DeepSpeed's {setup.parallel} exchanges as its stage does; leave it out")
    if setup.sync_each_batch and setup.offload != "none":
        raise UserError("sync_each_batch: sums in the host's memory are not modelled; use --offload none")
    if setup.reduce_dtype is not None and setup.sequence_parallel and setup.grad_accum > 1:
        raise UserError("reduce_dtype: sums of DTensors over micro-batches are not modelled; use --grad-accum 1")
    if setup.shard_group is not None:
        _check_groups(setup, setup.shard_group)
    if setup.compile != "none":
        _check_compiled(setup, method)
    if setup.tp > 1 and (method.name not in CUT or _fused(method)):
        raise UserError(
            f"tp: {_fused(method)}{method.name} on layers that are cut is not modelled; {' and '.join(CUT)}"
            f" {'by peft ' if _fused(method) else ''}are"
        )
    if setup.tp > 1 and getattr(method, "modules_to_save", None):
        raise UserError("tp: copies of modules that are cut are not modelled; leave out modules_to_save")
    if setup.sequence_parallel:
        check_tokens(setup, method)
    if setup.parallel == "fsdp1" and method.periodic():
        raise UserError(f"method {method.name} changes weights, which fsdp1 keeps in flat pieces: use --parallel ddp")
    if setup.parallel != "ddp" and type(method).update is not Method.update:
        raise UserError(f"method {method.name}: its update is not modelled with {setup.parallel}; use --parallel ddp")


def check_halves(setup: Setup, method: Method) -> None:
    """Raise `UserError` where halves of LoRAs as units of their own are not modelled with the rest of a setup."""
    for owner, table in ((setup, BESIDE_HALVES), (method, OF_HALVES)):
        for name, known in table.items():
            if (value := getattr(owner, name, known[0])) not in known:
                what = f"method {value}" if name == "name" else f"{name} {value}"
                raise UserError(f"fsdp_units adapters: not modelled with {what}; use --fsdp-units blocks")
    plain = getattr(method, "implementation", "peft") == "peft"
    if plain and setup.amp and getattr(method, "dropout", 0.0):
        raise UserError(
            "fsdp_units adapters: dropout in another dtype than its LoRA is not modelled; leave out dropout"
        )


def _fused(method: Method) -> str:
    """Whose fused kernels a method's adapters run in; empty if it is peft's own program."""
    implementation = getattr(method, "implementation", "peft")
    return "" if implementation == "peft" else f"{implementation}'s "


def _check_compiled(setup: Setup, method: Method) -> None:
    """Raise `UserError` where the compiled program of several GPUs is not modelled with the rest of a setup."""
    if setup.offload != "none":
        raise UserError(f"offload: not modelled with compile {setup.compile}; use --offload none")
    if setup.parallel not in COMPILED:
        where = "graphs break at its hooks" if setup.parallel in ("fsdp1", "zero3") else "DeepSpeed compiles by itself"
        raise UserError(
            f"compile: not modelled with parallel {setup.parallel}, {where}; use --parallel {' or '.join(COMPILED)}"
        )
    for name in ("cp", "pp"):
        if getattr(setup, name) > 1:
            raise UserError(f"compile: not modelled with {name} {getattr(setup, name)}; use --{name} 1")
    if setup.tp > 1:
        _check_compiled_layers(setup)
    if method.name not in COMPILED_METHODS or _fused(method):
        raise UserError(
            f"compile: what Dynamo makes of {_fused(method)}{method.name} on several GPUs is not modelled, but of "
            f"{', '.join(COMPILED_METHODS)}; use --compile none"
        )
    if setup.compile == "reduce-overhead":
        raise UserError("compile reduce-overhead: CUDA graphs of several GPUs are not modelled; use --compile default")


def _check_compiled_layers(setup: Setup) -> None:
    """Raise `UserError` where PyTorch 2.13 compiles layers that GPUs share and ends in an error, or was not asked."""
    shared = "layers that GPUs share"
    if setup.checkpoint != "none":
        raise UserError(f"compile: PyTorch 2.13 cannot compile checkpointed {shared}; use --checkpoint none")
    if not np.any(np.greater(setup.replicas, 1)):
        return
    if setup.sequence_parallel:
        raise UserError(f"compile: PyTorch 2.13 cannot compile cut words beside FSDP2's hooks; use --gpus {setup.tp}")
    if setup.parallel != "fsdp2":
        raise UserError(f"compile: {setup.parallel} takes no {shared}; use --parallel fsdp2")


def _check_groups(setup: Setup, group: int) -> None:
    """Raise `UserError` where shards over groups of GPUs are not modelled with the rest of a setup."""
    if setup.parallel not in ("fsdp1", "fsdp2"):
        raise UserError(f"shard_group: {setup.parallel} has no shards in groups; use --parallel fsdp2, or leave it out")
    if group % setup.cp:
        raise UserError(f"shard_group {group}: cp {setup.cp} GPUs share a sequence; use a multiple of them")
