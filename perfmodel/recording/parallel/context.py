"""Context parallelism: ranks that share every sequence, as accelerate runs it.

Over FSDP2 (`cp_size`) each has an earlier and a later part of the tokens (`tape.packages.ring`); over DeepSpeed's ZeRO
(`sp_size`, Ulysses) it has one part of them, and within attention some of the heads (`tape.packages.ulysses`). All have
all layers, or with tensor parallel their part of them; shards of weights and sums of gradients are over all ranks,
those with other samples included. Cutting ids, labels and positions, a few small copies before the model runs, is left
out.
"""

from typing import Any

import numpy as np

from ...architectures.base import Architecture
from ...architectures.llama import STAGED
from ...errors import UserError
from ...program.ranks import Ranks
from ...setup import ULYSSES, Setup
from ...tape.packages.ring import SharedSequence
from ...tape.packages.ulysses import SharedHeads

# What of a setup is modelled beside it, and the values that are
BESIDE: dict[str, tuple[Any, ...]] = {
    "kernels": ("torch",), "packing": ("none",), "padded": (False,), "offload": ("none",),
    "objective": ("sft",),
}  # fmt: skip
OVER_FSDP: dict[str, tuple[Any, ...]] = {"parallel": ("fsdp2",), "attention": ("sdpa",)}
OVER_ZERO: dict[str, tuple[Any, ...]] = {
    "parallel": ("zero3", "zero2", "zero1"), "attention": ("sdpa", "flash2"), "tp": (1,),
    "pp": (1,),
}  # fmt: skip


def context_of(setup: Setup) -> SharedSequence | SharedHeads | None:
    """The ranks that share a sequence with one; None where there are no others."""
    if setup.cp == 1:
        return None
    ranks = Ranks(setup.cp, setup.tp)
    return SharedHeads(ranks) if setup.shares_heads else SharedSequence(ranks, setup.cp_rotate == "allgather")


def check_shared_sequences(setup: Setup, architecture: Architecture) -> None:
    """Raise `UserError` where ranks that share a sequence are not modelled with the rest of a setup."""
    if setup.cp == 1:
        return
    form = f"cp_rotate {setup.cp_rotate}" if setup.shares_heads else "shared sequences"
    for name, known in (BESIDE | (OVER_ZERO if setup.shares_heads else OVER_FSDP)).items():
        if getattr(setup, name) not in known:
            use = f"--{name} {known[0]}" if name in ("parallel", "attention", "tp", "pp") else "--cp 1"
            if name == "parallel" and str(setup.parallel).startswith("zero"):
                use += f", or --cp-rotate {ULYSSES}"
            raise UserError(f"cp: {form} not modelled with {name} {getattr(setup, name)}; use {use}")
    if architecture.model_type not in STAGED or architecture.classifier:
        raise UserError(f"cp: {architecture.name} on a part of a sequence is not modelled; use --cp 1")
    if any(architecture.window_of(layer) is not None for layer in range(architecture.layers)):
        raise UserError(f"cp: {architecture.name} attends within a window, which is not modelled there; use --cp 1")
    if np.any(np.asarray(setup.seq) % setup.seq_multiple):
        parts = setup.seq_multiple
        raise UserError(f"cp {setup.cp}: a sequence is cut into {parts} parts; use a multiple of it for --seq")
    if setup.shares_heads and (architecture.heads % setup.cp or architecture.kv_heads % setup.cp):
        heads = f"{architecture.heads} heads and {architecture.kv_heads} of keys"
        raise UserError(f"cp {setup.cp}: {architecture.name} has {heads}: use a number of ranks that divides both")
