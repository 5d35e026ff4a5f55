"""LLaMA-Factory's YAML (hparams/*_args.py, model/loader.py, model/adapter.py of the project, at ff6d4d1)."""

import re
from typing import Any

from ..errors import UserError
from . import packing
from .fields import (
    EMBEDDING_STATES,
    FLASH_2_FOR_3,
    FUSES,
    TORCHS_MUON,
    accumulated,
    attention,
    by_length,
    checkpoint_kind,
    clips,
    compiled,
    engine,
    flavour,
    fsdp,
    half,
    in_8_bit,
    names_embedding,
    optimizer_name,
    own_code,
    power_iterations,
    spec,
    undecayed,
    with_fsdps,
    without_cache,
    without_tf32,
)
from .keys import NO_TRAINING, NOTHING, Keys
from .trained_for import of_llama_factory
from .vocabulary import enlarged_by_llama_factory

MARKS = ("finetuning_type", "cutoff_len", "lora_target", "stage", "template", "dataset_dir")
ATTENTION = {"auto": "sdpa", "sdpa": "sdpa", "fa2": "flash2", "fa3": "flash2", "disabled": "eager"}
PROJECTING = ("galore", "apollo")  # methods whose optimizers project gradients
OF_LORA = ("loraplus_lr_ratio", "use_rslora", "use_dora", "pissa_init")
OF_FULL = ("use_galore", "use_apollo", "use_badam")
TOWER = {"vision tower": "freeze_vision_tower", "projector": "freeze_multi_modal_projector"}
WITH_NEW_ROWS = ("embed_tokens", "lm_head")  # trained beside adapters where nothing is named
# What GaLore's other optimizers are asked for by (train/trainer_utils.py, `_create_galore_optimizer`)
OTHER_GALORES = ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "adafactor")
GALORES_ADAMW = "GaLore's AdamW with states in the dtype of the weights"
IN_FP32 = "copies of modules in the dtype of the base, not in fp32"  # `cast_trainable_params_to_fp32`
CHECKPOINT_DTYPE = "bf16"  # of a checkpoint that no key speaks of
# Of badam 1.2: `BlockOptimizer.step`, and `clip_grad_norm_old_version`, which LLaMA-Factory's trainers take with it
EMPTIED = "the allocator's cache is never emptied; BAdam does it after every step"
OLD_CLIP = "gradients clipped together, not one after another as beside BAdam"
# unsloth/models/llama.py, which chunks the loss; `apply_unsloth_gradient_checkpointing` offloads from so many tokens on
UNSLOTHS = "PyTorch's norms, rotary positions and loss of all logits, not Unsloth's"
PEFTS = "peft's adapters, not Unsloth's kernels of them"
ON_THE_GPU, OFFLOADED_FROM = "checkpoints stay on the GPU", 512
# It asks in the environment (train/fp8_utils.py), and the Trainer of transformers 5 gives accelerate its own precision
FP8_OF_4 = "without float8, which LLaMA-Factory turns on under transformers 4 alone (--fp8 padded)"


