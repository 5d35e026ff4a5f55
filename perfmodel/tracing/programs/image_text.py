"""Models of images and text: every token is predicted from those before it, image tokens among them.

Without images in the setup they are trained on text alone. What the processors of transformers make of images is built
here from the config: pixels or patches, and the tokens that stand for them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any
from unittest.mock import patch

import torch

from ...errors import UserError
from ...setup import Setup
from ..known import ones, with_value
from .family import Family, Inputs, of_labels, text_inputs

TEXT, IMAGE = 0, 1  # types of tokens


@dataclass(frozen=True)
class ProcessedImages:
    """What a processor makes of the images of a batch.

    Attributes:
        kinds: types of the tokens that stand for one image.
        inputs: what the model takes besides text.
    """

    kinds: list[int]
    inputs: Inputs


@dataclass(frozen=True)
class ImageInput:
    """How a model takes images.

    Attributes:
        see: the images of a batch, by the model's config and the setup.
        types: the model's argument for the types of tokens, empty if it has none.
    """

    see: Callable[[Any, Setup], ProcessedImages]
    types: str = ""


def text_and_images(model: Any, setup: Setup, device: str) -> Inputs:
    """Tokens, mask, labels, and the images of a batch, each after a token of text.

    Raises:
        UserError: what the model's processor makes of images is not known here, or they do not fit into a sample.
    """
    if not setup.images:
        return text_inputs(model, setup, device)
    config = model.config
    takes = TAKES.get((config.model_type, config.vision_config.model_type))
    if takes is None:
        able = ", ".join(dict.fromkeys(kind for kind, _ in TAKES))
        raise UserError(f"batches with images are not modelled for {config.model_type}, only for {able}")
    batch, seq = int(setup.batch), int(setup.seq)
    seen = takes.see(config, setup)
    of_images = [TEXT, *seen.kinds] * setup.images
    if len(of_images) >= seq:
        raise UserError(
            f"images of {setup.images} x {len(seen.kinds)} tokens do not fit into a sample of {seq}: raise --seq"
        )
    kinds = of_images + [TEXT] * (seq - len(of_images))
    token_id = getattr(config, "image_token_id", None) or config.image_token_index
    return {
        "input_ids": with_value([[kind * token_id for kind in kinds]] * batch),
        "attention_mask": with_value([[1] * seq] * batch),
        "labels": torch.zeros((batch, seq), dtype=torch.long, device=device),
        **({takes.types: with_value([kinds] * batch)} if takes.types else {}),
        **seen.inputs,
    }


def _count(setup: Setup) -> int:
    """Images of a batch."""
    return int(setup.batch) * setup.images


def _squares(config: Any, setup: Setup) -> ProcessedImages:
    """Images resized to the square that the vision tower takes (CLIP's processor, Gemma 3's)."""
    vision = config.vision_config
    side = vision.image_size
    tokens = getattr(config, "mm_tokens_per_image", (side // vision.patch_size) ** 2)
    return ProcessedImages([IMAGE] * tokens, {"pixel_values": torch.zeros((_count(setup), 3, side, side))})


def _patches(config: Any, setup: Setup) -> ProcessedImages:
    """Images cut into patches, their sides rounded to whole merged ones (`smart_resize`, within its bounds)."""
    vision, count = config.vision_config, _count(setup)
    merge, side = vision.spatial_merge_size, vision.patch_size * vision.spatial_merge_size
    rows, columns = (merge * max(1, round(pixels / side)) for pixels in setup.image_size)
    shape: tuple[int, ...] = (3, vision.patch_size, vision.patch_size)
    if hasattr(vision, "temporal_patch_size"):  # flat, and an image stands for as many frames; PaddleOCR's is neither
        shape = (prod(shape) * vision.temporal_patch_size,)
    grid = with_value([[1, rows, columns]] * count)
    pixels = torch.zeros((count * rows * columns, *shape))
    return ProcessedImages([IMAGE] * (rows * columns // merge**2), {"pixel_values": pixels, "image_grid_thw": grid})


def _lines(config: Any, setup: Setup) -> ProcessedImages:
    """Images no longer than the tower's, their sides in whole (merged) patches; a token of text ends each line of these
    (Pixtral's processor).
    """
    vision, count = config.vision_config, _count(setup)
    side = vision.patch_size * getattr(config, "spatial_merge_size", 1)
    longer = max(1.0, max(setup.image_size) / vision.image_size)
    rows, columns = (ceil(int(pixels / longer) / side) for pixels in setup.image_size)
    pixels = torch.zeros((count, 3, rows * side, columns * side))
    sizes = with_value([[rows * side, columns * side]] * count)
    return ProcessedImages(([IMAGE] * columns + [TEXT]) * rows, {"pixel_values": pixels, "image_sizes": sizes})


def _tiles_and_whole(config: Any, setup: Setup) -> ProcessedImages:
    """Images enlarged to four of the tower's sides and cut into tiles of one, and the whole in one more; before each
    stand two tokens, after each row of tiles one (Idefics3's processor, by its default sizes).
    """
    vision = config.vision_config
    side, longest = vision.image_size, max(setup.image_size)
    rows, columns = (ceil(int(4 * side * pixels / longest) / side) for pixels in setup.image_size)
    tokens = (side // vision.patch_size // config.scale_factor) ** 2
    tile, tiles = [TEXT] * 2 + [IMAGE] * tokens, rows * columns + 1
    inputs = {
        "pixel_values": ones((int(setup.batch), setup.images * tiles, 3, side, side), torch.float32),
        "pixel_attention_mask": ones((int(setup.batch), setup.images * tiles, side, side), torch.long),
    }
    return ProcessedImages((tile * columns + [TEXT]) * rows + [TEXT, *tile, TEXT], inputs)


def _cut_by_shape(config: Any, setup: Setup) -> ProcessedImages:
    """Images cut into at most 12 tiles in the grid nearest to their shape, and the whole in one more (InternVL's
    processor). Of grids alike the largest that is not twice as large as the image.
    """
    side, (height, width) = config.vision_config.image_size[0], setup.image_size
    grids = sorted(((c, r) for c in range(1, 13) for r in range(1, 13) if c * r <= 12), key=prod)
    nearest = min(abs(width / height - c / r) for c, r in grids)
    first, *larger = (grid for grid in grids if abs(width / height - grid[0] / grid[1]) == nearest)
    tiles = prod([first, *(grid for grid in larger if 2 * height * width > side**2 * prod(grid))][-1])
    tiles += tiles > 1
    pixels = torch.zeros((_count(setup) * tiles, 3, side, side))
    return ProcessedImages([IMAGE] * config.image_seq_length * tiles, {"pixel_values": pixels})


def _crossed(config: Any, setup: Setup) -> ProcessedImages:
    """Images of as many tiles as there may be, empty ones among them: text attends to them across (Mllama)."""
    vision, per_image = config.vision_config, (int(setup.batch), setup.images)
    tiles, side = vision.max_num_tiles, vision.image_size
    inputs = {
        "pixel_values": torch.zeros((*per_image, tiles, 3, side, side)),
        "aspect_ratio_ids": ones(per_image, torch.long),
        "aspect_ratio_mask": ones((*per_image, tiles), torch.long),
        "cross_attention_mask": ones((int(setup.batch), int(setup.seq), setup.images, tiles), torch.long),
    }
    return ProcessedImages([IMAGE], inputs)


TAKES: dict[tuple[str, str], ImageInput] = {  # by the types of model and vision tower
    ("llava", "clip_vision_model"): ImageInput(_squares),
    ("gemma3", "siglip_vision_model"): ImageInput(_squares, "token_type_ids"),
    ("llava", "pixtral"): ImageInput(_lines),
    ("mistral3", "pixtral"): ImageInput(_lines),
    ("idefics3", "idefics3_vision"): ImageInput(_tiles_and_whole),
    ("smolvlm", "smolvlm_vision"): ImageInput(_tiles_and_whole),
    ("internvl", "internvl_vision"): ImageInput(_cut_by_shape),
    ("mllama", "mllama_vision_model"): ImageInput(_crossed),
    ("glm46v", "glm4v_vision"): ImageInput(_patches, "mm_token_type_ids"),
    **{(kind, f"{kind}_vision"): ImageInput(_patches, "mm_token_type_ids") for kind in (
        "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
        "glm4v", "paddleocr_vl",
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
