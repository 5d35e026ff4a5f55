"""What clipping and the optimizer launch: one file a family; importing this package registers them."""

from . import adafactor, adamw, bitsandbytes, sgd
from .clip import clip_grad_norm
from .lists import by_dtype, trainable
from .update import Update, copy_in, moments, names, recorded, resolve, state_bytes

__all__ = [
    "Update",
    "adafactor",
    "adamw",
    "bitsandbytes",
    "by_dtype",
    "clip_grad_norm",
    "copy_in",
    "moments",
    "names",
    "recorded",
    "resolve",
    "sgd",
    "state_bytes",
    "trainable",
]