def read(keys: Keys) -> tuple[str | None, str, dict[str, Any], list[str]]:
    """Model, method, setup and notes of a LLaMA-Factory file."""
    if "model_name_or_path" not in keys:
        raise UserError(f"{keys.origin}: model_name_or_path is missing; a LLaMA-Factory config names it")
    if keys.flag("do_predict") and not keys.flag("do_train"):
        raise UserError(f"{keys.origin}: {NO_TRAINING}: do_predict without do_train")
    objective = of_llama_factory(keys)
    with keys.said_of_method():
        name, options = _method(keys)
    own_code(keys, "model_name_or_path", in_few_bits=keys.get("quantization_bit") is not None)
    keys.exclude("pure_bf16", "fp16")
    pure = keys.flag("pure_bf16")
    amp = half(keys)
    # all weights train in fp32, under GaLore too, unless pure_bf16 or BAdam asks not to (model/adapter.py)
    upcast = not pure and name in ("full", *PROJECTING)
    notes = []
    if amp is None and not pure:
        notes.append("neither bf16 nor fp16: no autocast, and frozen weights in bf16 as in most checkpoints")
    setup: dict[str, Any] = {
        **objective,
        "engine": engine(keys, zero3=not objective),
        "batch": keys.count("per_device_train_batch_size", 8),
        "seq": keys.count("cutoff_len", 2048),
        "grad_accum": accumulated(keys),
        "dtype": "fp32" if upcast else "bf16" if pure else amp or CHECKPOINT_DTYPE,
        "amp": amp,
        "optimizer": _optimizer(keys),
        "checkpoint": with_fsdps(_checkpoint(keys), fsdp(keys)),
        "attention": _attention(keys),
        "compile": compiled(keys),
        **_update(keys),
        "kernels": "liger" if keys.flag("enable_liger_kernel") else "torch",
    }
    if objective.get("objective", "asft") == "asft":  # trainers of others hand in `use_cache=False`
        without_cache(keys, setup["checkpoint"])
    if keys.flag("fp8"):
        keys.differ(FP8_OF_4, "fp8")
    if name == "full":
        undecayed(keys, setup)
    if name == "loraplus" and in_8_bit(str(setup["optimizer"])) and names_embedding(options["modules_to_save"]):
        keys.differ(EMBEDDING_STATES, "loraplus_lr_ratio")  # `_create_loraplus_optimizer` knows no class of its own
    adapters = keys.text("finetuning_type", "lora") in ("lora", "oft")  # in fp32, by PEFT
    without_tf32(keys, setup["compile"], products=amp is None and (adapters or not pure))
    if (stage := keys.text("stage", "sft")) in ("sft", "pt"):
        notes += packing.packed_by_llama_factory(keys, setup, pretraining=stage == "pt")
    if setup.get("packing", "none") == "none" and stage == "sft":
        setup["group_by_length"] = by_length(keys)
        notes.append(packing.shorter("cutoff_len"))
    return keys.text("model_name_or_path"), spec(name, **options), setup, notes


def _model(keys: Keys) -> str:
    return str(keys.get("model_name_or_path"))


def _attention(keys: Keys) -> str:
    """What `flash_attn` asks for; Gemma 2, gpt-oss and Youtu have their own (`configure_attn_implementation`)."""
    model = _model(keys)
    if re.search(r"gpt-?oss", model, re.IGNORECASE):
        keys.differ(FLASH_2_FOR_3, *(["flash_attn"] if "flash_attn" in keys else []))
        return "flash2"
    by_itself = re.search(r"gemma-?2-", model, re.IGNORECASE) is not None
    eager = re.search(r"youtu-", model, re.IGNORECASE) is not None  # for sdpa, too
    auto = "flash2" if by_itself else "eager" if eager else "sdpa"
    return attention(keys, "flash_attn", {**ATTENTION, "auto": auto, "sdpa": "eager" if eager else "sdpa"}, auto)


def _optimizer(keys: Keys) -> str:
    """The optimizer of the first switch that is on (`create_custom_optimizer`), or that of Transformers' name."""
    name = optimizer_name(keys, "optim", "adamw-fused")
    mini, muon = keys.flag("use_adam_mini"), keys.flag("use_muon")
    if keys.get("loraplus_lr_ratio") is not None or any(keys.flag(f"use_{own}") for own in ("badam", *PROJECTING)):
        return name
    if muon and not mini:
        keys.differ(TORCHS_MUON, "use_muon")
    return "adam-mini" if mini else "muon" if muon else name


def _update(keys: Keys) -> dict[str, bool]:
    """Whether a layerwise optimizer steps inside backward, after which nothing is left to clip."""
    layerwise = [name for name in PROJECTING if keys.flag(f"{name}_layerwise") and keys.flag(f"use_{name}")]
    clipped = clips(keys)
    return {"clip_grad": clipped and not layerwise, "in_backward": bool(layerwise)}


