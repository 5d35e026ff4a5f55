"""Blocks of microbenchmarks that a campaign has beyond those of a calibration: no fit reads them, they show its limits.

Copies between host and device, products whose sides no tile divides, attention by each of PyTorch's backends, and
optimizers over lists of tensors.
"""

import random
from itertools import product

from perfmodel.devices.gemm_parameters import LAYOUTS

from .designs import SEED, MicroCase, design, of_linear

UNALIGNED = (50257, 30522, 5185)  # vocabularies of GPT-2 and BERT, and a width that is odd
BACKENDS = ("flash", "cudnn", "efficient", "math")
COPIES = ("to_device", "to_device_pinned", "to_host", "within")
LISTS = ("adamw-foreach", "adamw-fused", "clip")


def campaign_blocks(device: str, dtypes: tuple[str, ...]) -> dict[str, list[MicroCase]]:
    """All blocks of a kind of device: the calibration's and, on CUDA, the wider ones."""
    blocks = design(device, dtypes)
    if device != "cuda":
        return blocks
    wider = {"copies": copy_cases(), "attention backends": backend_cases(), "optimizer lists": list_cases()}
    return {**blocks, **wider, **{f"gemm unaligned {dtype}": unaligned(dtype) for dtype in dtypes}}


def copy_cases() -> list[MicroCase]:
    """From one number, which shows the floor, to what shows the bandwidth."""
    return [
        MicroCase("copies", op, "fp32", (("elements", n),)) for n, op in product((1, 1 << 24, 1 << 12, 1 << 18), COPIES)
    ]


def unaligned(dtype: str) -> list[MicroCase]:
    """A head of an odd vocabulary, in the three layouts."""
    shapes = list(product((512, 2048, 4096, 1000), UNALIGNED, (768, 1600, 2048)))
    random.Random(f"{SEED} {dtype}").shuffle(shapes)
    found = [of_linear(dtype, layout, *shape) for shape in shapes for layout in LAYOUTS]
    return [MicroCase("gemm unaligned", c.op, c.dtype, c.sizes, c.layout) for c in found]


def backend_cases() -> list[MicroCase]:
    """Causal attention, forward and backward, by each backend; math only where its matrix of scores is small."""
    found = []
    for seq, (heads, dim), batch in product((512, 1024, 128, 2048, 4096), ((32, 64), (16, 128), (25, 64)), (4, 1)):
        sizes = (("batch", batch), ("seq", seq), ("heads", heads), ("kv_heads", heads), ("head_dim", dim))
        for op, backward in product(BACKENDS, (False, True)):
            if op != "math" or seq <= 1024:
                found.append(MicroCase("attention backends", op, "bf16", sizes, backward=backward))
    return found


def list_cases() -> list[MicroCase]:
    """Steps of AdamW and clipping over lists of equal tensors: many small ones (adapters), few large ones (weights)."""
    forms = ((448, 16384), (1, 16384), (200, 4194304), (64, 1 << 20), (1000, 64), (16, 1 << 25))
    return [
        MicroCase("optimizer lists", op, dtype, (("tensors", n), ("elements", size)))
        for (n, size), dtype, op in product(forms, ("bf16", "fp32"), LISTS)
    ]
