"""FSDP1 as accelerate wraps a model with it, by peft's policy where peft has put adapters in."""

import os
from functools import partial
from typing import Any

import torch


def flat_units(
    model: Any, block: type[Any], *, reshard: bool = True, mesh: Any = None, amp: torch.dtype | None = None,
    reduce: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """The model with a flat parameter a block (and an adapter), gathered again backward or kept (SHARD_GRAD_OP).

    Args:
        mesh: replicas by shards (HYBRID_SHARD).
        amp: of mixed precision: what trains is kept in fp32 then.
        reduce: what gradients are reduced in; None: `amp`.

    Sources: accelerate 1.15, accelerator.py (`prepare_model`); peft 0.21, utils/other.py (`fsdp_auto_wrap_policy`).
    """
    from peft import PeftModel
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    policy: Any = partial(transformer_auto_wrap_policy, transformer_layer_cls={block})
    if isinstance(model, PeftModel):
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = block.__name__
        policy = fsdp_auto_wrap_policy(model)
    names = ("FULL_SHARD", "SHARD_GRAD_OP") if mesh is None else ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
    wrapped = FullyShardedDataParallel(
        model, auto_wrap_policy=policy, device_id=torch.device("cpu"), device_mesh=mesh,
        use_orig_params=not isinstance(model, PeftModel),  # accelerate's default is False: a unit trains or does not
        sharding_strategy=ShardingStrategy[names[0 if reshard else 1]],
        mixed_precision=MixedPrecision(param_dtype=amp, reduce_dtype=reduce or amp, buffer_dtype=amp),
    )  # fmt: skip
    for unit in FullyShardedDataParallel.fsdp_modules(wrapped) if amp else ():
        handle = unit._handle
        if handle is not None and handle.flat_param.requires_grad:
            handle.flat_param.data = handle.flat_param.data.float()
            handle._orig_param_dtype = torch.float32
    return wrapped
