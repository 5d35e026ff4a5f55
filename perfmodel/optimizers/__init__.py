"""What clipping and the optimizer launch: one file a family, found by the names that it registers."""

from .parts.clip import clip_grad_norm
from .parts.lists import by_dtype, trainable
from .parts.update import (
    Update,
    copy_in,
    is_optimizer,
    moments,
    optimizer_names,
    picked_form,
    recorded,
    state_bytes,
)

__all__ = [
    "Update",
    "by_dtype",
    "clip_grad_norm",
    "copy_in",
    "is_optimizer",
    "moments",
    "optimizer_names",
    "picked_form",
    "recorded",
    "state_bytes",
    "trainable",
]
