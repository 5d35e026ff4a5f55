"""LLaMA-Factory's YAML (hparams/*_args.py of the project)."""

from typing import Any

from ..errors import UserError
from .fields import ONE_GPU, clips, compiled, engine, flavour, half, optimizer_name, spec
from .keys import Keys

MARKS = ("finetuning_type", "cutoff_len", "lora_target", "stage", "template", "dataset_dir")
ATTENTION = {"auto": "sdpa", "sdpa": "sdpa", "fa2": "flash2", "fa3": "flash2", "disabled": "eager"}


def read(keys: Keys) -> tuple[str | None, str, dict[str, Any], list[str]]:
    """Model, method, setup and notes of a LLaMA-Factory file."""
    if "model_name_or_path" not in keys:
        raise UserError(f"{keys.origin}: model_name_or_path is missing; a LLaMA-Factory config names it")
    stage = keys.text("stage", "sft")
    if stage not in ("sft", "pt"):
        raise UserError(f"{keys.origin}: stage {stage!r} is not modelled: use sft or pt")
    name, options = _method(keys)
    keys.exclude("pure_bf16", "bf16")
    keys.exclude("pure_bf16", "fp16")
    pure = keys.flag("pure_bf16")
    dtype = half(keys)
    # trainable weights are upcast to fp32 unless pure_bf16 (or BAdam) asks not to (model/adapter.py)
    upcast = not pure and name in ("full", "top_k")
    runs, said = engine(keys)
    setup: dict[str, Any] = {
        "engine": runs,
        "batch": keys.count("per_device_train_batch_size", 8),
        "seq": keys.count("cutoff_len", 2048),
        "grad_accum": keys.count("gradient_accumulation_steps", 1),
        "dtype": "bf16" if pure else "fp32" if upcast or dtype is None else dtype,
        "amp": None if pure else dtype,
        "optimizer": optimizer_name(keys, "optim", "adamw-fused"),
        "checkpoint": _checkpoint(keys),
        "attention": keys.one_of("flash_attn", ATTENTION, "sdpa"),
        "compile": compiled(keys),
        "clip_grad": clips(keys),
        "kernels": "liger" if keys.flag("enable_liger_kernel") else "torch",
    }
    notes = [*said, *(f"{key}: one GPU is modelled" for key in ONE_GPU if keys.get(key))]
    if not keys.flag("packing") and stage == "sft":
        notes.append("without packing most batches are shorter than cutoff_len: give --seq the mean length")
    return keys.text("model_name_or_path"), spec(name, **options), setup, notes


def _checkpoint(keys: Keys) -> str:
    """On by default, and reentrant by default."""
    if keys.flag("disable_gradient_checkpointing"):
        return "none"
    return "block-reentrant" if keys.flag("use_reentrant_gc", True) else "block"


def _method(keys: Keys) -> tuple[str, dict[str, Any]]:
    kind = keys.text("finetuning_type", "lora")
    bits = keys.get("quantization_bit")
    if bits is not None and str(bits) != "4":
        raise UserError(f"{keys.origin}: quantization_bit {bits!r} is not modelled: use 4, or leave it out")
    if kind == "full":
        if bits:
            raise UserError(f"{keys.origin}: finetuning_type full and quantization_bit exclude each other")
        return _full(keys)
    if kind == "freeze":
        layers = keys.get("freeze_trainable_layers")
        k = 2 if layers is None else layers
        if not isinstance(k, int) or k < 1:
            raise UserError(
                f"{keys.origin}: freeze_trainable_layers must be a positive number of last layers, got {k!r}"
            )
        return "top_k", {"k": k}
    if kind == "oft":
        return "oft", {"targets": _targets(keys, "oft_target")}
    if kind != "lora":
        raise UserError(f"{keys.origin}: finetuning_type {kind!r} is unknown: use lora, full, freeze or oft")
    name = flavour(
        keys, four_bit=bool(bits), dora=keys.flag("use_dora"), rslora=keys.flag("use_rslora"),
        pissa=keys.flag("pissa_init"), plus=keys.get("loraplus_lr_ratio") is not None,
    )  # fmt: skip
    options = {
        "r": keys.count("lora_rank", 8), "targets": _targets(keys, "lora_target"),
        "dropout": keys.number("lora_dropout"), "modules_to_save": keys.names("additional_target"),
        "implementation": "unsloth" if keys.flag("use_unsloth") else None,
    }  # fmt: skip
    return name, options


def _full(keys: Keys) -> tuple[str, dict[str, Any]]:
    keys.exclude("use_galore", "use_badam")
    if keys.flag("use_galore"):
        return "galore", {"r": keys.count("galore_rank", 16)}
    return ("badam", {}) if keys.flag("use_badam") else ("full", {})


def _targets(keys: Keys, key: str) -> tuple[str, ...]:
    names = keys.names(key)
    return ("all-linear",) if names in ((), ("all",)) else names
