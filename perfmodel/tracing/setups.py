"""What of a setup a trace can follow; needs no torch."""

import numpy as np

from ..errors import UserError
from ..setup import Setup

OBJECTIVES = ("sft", "dpo", "grpo")  # whose loss can be traced; of others than the model's own without what is logged


def takes_cut_loss(dtype: str, objective: str) -> bool:
    """Whether cut cross entropy goes with weights of a dtype and with an objective."""
    return dtype != "fp32" and objective == "sft"


def check_setup(setup: Setup) -> None:
    """Raise `UserError` where a setup asks for what a trace on the CPU cannot follow."""
    if setup.unpads:
        raise UserError(
            "--traced cannot follow padded batches with attention flash2, which takes padding out; use sdpa"
        )
    if setup.images and setup.attention == "flash2":
        raise UserError("--traced cannot follow attention flash2 in a tower of images; use sdpa")
    if setup.engine != "torch" and np.max(setup.gpus) == 1 and setup.offload == "none":
        raise UserError(f"--traced cannot follow --engine {setup.engine}: it traces the program without an engine")
    if setup.uses("liger"):
        raise UserError(f"--traced cannot follow --kernels {setup.kernels}; use kernels torch, cce or trl")
    if setup.uses("cce") and not takes_cut_loss(setup.dtype, setup.objective):
        raise UserError("--traced follows --kernels cce with weights of 16 bits and --objective sft alone")
    if setup.uses("trl") and setup.objective != "sft":
        raise UserError("--traced follows --kernels trl with --objective sft alone")
    if setup.experts != "grouped_mm":
        raise UserError(f"--traced cannot follow --experts {setup.experts}: which are hit is data; use grouped_mm")
    if setup.routing != "balanced":
        raise UserError(f"--traced cannot follow --routing {setup.routing}: it gives every expert as many tokens")
    for option in ("fp8", "int8", "qat"):
        if getattr(setup, option) != "none":
            raise UserError(f"--traced cannot follow --{option}: it traces the program as transformers makes it")
    if setup.objective not in OBJECTIVES:
        raise UserError(f"--traced cannot follow --objective {setup.objective}: use {', '.join(OBJECTIVES)}")
    if setup.within_documents:
        raise UserError(f"--traced cannot follow --packing {setup.packing}; use packing dense")
    if setup.compile != "none":
        raise UserError("--traced cannot follow --compile: it traces the eager program")
