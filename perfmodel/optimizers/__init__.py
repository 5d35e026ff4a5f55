"""What clipping and the optimizer launch: one file a family; importing this package registers them."""

from . import adamw, sgd
from .clip import clip_grad_norm
from .lists import by_dtype, trainable
from .update import Update, moments, names, recorded, resolve, state_bytes

__all__ = [
    "Update",
    "adamw",
    "by_dtype",
    "clip_grad_norm",
    "moments",
    "names",
    "recorded",
    "resolve",
    "sgd",
    "state_bytes",
    "trainable",
]
