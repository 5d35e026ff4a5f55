"""Sequence parallel: tensor-parallel ranks that share the tokens between their layers, too (`Setup.sequence_parallel`).

The program is torch's `parallelize_module` on transformers' modules with the plan of NeMo Automodel, all parameters
DTensors (`tape.packages.sequence`). Adapters are Automodel's, for PEFT's take no DTensors. Gradients of norms are of a
rank's own tokens, and that of the embedding is of all words: AdamW brings them to where its states lie at each use,
FSDP2 once, before it reduces them (with the units of accelerate, as for a model without PEFT).
"""

from typing import Any

import numpy as np

from ...architectures.llama import SHARING_TOKENS
from ...errors import UserError
from ...methods.parts.base import Method
from ...setup import Setup

# What of a setup is modelled beside it, and the values that are
BESIDE: dict[str, tuple[Any, ...]] = {
    "optimizer": ("adamw", "adamw-foreach", "adamw-loop", "adamw-fused"),
    "attention": ("sdpa", "eager"), "kernels": ("torch",), "amp": (None,), "packing": ("none", "dense"),
    "cp": (1,),
}  # fmt: skip
PLAIN = {"dropout": 0.0, "modules_to_save": ()}  # options of LoRA


def check_tokens(setup: Setup, method: Method) -> None:
    """Raise `UserError` where ranks that share tokens between layers are not modelled with the rest of a setup."""
    for name, known in BESIDE.items():
        value = getattr(setup, name)
        if not all(one in known for one in np.atleast_1d(np.asarray(value, dtype=object))):
            use = "no --amp" if name == "amp" else f"--{name} {known[0]}"
            raise UserError(f"sequence_parallel: not modelled with {name} {value}; use {use}")
    model = method.architecture
    if model is not None and model.model_type not in SHARING_TOKENS:
        raise UserError(f"sequence_parallel: not modelled of {model.name}; leave it out")
    if setup.parallel != "fsdp2" and (setup.engine != "torch" or np.any(np.asarray(setup.replicas) > 1)):
        raise UserError(f"sequence_parallel: {setup.parallel} takes no cut layers; use --parallel fsdp2 for replicas")
    for name, usual in PLAIN.items():
        if getattr(method, name, usual) != usual:
            raise UserError(f"sequence_parallel: not modelled with {name} of method {method.name}; leave it out")
    if np.any(np.asarray(setup.seq) % setup.tp):
        raise UserError(
            f"sequence_parallel: tp {setup.tp} cuts the tokens of a sequence; use a multiple of it for --seq"
        )
