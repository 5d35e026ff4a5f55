"""FSDP2 as programs wrap a model with it by themselves: each block, and then the model, with the same options."""

import re
from collections.abc import Iterable
from typing import Any

import torch

from perfmodel.setup import Setup
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES


def sharded_by_blocks(
    model: Any, blocks: Iterable[Any], setup: Setup, mesh: Any, ignored: set[torch.nn.Parameter]
) -> Any:
    """The model with a unit a block and one of all else, and one of each half of a LoRA, if they are units.

    What trains is kept in fp32 with mixed precision.

    Args:
        mesh: replicas by shards; None: all ranks are shards.
        ignored: parameters that stay whole.

    Source: kempnerforge/distributed/parallel.py (`apply_fsdp2`,
    https://github.com/KempnerInstitute/KempnerForge/tree/5666d0d16153).
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    amp, reduce = (TORCH_DTYPES[dtype] if dtype else None for dtype in (setup.amp, setup.reduce_dtype))
    for p in model.parameters():
        if p.requires_grad and amp is not None:
            p.data = p.data.float()
    options: dict[str, Any] = {
        "mesh": mesh, "reshard_after_forward": setup.reshard, "ignored_params": ignored,
        "mp_policy": MixedPrecisionPolicy(param_dtype=amp, reduce_dtype=reduce or amp, output_dtype=amp),
        **({"offload_policy": CPUOffloadPolicy(pin_memory=False)} if setup.offload == "params" else {}),
    }  # fmt: skip
    for block in blocks:
        for name, half in block.named_modules() if setup.fsdp_units == "adapters" else ():
            if re.search(r"\.lora_[AB]\.default$", name):
                fully_shard(half, **options)
        fully_shard(block, **options)
    return fully_shard(model, **options)
