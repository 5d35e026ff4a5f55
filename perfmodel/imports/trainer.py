"""Transformers' TrainingArguments and TRL's SFTConfig and ModelConfig, as JSON or YAML."""

from typing import Any

from ..errors import UserError
from .fields import ATTENTION, ONE_GPU, checkpoint_kind, clips, compiled, engine, flavour, half, optimizer_name, spec
from .keys import Keys

MARKS = ("per_device_train_batch_size", "use_peft", "gradient_accumulation_steps", "optim", "max_length")
DTYPES = {
    "float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "auto": "bf16",
    "torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16",
}  # fmt: skip


def read(keys: Keys) -> tuple[str | None, str | None, dict[str, Any], list[str]]:
    """Model, method, setup and notes; TrainingArguments alone name neither model nor method."""
    is_trl = any(keys.get(key) is not None for key in ("use_peft", "max_length", "max_seq_length", "packing"))
    amp = half(keys)
    if amp is None and is_trl and keys.get("bf16") is None and keys.get("fp16") is None:
        amp = "bf16"  # SFTConfig's own default
    dtype = keys.one_of("dtype", DTYPES, None) or keys.one_of("torch_dtype", DTYPES, "fp32")
    keys.refuse("load_in_8bit", "8-bit base weights are not modelled; use load_in_4bit, or neither")
    runs, said = engine(keys)
    setup: dict[str, Any] = {
        "engine": runs,
        "batch": keys.count("per_device_train_batch_size", 8),
        "grad_accum": keys.count("gradient_accumulation_steps", 1),
        "dtype": dtype,
        "amp": amp if dtype in ("fp32", amp) else None,
        "optimizer": optimizer_name(keys, "optim", "adamw-fused"),
        "checkpoint": checkpoint_kind(keys, keys.flag("gradient_checkpointing", is_trl)),
        "attention": keys.one_of("attn_implementation", ATTENTION, "sdpa"),
        "compile": compiled(keys),
        "clip_grad": clips(keys),
        "kernels": "liger" if keys.flag("use_liger_kernel") else "torch",
    }
    length = keys.get("max_length") or keys.get("max_seq_length")
    if length is not None or is_trl:
        setup["seq"] = keys.count("max_length", keys.count("max_seq_length", 1024))
    notes = [*said, *(f"{key}: one GPU is modelled" for key in ONE_GPU if keys.get(key))]
    if is_trl and not keys.flag("packing"):
        notes.append("without packing most batches are shorter than max_length: give --seq the mean length")
    return keys.text("model_name_or_path"), _method(keys, is_trl), setup, notes


def _method(keys: Keys, is_trl: bool) -> str | None:
    if not keys.flag("use_peft"):
        if keys.flag("load_in_4bit"):
            raise UserError(f"{keys.origin}: load_in_4bit needs use_peft: true")
        return "full" if is_trl else None
    name = flavour(
        keys, four_bit=keys.flag("load_in_4bit"), dora=keys.flag("use_dora"), rslora=keys.flag("use_rslora"),
        pissa=False, plus=False,
    )  # fmt: skip
    return spec(
        name, r=keys.count("lora_r", 16), targets=keys.names("lora_target_modules"),
        dropout=keys.number("lora_dropout", 0.05), modules_to_save=keys.names("lora_modules_to_save"),
        double_quant=None if name != "qlora" else _double(keys),
    )  # fmt: skip


def _double(keys: Keys) -> str:
    return "true" if keys.flag("use_bnb_nested_quant") else "false"
