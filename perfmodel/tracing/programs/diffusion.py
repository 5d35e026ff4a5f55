"""Diffusion transformers of diffusers: a sample is the latents of an image and the embeddings of its text.

A step is that of diffusers' example for FLUX.2 (examples/dreambooth/train_dreambooth_lora_flux2_klein.py), latents and
embeddings made before the training, as PEFT's image benchmark runs it (method_comparison/image-gen/run.py of peft at
5d602fd): flow matching mixes noise into the latents, the transformer predicts it, and the loss is the mean square in
fp32. The image encoder and the text encoder are not in it.
"""

from importlib import import_module
from typing import Any

import torch

from ...architectures import Config
from ...errors import UserError
from ...setup import Setup
from .dtypes import TORCH_DTYPES
from .family import Family, Inputs

CLASSES = ("Flux2Transformer2DModel",)
TEXT = 512  # tokens to which every prompt is padded: `max_sequence_length` of diffusers' Flux2KleinPipeline
AXES = 4  # of a token's position: time, height, width, layer


def class_of(config: Config) -> str:
    """The class of diffusers that a config names.

    Raises:
        UserError: one whose batches are not known here.
    """
    if config.kind not in CLASSES:
        raise UserError(f"{config.origin}: of diffusers' classes {', '.join(CLASSES)} can be traced, not {config.kind}")
    return config.kind


def build_transformer(config: Config, setup: Setup, device: str) -> Any:
    """The transformer of a config, weights in the setup's dtype.

    Raises:
        UserError: diffusers is not installed, or refuses the config's values.
    """
    name = class_of(config)
    try:
        diffusers = import_module("diffusers")
    except ImportError as error:
        raise UserError(
            f"{config.name}: tracing it needs the diffusion extra ({error.name} is missing): "
            "pip install 'perfmodel[diffusion]'"
        ) from None
    values = {key: value for key, value in config.values.items() if not key.startswith("_")}
    try:
        with torch.device(device):
            model = getattr(diffusers, name)(**values)
    except (TypeError, ValueError, AttributeError) as error:  # keys that the class lacks, dims that do not fit
        raise UserError(f"{config.origin}: diffusers cannot build {name}: {error}") from error
    return torch.nn.Module.to(model, TORCH_DTYPES[setup.dtype])  # diffusers' own warns of no modules to keep in fp32


def of_diffusers(model: Any) -> bool:
    """Whether a model, with or without peft around it, is one of diffusers."""
    return hasattr(model, "enable_gradient_checkpointing")


def turn_on_checkpoints(model: Any, setup: Setup) -> None:
    """Turn on diffusers' activation checkpointing, which is not reentrant.

    Raises:
        UserError: the setup asks for another.
    """
    if setup.checkpoint == "block-reentrant":
        raise UserError("--checkpoint block-reentrant: diffusers' checkpoints are not reentrant; use block")
    model.enable_gradient_checkpointing()


def images(model: Any, setup: Setup, device: str) -> Inputs:
    """Latents (batch, channels, image tokens) with noise and its share, positions, text embeddings, times.

    Raises:
        UserError: no token is left for the image.
    """
    config, batch, tokens = model.config, int(setup.batch), int(setup.seq) - TEXT
    if tokens < 1:
        raise UserError(
            f"seq {setup.seq}: it counts the {TEXT} tokens of the text and those of the image, of 16 x 16 pixels each: "
            f"{TEXT + 32 * 32} for 512 x 512 pixels"
        )
    weights = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def made(*shape: int, dtype: torch.dtype = weights) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    latents = (batch, config.in_channels, tokens)
    guidance = {"guidance": made(batch, dtype=torch.float32)} if config.guidance_embeds else {}
    return {
        "latents": made(*latents), "noise": made(*latents), "share": made(batch, 1, 1),
        "timestep": made(batch, dtype=torch.float32), **guidance,
        "encoder_hidden_states": made(batch, TEXT, config.joint_attention_dim),
        "txt_ids": made(batch, TEXT, AXES, dtype=torch.long), "img_ids": made(batch, tokens, AXES, dtype=torch.long),
    }  # fmt: skip


def flow_matching(model: Any, inputs: Inputs) -> torch.Tensor:
    """The loss of a batch of `images`: how far the predicted velocity is from noise - latents, weights all one."""
    given = dict(inputs)
    latents, noise, share = (given.pop(name) for name in ("latents", "noise", "share"))
    noisy = (1.0 - share) * latents + share * noise
    predicted = model(hidden_states=noisy.permute(0, 2, 1), return_dict=False, **given)[0]
    predicted = _in_place_of(predicted, given["img_ids"])
    weights, target = torch.ones_like(share), noise - latents
    squares = weights.float() * (predicted.float() - target.float()) ** 2
    return torch.mean(squares.reshape(len(squares), -1), 1).mean()


def _in_place_of(predicted: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The tokens put in their places: (batch, tokens, channels) → (batch, channels, tokens).

    As `Flux2KleinPipeline._unpack_latents_with_ids` does it, sample by sample: the host reads the image's sides from
    the device.
    """
    placed = []
    for sample, position in zip(predicted, positions, strict=True):
        rows, columns = position[:, 1], position[:, 2]
        height, width = torch.max(rows) + 1, torch.max(columns) + 1
        (height * width).item()
        places = (rows * width + columns).unsqueeze(1).expand(-1, sample.shape[1])
        placed.append(torch.zeros_like(sample).scatter_(0, places, sample).permute(1, 0))
    return torch.stack(placed)


FAMILY = Family(
    "diffusion",
    "",
    images,
    loss=flow_matching,
    note=f"seq counts {TEXT} tokens of text and those of the image, of 16 x 16 pixels each; latents and text "
    "embeddings are made before the training",
)
