"""What of a setup does not fit a model or a method, said before anything is recorded."""

import numpy as np

from ..architectures.base import Architecture
from ..errors import UserError
from ..methods.parts.base import Method
from ..setup import Setup
from . import converted
from .deepspeed import zero3_alone

# What losses that read the head's weight by themselves are modelled with: under ZeRO-3 and FSDP they gather it, too
OF_OWN_LOSS: dict[str, tuple[object, ...]] = {
    "kernels": (), "dtype": (), "objective": (), "gpus": (), "parallel": ("ddp", "zero1", "zero2", "fsdp2", "fsdp1"),
    "offload": ("none", "optimizer", "params"), "tp": (1,), "pp": (1,), "cp": (1,), "engine": ("torch",),
    "compile": ("none",), "qat": ("none",),
}  # fmt: skip
OF_EXPERTS = {"experts": "grouped_mm", "routing": "balanced"}  # what mixtures alone have, and the default


def check_step(architecture: Architecture, method: Method, setup: Setup) -> None:
    """Raise `UserError` where the setup's kernels or attention do not fit the model; a recorded one says so itself."""
    if architecture.recorded:
        return
    if architecture.of_megatron:
        from .parallel.megatron import check_megatron  # with its form, which few ask for

        check_megatron(setup, method)
    elif setup.overlap:
        raise UserError("overlap is of Megatron-Core's program: use --model megatron:NAME, or leave it out")
    if setup.images:
        raise UserError(f"images: the tape has {architecture.name} with text alone: add --traced")
    if setup.engine != "torch":
        zero3_alone.check_zero3(setup, method)
    converted.check_converted(architecture, method, setup)
    if setup.attention not in architecture.traits.attention:
        has = " or ".join(architecture.traits.attention)
        raise UserError(f"attention {setup.attention}: the program of {architecture.name} has {has} only; use {has}")
    if setup.checkpoint == "block-reentrant" and setup.attention not in architecture.traits.reentrant:
        raise UserError(
            f"{architecture.name}: reentrant checkpoints of {architecture.model_type} with attention {setup.attention} "
            "are not modelled; use --checkpoint block"
        )
    if setup.uses("liger") and "liger" not in architecture.traits.fused:
        raise UserError(f"kernels liger: Liger has none for {architecture.name}; use kernels torch")
    if setup.within_documents or setup.unpads:
        _check_documents(architecture, method, setup)
    if setup.compile != "none" and architecture.stacked_names():
        raise UserError(f"compile {setup.compile}: compiled mixtures of experts ({architecture.name}) are not modelled")
    for name, usual in OF_EXPERTS.items():
        if getattr(setup, name) != usual and not architecture.stacked_names():
            raise UserError(f"{name} {getattr(setup, name)}: {architecture.name} has no experts; leave it out")
    if setup.loops_experts and setup.cuda_graphs and architecture.stacked_names():
        raise UserError("cuda_graphs: no graph holds experts eager, whose loop reads on the host; use grouped_mm")
    if setup.parallel == "fsdp2" and setup.amp is not None and getattr(method, "fills_cache", False):
        raise UserError(
            f"method {method.name}: FSDP2 casts what it gathers to {setup.amp}, but PEFT's cache stays {setup.dtype}, "
            "and PyTorch ends in an error; leave out --amp, or use prompt_tuning"
        )
    if setup.uses("liger") and "lm_head" in getattr(method, "targets", ()):
        raise UserError(f"method {method.name}: Liger's loss reads the head's own weight; leave lm_head out of targets")
    if setup.uses("cce") or setup.uses("trl"):
        check_own_loss(architecture, method, setup)


def check_own_loss(architecture: Architecture, method: Method, setup: Setup) -> None:
    """Raise `UserError` where cut cross entropy or TRL's fused head is not modelled, or would do nothing.

    Of a setup `OF_OWN_LOSS` matters.
    """
    cuts = setup.uses("cce")
    what = "kernels cce (cut cross entropy)" if cuts else "kernels trl (TRL's fused head)"
    shared = np.max(setup.gpus) > 1 or setup.offload != "none"
    capped = cuts and architecture.logit_cap  # TRL's kernels cap logits themselves
    if not architecture.traits.cut_loss or architecture.classifier is not None or capped:
        raise UserError(f"{what}: not modelled for {architecture.name}; leave it out")
    if "lm_head" in getattr(method, "targets", ()):
        raise UserError(f"method {method.name}: {what} reads the head's own weight; leave lm_head out")
    if cuts and setup.dtype == "fp32" and not (shared and setup.parallel.startswith("fsdp") and setup.amp):
        raise UserError(f"{what}: its kernels take weights of 16 bits; use --dtype bf16")
    if setup.objective != "sft":
        raise UserError(f"{what}: objective {setup.objective} takes logits; leave it out")
    for name, known in OF_OWN_LOSS.items():
        value = getattr(setup, name)
        if known and value not in known and (name != "parallel" or shared):
            raise UserError(f"{what}: not modelled with {name} {value}; leave it out")


def _check_documents(architecture: Architecture, method: Method, setup: Setup) -> None:
    """Raise `UserError` where attention within documents, packed or padded, is not modelled."""
    what = "padded batches with attention flash2 (unpadding)" if setup.unpads else f"packing {setup.packing}"
    instead = "use sdpa" if setup.unpads else "use packing dense"
    if not architecture.traits.packs:
        raise UserError(f"{what}: not modelled for {architecture.name}; {instead}")
    if type(method).inputs is not Method.inputs:
        raise UserError(f"{what}: the positions of virtual tokens ({method.name}) are not modelled; {instead}")
    if setup.within_documents and architecture.classifier is not None:
        raise UserError(
            f"packing {setup.packing}: a classifier ({architecture.name}) has one label a row; leave it out"
        )
