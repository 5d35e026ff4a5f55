"""The methods that `advise` considers by itself, each sized to train at least so many parameters."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from .. import methods
from ..architectures import Architecture
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..methods import Method
from ..prediction.predict import predict
from ..setup import Setup

# What the works on LoRA's speed propose: fewer adapted layers, fewer blocks, slices of the weights, fixed factors.
BY_RANK = (
    "lora:targets=q_proj+v_proj",
    "lora:targets=all-linear",
    "paca:targets=all-linear",
    "lora_fa:targets=all-linear",
    "top_k:k={half},inner=lora,targets=all-linear",
    "top_k:k={quarter},inner=lora,targets=all-linear",
)
BY_BLOCKS = ("top_k",)
FIXED = ("full", "s2ft", "bitfit", "norm", "ia3")
RANKS = 2 ** np.arange(1, 10)


def sized(architecture: Architecture, setup: Setup, on: DeviceProfile, trainable: float) -> list[Method]:
    """The catalogue's methods, each with the smallest rank or number of blocks that trains enough."""
    return [m for make in (_by_rank, _by_blocks, _fixed) for m in make(architecture, setup, on, trainable)]


def _by_rank(architecture: Architecture, setup: Setup, on: DeviceProfile, trainable: float) -> Iterator[Method]:
    layers = architecture.layers
    for text in BY_RANK:
        spec = text.format(half=max(1, layers // 2), quarter=max(1, layers // 4))
        try:
            method = methods.parse(spec).bind(architecture)
            top = min(architecture.hidden, int(RANKS[-1]))
            ranks = RANKS[top >= RANKS]
            changes: dict[str, Any] = {"r": ranks}
            counts = _trainable(architecture, setup, replace(method, **changes), on)
        except UserError:  # not for this architecture
            continue
        enough = np.broadcast_to(counts, ranks.shape) >= trainable
        if enough.any():
            changes["r"] = int(ranks[enough.argmax()])
            yield replace(method, **changes)


def _by_blocks(architecture: Architecture, setup: Setup, on: DeviceProfile, trainable: float) -> Iterator[Method]:
    for name in BY_BLOCKS:
        for k in sorted({2**i for i in range(architecture.layers.bit_length())} | {architecture.layers}):
            method = methods.parse(f"{name}:k={k}").bind(architecture)
            if k <= architecture.layers and _trainable(architecture, setup, method, on) >= trainable:
                yield method
                break


def _fixed(architecture: Architecture, setup: Setup, on: DeviceProfile, trainable: float) -> Iterator[Method]:
    for name in FIXED:
        try:
            method = methods.parse(name).bind(architecture)
            if _trainable(architecture, setup, method, on) >= trainable:
                yield method
        except UserError:  # nothing of the kind in this architecture (biases, say)
            continue


def _trainable(architecture: Architecture, setup: Setup, method: Method, on: DeviceProfile) -> Any:
    return predict(architecture, replace(method, architecture=None), setup, on).trainable_params
