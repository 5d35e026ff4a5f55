"""Axolotl's YAML (docs.axolotl.ai, config reference)."""

from typing import Any

from ..errors import UserError
from .fields import ONE_GPU, OPTIMIZERS, checkpoint_kind, clips, compiled, engine, flavour, half, optimizer_name, spec
from .keys import Keys

MARKS = ("micro_batch_size", "sequence_len", "adapter", "lora_target_linear")
FUSED = (
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "unsloth_lora_mlp",
    "unsloth_lora_qkv",
    "unsloth_lora_o",
)


def read(keys: Keys) -> tuple[str | None, str, dict[str, Any], list[str]]:
    """Model, method, setup and notes of an Axolotl file."""
    if "base_model" not in keys:
        raise UserError(f"{keys.origin}: base_model is missing; an Axolotl config names it")
    keys.exclude("load_in_4bit", "load_in_8bit")
    if keys.get("adapter"):
        keys.refuse(
            "load_in_8bit", "8-bit base weights are not modelled; use load_in_4bit with adapter: qlora, or neither"
        )
    dtype = half(keys)
    runs, said = engine(keys)
    setup: dict[str, Any] = {
        "engine": runs,
        "batch": keys.count("micro_batch_size", 1),
        "seq": keys.count("sequence_len", 512),
        "grad_accum": keys.count("gradient_accumulation_steps", 1),
        "dtype": dtype or "fp32",
        "amp": dtype,
        "optimizer": optimizer_name(keys, "optimizer", OPTIMIZERS["adamw_torch_fused"]),
        "checkpoint": checkpoint_kind(keys, keys.get("gradient_checkpointing") not in (None, False)),
        "attention": _attention(keys),
        "compile": compiled(keys),
        "clip_grad": clips(keys, "max_grad_norm", keys.number("gradient_clipping", 1.0)),
        "kernels": "liger" if _liger(keys) else "torch",
    }
    notes = [*said, *(f"{key}: one GPU is modelled" for key in ONE_GPU if keys.get(key))]
    if keys.get("sample_packing") in NOT_PACKED and not keys.flag("pad_to_sequence_len"):
        notes.append("without sample_packing most batches are shorter than sequence_len: give --seq the mean length")
    return keys.text("base_model"), _method(keys), setup, notes


NOT_PACKED = (None, False)


def _method(keys: Keys) -> str:
    adapter = keys.text("adapter")
    if adapter is None:
        return _full(keys)
    if adapter not in ("lora", "qlora"):
        raise UserError(f"{keys.origin}: adapter {adapter!r} is unknown: use lora or qlora, or leave it empty")
    four_bit = keys.flag("load_in_4bit")
    if adapter == "qlora" and not four_bit:
        raise UserError(f"{keys.origin}: adapter qlora needs load_in_4bit: true")
    name = flavour(
        keys, four_bit=four_bit, dora=keys.flag("peft_use_dora"), rslora=keys.flag("peft_use_rslora"),
        pissa="pissa" in str(keys.get("peft_init_lora_weights") or ""), plus=keys.get("loraplus_lr_ratio") is not None,
    )  # fmt: skip
    targets = ("all-linear",) if keys.flag("lora_target_linear") else keys.names("lora_target_modules")
    fused = any(keys.flag(key) for key in FUSED)
    layers = keys.get("peft_layers_to_transform") or ()
    return spec(
        name, r=keys.count("lora_r", 8), targets=targets, dropout=keys.number("lora_dropout"),
        layers=tuple(layers) if isinstance(layers, list) else layers, implementation="unsloth" if fused else None,
        modules_to_save=keys.names("lora_modules_to_save"),
    )  # fmt: skip


def _full(keys: Keys) -> str:
    if keys.get("lisa_n_layers"):
        return spec("lisa", gamma=keys.count("lisa_n_layers", 1), interval=keys.get("lisa_step_interval"))
    keys.refuse("unfrozen_parameters", "partly frozen models are not modelled from a config; use top_k, norm or bitfit")
    return "full"


def _attention(keys: Keys) -> str:
    keys.exclude("flash_attention", "eager_attention")
    implementation = keys.text("attn_implementation")
    if keys.flag("flash_attention") or implementation in ("flash_attention_2", "flash_attention_3"):
        return "flash2"
    return "eager" if keys.flag("eager_attention") or implementation == "eager" else "sdpa"


def _liger(keys: Keys) -> bool:
    plugins = keys.names("plugins")
    switches = ("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy")
    return any("liger" in p.lower() for p in plugins) and any(keys.flag(s) for s in switches)
