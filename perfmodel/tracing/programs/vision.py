"""Image classifiers (`AutoModelForImageClassification`): one image and one label a sample."""

from typing import Any

import torch

from ...setup import Setup
from .family import Family, Inputs

DEFAULT_SIZE = 224  # pixels a side, where a config names none: ImageNet's crop, that of every image processor here


def pixels(model: Any, setup: Setup, device: str) -> Inputs:
    """Images (batch, channels, height, width) in the weights' dtype, and a class each."""
    config, batch = model.config, int(setup.batch)
    labels = torch.zeros((batch,), dtype=torch.long, device=device)
    if model.main_input_name == "input_ids":  # ImageGPT reads an image as a sequence of colours
        ids = torch.zeros((batch, config.n_positions), dtype=torch.long, device=device)
        return {"input_ids": ids, "labels": labels}
    vision = getattr(config, "vision_config", config)
    if hasattr(vision, "num_patches"):  # SigLIP 2 takes patches cut beforehand
        return {**_patches(vision, batch, _dtype(model, setup), device), "labels": labels}
    height, width = _size(getattr(vision, "image_size", None))
    channels = getattr(vision, "num_channels", 3)
    images = torch.zeros((batch, channels, height, width), dtype=_dtype(model, setup), device=device)
    return {"pixel_values": images, "labels": labels}


def _dtype(model: Any, setup: Setup) -> torch.dtype:
    """Autocast takes images as they come from the loader."""
    return torch.float32 if setup.amp else next(p.dtype for p in model.parameters() if p.is_floating_point())


def _size(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    return DEFAULT_SIZE, DEFAULT_SIZE


def _patches(vision: Any, batch: int, dtype: torch.dtype, device: str) -> Inputs:
    side = int(vision.num_patches**0.5)
    values = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.zeros((batch, side * side, values), dtype=dtype, device=device),
        "pixel_attention_mask": torch.ones((batch, side * side), dtype=torch.long, device=device),
        "spatial_shapes": torch.full((batch, 2), side, dtype=torch.long, device=device),
    }


FAMILY = Family(
    "vision",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    pixels,
    note="the images have the size that the config names (224 pixels a side where it names none); seq is not used",
    reads_length=False,
)