def _checkpoint(keys: Keys) -> str:
    """On by default, and reentrant by default; never on for Gemma 3n (`patch_model` of model/patcher.py).

    Where `gradient_checkpointing` is on, Transformers' trainer switches it on after that, in its own kind if options
    are given or LLaMA-Factory left the model as it was, and else reentrant (`_gradient_checkpointing_enable`).
    """
    if keys.flag("use_unsloth"):
        return _checkpoint_of_unsloth(keys)
    off = keys.flag("disable_gradient_checkpointing") or re.search(r"gemma-?3n", _model(keys), re.IGNORECASE)
    reentrant = keys.flag("use_reentrant_gc", True)
    if keys.flag("gradient_checkpointing"):
        by_trainer = off or keys.get("gradient_checkpointing_kwargs")
        return checkpoint_kind(keys, on=True) if by_trainer else "block-reentrant"
    keys.used.add("gradient_checkpointing_kwargs")
    return "none" if off else "block-reentrant" if reentrant else "block"


def _checkpoint_of_unsloth(keys: Keys) -> str:
    """Unsloth has checkpoints of its own, reentrant ones, whatever other keys say (model_utils/unsloth.py)."""
    keys.used.update(("gradient_checkpointing", "gradient_checkpointing_kwargs"))
    keys.used.update(("disable_gradient_checkpointing", "use_reentrant_gc"))
    keys.differ(UNSLOTHS, "use_unsloth")
    if keys.count("cutoff_len", 2048) >= OFFLOADED_FROM:
        keys.differ(ON_THE_GPU, "use_unsloth")
    return "block-reentrant"


def _method(keys: Keys) -> tuple[str, dict[str, Any]]:
    kind = keys.text("finetuning_type", "lora")
    grown = enlarged_by_llama_factory(keys)
    saved = keys.names("additional_target") or (WITH_NEW_ROWS if grown else ())
    bits = keys.get("quantization_bit")
    if bits is not None and str(bits) not in ("4", "8"):
        raise UserError(f"{keys.origin}: quantization_bit {bits!r} is not modelled: use 4 or 8, or leave it out")
    if bits and keys.text("quantization_method", "bnb") not in ("bnb", "bitsandbytes"):
        raise UserError(f"{keys.origin}: quantization_method: quantised base weights of this kind are not modelled")
    _check_kind(keys, str(kind))
    if kind == "full":
        if bits:
            raise UserError(f"{keys.origin}: finetuning_type full and quantization_bit exclude each other")
        return _full(keys)
    if kind == "freeze":
        return _freeze(keys, quantised=bool(bits))
    if saved and not keys.flag("pure_bf16"):
        keys.differ(IN_FP32, *(["additional_target"] if "additional_target" in keys else []))
    keys.refuse("use_llama_pro", "adapters in added blocks are not modelled; use finetuning_type: freeze")
    if kind == "oft":
        return _oft(keys, int(bits or 16), saved)
    if kind != "lora":
        raise UserError(f"{keys.origin}: finetuning_type {kind!r} is unknown: use lora, full, freeze or oft")
    name = flavour(
        keys, bits=int(bits) if bits else None, dora=keys.flag("use_dora"), rslora=keys.flag("use_rslora"),
        pissa=keys.flag("pissa_init"), plus=keys.get("loraplus_lr_ratio") is not None,
    )  # fmt: skip
    fuses = name in FUSES and (name != "qlora" or keys.flag("double_quantization", True))
    options = {
        "r": keys.count("lora_rank", 8), "targets": _targets(keys, "lora_target"),
        "dropout": keys.number("lora_dropout"), "modules_to_save": saved,
        "implementation": "unsloth" if keys.flag("use_unsloth") and fuses else None,
        "niter": power_iterations(name, f"pissa_niter_{keys.get('pissa_iter') or 16}"),  # -1: a whole SVD
    }  # fmt: skip
    if keys.flag("create_new_adapter"):
        keys.used.add("adapter_name_or_path")  # whose adapters are merged then
    if keys.flag("use_unsloth") and not fuses:
        keys.differ(PEFTS, "use_unsloth")
    if name == "qlora":
        keys.one_of("quantization_type", {"nf4": True, "fp4": True}, True)
        options["double_quant"] = None if keys.flag("double_quantization", True) else "false"
    return name, options


