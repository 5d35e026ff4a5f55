"""A rank that shares sequences by DeepSpeed's Ulysses, as the Trainer runs it; needs deepspeed.

What it sends goes through an operator of DeepSpeed's own, of which a recorder sees nothing inside; here the same
exchange is an autograd Function, as it was before DeepSpeed 0.19. The group answers that it is NCCL's, as on GPUs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from perfmodel.setup import Setup


def _sent(x: torch.Tensor, group: Any) -> torch.Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class Exchange(torch.autograd.Function):
    """`_dim_zero_all_to_all`."""

    @staticmethod
    def forward(ctx: Any, group: Any, x: torch.Tensor) -> torch.Tensor:
        """Each rank's part of the first dim to that rank."""
        ctx.group = group
        return _sent(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The same of the gradient."""
        return None, _sent(grads[0], ctx.group)


def groups_of(model: Any, setup: Setup) -> Any:
    """What accelerate hands to DeepSpeed (`mpu`), with the attention of transformers replaced; None if none is shared.

    Raises:
        ImportError: deepspeed is not installed.
    """
    if not setup.shares_heads:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    register: Any = UlyssesSPAttentionHF.register_with_transformers
    return register(model, setup.attention, setup.cp, setup.batch, seq_length_is_variable=True)


@contextmanager
def exchanging(setup: Setup) -> Iterator[None]:
    """The program of a GPU's rank, seen from within."""
    if not setup.shares_heads:
        yield
        return
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    apply: Any = Exchange.apply
    with (
        patch.object(ulysses_sp, "_dim_zero_all_to_all", apply),
        patch("torch.distributed.nn.functional.dist.get_backend", lambda group=None: dist.Backend.NCCL),
    ):
        yield


def trainer_loss(engine: Any, setup: Setup) -> Callable[[], torch.Tensor]:
    """The Trainer's loss of a micro-batch: of a model as it is, or of ranks that share sequences."""
    ids = torch.zeros(setup.shape, dtype=torch.long)
    mask = torch.ones_like(ids)
    if not setup.shares_heads:
        return lambda: engine(input_ids=ids, labels=ids, attention_mask=mask).loss
    from transformers.integrations.deepspeed import deepspeed_sp_compute_loss

    shares = SimpleNamespace(sp_backend="deepspeed", sp_size=setup.cp)
    given = {"input_ids": ids, "shift_labels": ids, "position_ids": ids, "attention_mask": mask}
    compute: Any = deepspeed_sp_compute_loss
    return lambda: compute(None, engine, dict(given), False, shares)
