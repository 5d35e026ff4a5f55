"""Context parallelism: ranks that share every sequence, as accelerate runs it over FSDP2 (`cp_size`).

Each has an earlier and a later part of the tokens (`tape.packages.ring`), and all layers, or with tensor parallel its
part of them; shards of weights and sums of gradients are over all ranks, those with other samples included. Cutting
ids, labels and positions, a few small copies before the model runs, is left out.
"""

from typing import Any

import numpy as np

from ...architectures.base import Architecture
from ...architectures.llama import STAGED
from ...errors import UserError
from ...program.ranks import Ranks
from ...setup import Setup
from ...tape.packages.ring import SharedSequence

ALONE: dict[str, Any] = {
    "pp": 1, "parallel": "fsdp2", "attention": "sdpa", "kernels": "torch", "packing": "none",
    "padded": False, "offload": "none", "objective": "sft",
}  # fmt: skip


def ring_of(setup: Setup) -> SharedSequence | None:
    """The ranks that share a sequence with one; None where there are no others."""
    return SharedSequence(Ranks(setup.cp, setup.tp), setup.cp_rotate == "allgather") if setup.cp > 1 else None


def check_ring(setup: Setup, architecture: Architecture) -> None:
    """Raise `UserError` where ranks that share a sequence are not modelled with the rest of a setup."""
    if setup.cp == 1:
        return
    for name, usual in ALONE.items():
        if getattr(setup, name) != usual:
            use = f"--parallel {usual}" if name == "parallel" else "--cp 1"
            raise UserError(f"cp: shared sequences are not modelled with {name} {getattr(setup, name)}; use {use}")
    if architecture.model_type not in STAGED or architecture.classifier:
        raise UserError(f"cp: {architecture.name} on a part of a sequence is not modelled; use --cp 1")
    if any(architecture.window_of(layer) is not None for layer in range(architecture.layers)):
        raise UserError(f"cp: {architecture.name} attends within a window, which accelerate refuses; use --cp 1")
    if np.any(np.asarray(setup.seq) % (2 * setup.cp)):
        raise UserError(f"cp {setup.cp}: a sequence is cut into {2 * setup.cp} parts; use a multiple of it for --seq")