def _check_kind(keys: Keys, kind: str) -> None:
    """Raise `UserError` for switches of another kind of tuning (hparams/finetuning_args.py, `__post_init__`)."""
    for key in OF_LORA if kind != "lora" else OF_FULL:
        if keys.get(key) not in NOTHING:
            right = "lora" if key in OF_LORA else "full"
            raise UserError(f"{keys.origin}: {key} goes with finetuning_type: {right}, not {kind}")


def _freeze(keys: Keys, *, quantised: bool) -> tuple[str, dict[str, Any]]:
    if quantised:
        raise UserError(f"{keys.origin}: finetuning_type freeze and quantization_bit exclude each other")
    layers = keys.get("freeze_trainable_layers")
    k = 2 if layers is None else layers
    if not isinstance(k, int) or k < 1:
        raise UserError(f"{keys.origin}: freeze_trainable_layers must be a positive number of last layers, got {k!r}")
    # only blocks that train are checkpointed (model/model_utils/checkpointing.py), and only they are upcast
    trained = None if keys.flag("pure_bf16") else "fp32"
    spread = "true" if keys.flag("use_llama_pro") else None  # the places of added blocks (scripts/llama_pro.py)
    return "top_k", {"k": k, "trained_dtype": trained, "spread": spread, "checkpoint_frozen": "false"}


def _oft(keys: Keys, bits: int, saved: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """OFT; its layers are those of `lora_target`: nobody reads `oft_target` (`_setup_lora_tuning`)."""
    if bits == 8:
        raise UserError(f"{keys.origin}: OFT on an 8-bit base is not modelled; use quantization_bit: 4")
    keys.refuse("oft_rank", "a number of blocks is not modelled from a config; give oft_block_size")
    options = {
        "block_size": keys.count("oft_block_size", 32), "targets": _targets(keys, "lora_target"),
        "modules_to_save": saved,
    }  # fmt: skip
    if bits == 4:
        return "qoft", {**options, "double_quant": None if keys.flag("double_quantization", True) else "false"}
    return "oft", options


def _full(keys: Keys) -> tuple[str, dict[str, Any]]:
    for a, b in (("use_galore", "use_badam"), ("use_galore", "use_apollo"), ("use_apollo", "use_badam")):
        keys.exclude(a, b)
    for name in PROJECTING:
        if keys.flag(f"use_{name}"):
            if keys.values.get("optim") in OTHER_GALORES:
                keys.differ(GALORES_ADAMW, "optim")
            named = _targets(keys, f"{name}_target")
            every = named == ("all-linear",) or {"mlp", "self_attn"} <= set(named)  # parts of paths, not whole names
            factors = keys.text("apollo_scale_type") if name == "apollo" else None
            options = {"r": keys.count(f"{name}_rank", 16), "targets": () if every else named}
            return name, {**options, "update_proj_gap": keys.get(f"{name}_update_interval"), "scale_type": factors}
    if keys.flag("use_badam"):
        keys.differ(EMPTIED, "use_badam")
        if clips(keys):
            keys.differ(OLD_CLIP, "use_badam")
        return "badam", {"interval": keys.count("badam_switch_interval", 50), "checkpoint_frozen": "false"}
    return "full", {}


def frozen(keys: Keys) -> tuple[str, ...]:
    """The parts of a vision-language model that do not train: both, by default (model_utils/visual.py)."""
    return tuple(part for part, key in TOWER.items() if keys.flag(key, True))


def _targets(keys: Keys, key: str) -> tuple[str, ...]:
    names = keys.names(key)
    return ("all-linear",) if names in ((), ("all",)) else names
