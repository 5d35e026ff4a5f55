"""Models of images and text: every token is predicted from those before it, image tokens among them.

Without images in the setup they are trained on text alone. What the processors of transformers make of images is built
here from the config: pixels or patches, and the tokens that stand for them.
"""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from ...errors import UserError
from ...setup import Setup
from ..known import with_value
from .family import Family, Inputs, of_labels, text_inputs

TEXT, IMAGE = 0, 1  # types of tokens
Seen = tuple[int, Inputs]  # tokens of an image, and what the model takes besides text


def text_and_images(model: Any, setup: Setup, device: str) -> Inputs:
    """Tokens, mask, labels, and the images of a batch; each image's tokens stand in one run.

    Raises:
        UserError: what the model's processor makes of images is not known here, or they do not fit into a sample.
    """
    if not setup.images:
        return text_inputs(model, setup, device)
    config = model.config
    take = TAKES.get((config.model_type, config.vision_config.model_type))
    if take is None:
        able = ", ".join(dict.fromkeys(kind for kind, _ in TAKES))
        raise UserError(f"batches with images are not modelled for {config.model_type}, only for {able}")
    batch, seq = int(setup.batch), int(setup.seq)
    tokens, images = take(config, setup, batch * setup.images)
    if setup.images * (tokens + 1) >= seq:
        raise UserError(f"{setup.images} image(s) of {tokens} tokens do not fit into a sample of {seq}: raise --seq")
    of_images = ([TEXT] + [IMAGE] * tokens) * setup.images  # a token of text before each image
    kinds = of_images + [TEXT] * (seq - len(of_images))
    token_id = getattr(config, "image_token_id", None) or config.image_token_index
    return {
        "input_ids": with_value([[kind * token_id for kind in kinds]] * batch),
        "attention_mask": with_value([[1] * seq] * batch),
        "labels": torch.zeros((batch, seq), dtype=torch.long, device=device),
        **({"mm_token_type_ids": with_value([kinds] * batch)} if config.model_type != "llava" else {}),
        **images,
    }


def _squares(config: Any, setup: Setup, count: int) -> Seen:
    """Images resized to the square that the vision tower takes (CLIP's processor)."""
    vision = config.vision_config
    side = vision.image_size
    return (side // vision.patch_size) ** 2, {"pixel_values": torch.zeros((count, 3, side, side))}


def _patches(config: Any, setup: Setup, count: int) -> Seen:
    """Images cut into patches, their sides rounded to whole merged ones (`smart_resize`, within its bounds)."""
    vision = config.vision_config
    merge, side = vision.spatial_merge_size, vision.patch_size * vision.spatial_merge_size
    rows, columns = (merge * max(1, round(pixels / side)) for pixels in setup.image_size)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    grid = with_value([[1, rows, columns]] * count)
    pixels = torch.zeros((count * rows * columns, values))
    return rows * columns // merge**2, {"pixel_values": pixels, "image_grid_thw": grid}


TAKES: dict[tuple[str, str], Callable[[Any, Setup, int], Seen]] = {  # by the types of model and vision tower
    ("llava", "clip_vision_model"): _squares,
    **{(kind, f"{kind}_vision"): _patches for kind in (
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
    )},
}  # fmt: skip


def loss_of(model: Any, inputs: Inputs) -> torch.Tensor:
    """The loss; transformers 5.24's Llama 4 copies a field of its decoder's output that this lacks."""
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    with patch.object(MoeCausalLMOutputWithPast, "image_outputs", None, create=True):
        return of_labels(model, inputs)


FAMILY = Family(
    "image and text", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", text_and_images, loss_of, only_named=True,
    takes_images=True,
)  # fmt: skip
