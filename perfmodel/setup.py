"""The training setup: everything about a step that is neither model, method nor device."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from . import optimizers
from .errors import UserError, nearest
from .program.dims import Dim
from .program.routing import exponent_of

DTYPES = ("bf16", "fp16", "fp32")
ATTENTION = ("sdpa", "eager", "flash2")
OPTIMIZERS = optimizers.optimizer_names()
CHECKPOINT = ("none", "block", "block-reentrant")
KERNELS = ("torch", "liger")
COMPILE = ("none", "default", "reduce-overhead")
ENGINES = ("torch", "deepspeed-zero3")
LARGEST = 2**24  # tokens of a sequence, samples of a batch: beyond this it is a typing error


@dataclass(frozen=True)
class Setup:
    """One optimizer step of a training loop.

    Attributes:
        batch: samples of a micro-batch; an int or an integer array (a grid).
        seq: tokens per sample; the batch is dense. An int or an integer array.
        dtype: dtype of the base weights: bf16, fp16 or fp32.
        amp: 16-bit dtype of `torch.autocast`, or None; under DeepSpeed, of the model itself.
        optimizer: a name of `OPTIMIZERS`; adamw is PyTorch's default form on the device, or DeepSpeed's FusedAdam under
            that engine.
        grad_accum: micro-batches per optimizer step.
        checkpoint: none, block (non-reentrant, per block) or block-reentrant.
        attention: sdpa, eager or flash2 (the flash-attn package).
        clip_grad: whether the gradient norm is clipped.
        cuda_graphs: whether the whole step is captured in a CUDA graph, so that one launch dispatches it.
        kernels: torch, or liger: Liger's fused RMSNorm, rotary positions, SwiGLU and linear cross entropy.
        compile: what `torch.compile` does to the model: none, default (fused kernels), or reduce-overhead (the same,
            and forward and backward are each a CUDA graph).
        padded: whether some samples of a batch are padded to `seq`: then sdpa gets an explicit mask, which costs it the
            flash kernel, copies of the grouped keys and values, and the causal saving.
        routing: how evenly the routers of a mixture of experts load them: balanced, or zipf:EXPONENT, by which the
            share of an expert falls with its rank.
        images: images of a sample (`perfmodel.tracing` alone has them); their tokens are among its `seq`.
        image_size: height and width of an image in pixels, before the model's processor resizes it.
        engine: what runs the step: torch, or deepspeed-zero3 (`perfmodel.recording.zero`); a method may name its own.
    """

    batch: Dim = 1
    seq: Dim = 512
    dtype: str = "bf16"
    amp: str | None = None
    optimizer: str = "adamw"
    grad_accum: int = 1
    checkpoint: str = "none"
    attention: str = "sdpa"
    clip_grad: bool = True
    cuda_graphs: bool = False
    padded: bool = False
    kernels: str = "torch"
    compile: str = "none"
    engine: str = "torch"
    routing: str = "balanced"
    images: int = 0
    image_size: tuple[int, int] = (448, 448)

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            object.__setattr__(self, name, positive(name, getattr(self, name)))
        object.__setattr__(self, "grad_accum", positive("grad_accum", self.grad_accum))
        if isinstance(self.grad_accum, np.ndarray):
            raise UserError("grad_accum must be one integer")
        for name, choices in (
            ("dtype", DTYPES), ("optimizer", OPTIMIZERS), ("checkpoint", CHECKPOINT), ("attention", ATTENTION),
            ("kernels", KERNELS), ("compile", COMPILE), ("engine", ENGINES),
        ):  # fmt: skip
            one_of(name, getattr(self, name), choices)
        if self.amp is not None:
            one_of("amp", self.amp, ("bf16", "fp16"))
            if self.dtype not in ("fp32", self.amp):
                raise UserError(f"amp {self.amp} goes with fp32 or {self.amp} weights, got dtype {self.dtype}")
        exponent_of(self.routing)
        object.__setattr__(self, "image_size", tuple(self.image_size))  # a list where it comes from JSON
        if self.images < 0 or min(self.image_size) < 1:
            raise UserError(f"images are counted from 0, their pixels from 1: got {self.images} of {self.image_size}")
        if self.attention == "flash2" and self.dtype == "fp32" and self.amp is None:
            raise UserError("attention flash2 needs a 16-bit dtype; use sdpa with fp32")
        if self.attention == "flash2" and self.padded:
            raise UserError("padded batches with attention flash2 (unpadding) are not modelled; use sdpa")

    @property
    def tokens(self) -> Dim:
        """Tokens of one optimizer step."""
        return self.batch * self.seq * self.grad_accum

    @property
    def explicit_mask(self) -> bool:
        """Whether sdpa gets a mask: compiled code cannot look whether there is padding (`_ignore_causal_mask_sdpa`)."""
        return self.padded or self.compile != "none"

    def as_dict(self) -> dict[str, Any]:
        """The setup as plain values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `UserError` unless the value is one of the choices."""
    if value not in choices:
        raise UserError(f"{name} {value!r} is unknown: {nearest(str(value), choices)}")


def positive(name: str, value: Any) -> Dim:
    """An int (or integer array) from 1 to `LARGEST`; arrays of one value stay arrays.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, np.ndarray):
        if value.size == 0 or not np.issubdtype(value.dtype, np.integer):
            raise UserError(f"{name} must hold integers, got {value.dtype} of size {value.size}")
        low, high = int(value.min()), int(value.max())
    elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = low = high = int(value)
    else:
        raise UserError(f"{name} must be a positive integer, got {value!r}")
    if low < 1 or high > LARGEST:
        raise UserError(f"{name} must be from 1 to {LARGEST}, got {low if low < 1 else high}")
    return value if isinstance(value, int) else value.astype(np.int64)
