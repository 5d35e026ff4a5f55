"""From a config.json to the model that it stands for, on the meta device."""

from copy import deepcopy
from typing import Any

import torch

from ...architectures import Config
from ...errors import UserError, nearest
from ...program.installed import unmirrored
from ...setup import Setup
from ..kernels import without_kernels
from . import causal, classifiers, diffusion, image_text, masked, seq2seq, speech, vision
from .dtypes import TORCH_DTYPES
from .experts import linearise_experts
from .family import Family, text_inputs

# A type that several auto classes know belongs to the first of these: what it was pretrained for. Before the decoders
# stand those that may see images, too: transformers has Gemma 3's class among both.
FAMILIES = (
    seq2seq.FAMILY, speech.FAMILY, vision.FAMILY, masked.FAMILY, image_text.FAMILY, causal.FAMILY,
    classifiers.OF_SAMPLES, classifiers.OF_TOKENS,
)  # fmt: skip
LINEAR_EXPERTS = "linear_experts"  # a key of ours in bundled configs: the experts are linear layers
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


def types() -> dict[str, Family]:
    """Every model type that some family knows, with its family: that which a config without `architectures` is of."""
    found: dict[str, Family] = {}
    for family in (family for family in FAMILIES if not family.only_named):
        for kind in family.classes:
            found.setdefault(kind, family)
    return found


def family_of(config: Config) -> tuple[Family, str]:
    """The family of a config and the class of transformers to build.

    `architectures` decides where there is one; else a decoder is causal, or it is the order of `FAMILIES`.

    Raises:
        UserError: no model_type, one that the installed transformers does not know, or none of the families'; or a
            class that none of them has.
    """
    if config.of_diffusers:
        return diffusion.FAMILY, diffusion.class_of(config)
    kind = config.text("model_type")
    able = [family for family in FAMILIES if kind in family.classes]
    if not able:
        raise UserError(f"{config.origin}: {_why_not(kind, config)}")
    named = config.values.get("architectures")
    names = [str(name) for name in named] if isinstance(named, list) else []
    for name in names:
        for family in able:
            if name in family.classes[kind]:
                return family, name
    able = [family for family in able if not family.only_named]
    if names or not able:
        raise UserError(
            f"{config.origin}: architectures names {' and '.join(names) or 'nothing'}, which cannot be traced; "
            f"of {kind} can {', '.join(_classes(kind))}"
        )
    if config.values.get("is_decoder") is True:
        able.sort(key=lambda family: family is not causal.FAMILY)
    return able[0], able[0].classes[kind][0]


def notes_of(config: Config, setup: Setup) -> tuple[str, ...]:
    """What a reader of a prediction must know about the batch and the program of a config's model."""
    plain = without_kernels(config.values.get("model_type"))
    return (*_of_batch(config, setup), *([plain] if plain else []))


def _of_batch(config: Config, setup: Setup) -> tuple[str, ...]:
    family, name = family_of(config)
    if setup.images:
        return (f"{setup.images_in_words}: what they take of its tokens is among --seq",)
    others = [key.removesuffix("_config") for key in ("vision_config", "audio_config") if key in config.values]
    alone = f"{name} is traced with text alone: no {' and no '.join(others)} input" if others else ""
    if alone and (family.takes_images or family.inputs is text_inputs):
        return (alone,)  # a language model, in whatever family transformers lists it
    return (family.note,) if family.note else ()


def _classes(kind: str) -> list[str]:
    return [name for family in FAMILIES for name in family.classes.get(kind, ())]


def _why_not(kind: str, config: Config) -> str:
    from transformers import CONFIG_MAPPING

    if kind in CONFIG_MAPPING:
        return (
            f"model_type {kind!r} is none of the families that can be traced "
            f"({', '.join(family.name for family in FAMILIES)})"
        )
    if "auto_map" in config.values:
        return f"model_type {kind!r} needs code from the hub (trust_remote_code), which is never run here"
    return f"model_type {kind!r} is unknown to the installed transformers: {nearest(kind, types())}"


def config_of(config: Config) -> Any:
    """The transformers config of a config.json, as training has it.

    Raises:
        UserError: transformers refuses its values.
    """
    from transformers import AutoConfig

    family, name = family_of(config)
    values = deepcopy({k: v for k, v in config.values.items() if not k.startswith("_")})  # transformers edits parts
    try:
        found = AutoConfig.for_model(**values)
    except Exception as error:  # each config checks its values in its own way
        raise UserError(f"{config.origin}: transformers refuses it: {in_one_line(error)}") from error
    found.architectures = [name]
    if family is classifiers.OF_SAMPLES and getattr(found, "pad_token_id", None) is None:
        found.pad_token_id = 0  # a decoder looks for the last token that is none
    if family in (seq2seq.FAMILY, speech.FAMILY) and getattr(found, "decoder_start_token_id", None) is None:
        found.decoder_start_token_id = 0  # any token does
    for part in (found, *(getattr(found, key, None) for key in getattr(found, "sub_configs", {}))):
        if hasattr(part, "use_cache"):
            part.use_cache = False  # as transformers.Trainer sets it
    return found


def build_model(config: Config, setup: Setup, *, device: str = "meta") -> Any:
    """The model of transformers or diffusers that a config stands for, base weights in the setup's dtype.

    Raises:
        UserError: the package cannot build it.
        torch.OutOfMemoryError, RuntimeError: the device has too little memory for it (`out_of_memory`).
    """
    import transformers

    family, name = family_of(config)
    if family is diffusion.FAMILY:
        if setup.attention == "flash2":
            raise UserError("--attention flash2: diffusers runs PyTorch's attention; use sdpa")
        return diffusion.build_transformer(config, setup, device)
    found = config_of(config)
    cls = getattr(transformers, name, None)
    if cls is None:
        raise UserError(f"{config.origin}: the installed transformers has no {name}")
    able = getattr(cls, "_supports_sdpa", False)
    flash = setup.attention == "flash2"  # asked for once the model is there: transformers looks for the package
    if flash and not getattr(cls, "_supports_flash_attn", False):
        raise UserError(f"--attention flash2: transformers' {name} cannot run flash-attn; use sdpa")
    attention = "eager" if flash or (setup.attention == "sdpa" and not able) else setup.attention  # as transformers
    try:
        with torch.device(device):
            model = cls._from_config(found, dtype=TORCH_DTYPES[setup.dtype], attn_implementation=attention)
            if config.values.get(LINEAR_EXPERTS):
                linearise_experts(model)
            if config.values.get("tie_word_embeddings") is False and getattr(found, "tie_word_embeddings", False):
                seq2seq.untie_head(model)
        if setup.experts == "eager":
            model.set_experts_implementation(setup.experts)
        for module in model.modules() if flash else ():
            if hasattr(module, "config"):
                module.config._attn_implementation = "flash_attention_2"
        return model
    except Exception as error:  # missing packages, attention that it lacks, dims that do not fit
        if out_of_memory(error):
            raise
        raise UserError(f"{config.name}: transformers cannot build {name}: {in_one_line(error)}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the host, has no more memory."""
    told = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return told or any(text in str(error).lower() for text in OUT_OF_MEMORY)


def in_one_line(error: BaseException) -> str:
    """An exception in one line, with the packages that may be its reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = f"{type(error).__name__}: {' '.join(lines)[:200]}" if lines else type(error).__name__
    return f"{told}; installed: {', '.join(others)}" if (others := unmirrored()) else told
