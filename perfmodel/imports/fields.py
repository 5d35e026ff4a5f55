"""What the tools share: Transformers' names of optimizers and attentions, and LoRA's flavours as methods."""

import re
from pathlib import Path
from typing import Any

from .. import optimizers
from ..errors import UserError
from ..resources import is_file, read_json
from .keys import Keys

# transformers/training_args.py, OptimizerNames; bitsandbytes' names with and without "bnb" mean the same
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_hf": "adamw-loop", "adamw_torch_fused": "adamw-fused", "adamw_anyprecision": "adamw",
    "adamw_apex_fused": "adamw-fused", "adamw_bnb_8bit": "adamw-8bit", "adamw_8bit": "adamw-8bit",
    "paged_adamw_8bit": "paged-adamw-8bit", "paged_adamw_32bit": "paged-adamw", "paged_adamw": "paged-adamw",
    "adafactor": "adafactor", "lion_32bit": "lion", "lion_8bit": "lion-8bit", "sgd": "sgd",
}  # fmt: skip
ATTENTION = {
    "eager": "eager", "sdpa": "sdpa", "flash_attention_2": "flash2", "kernels-community/flash-attn2": "flash2",
    "kernels-community/flash-attn": "flash2",
}  # fmt: skip
COMPILE = {
    "default": "default", "reduce-overhead": "reduce-overhead", "max-autotune-no-cudagraphs": "default",
    "max-autotune": "reduce-overhead",
}  # fmt: skip
OFFLOADS = ("offload_optimizer", "offload_param")
ONE_GPU = ("fsdp", "fsdp_config", "tensor_parallel_size", "context_parallel_size", "ddp_timeout")


def engine(keys: Keys) -> tuple[str, list[str]]:
    """The setup's engine that `deepspeed` asks for, and what to say about it.

    The key holds DeepSpeed's config, or the path of one; of a file that is not here the name says the stage, as in
    DeepSpeed's and the tools' examples (zero3.json, ds_z3_offload_config.json).
    """
    value = keys.get("deepspeed")
    if value is None:
        return "torch", []
    if isinstance(value, str) and is_file(value):
        value = read_json(Path(value))
    if isinstance(value, dict):
        zero = value.get("zero_optimization")
        zero = zero if isinstance(zero, dict) else {}
        stage, offloads = zero.get("stage"), any(_offloads(zero.get(key)) for key in OFFLOADS)
    elif isinstance(value, str):
        name = Path(value).name.lower()
        found = re.search(r"z(?:ero)?[-_]?(?:stage)?[-_]?([0-3])", name)
        stage, offloads = int(found[1]) if found else None, "offload" in name
    else:
        raise keys.wrong("deepspeed", "a path or a mapping")
    if stage == 3 and not offloads:
        return "deepspeed-zero3", ["deepspeed: ZeRO-3 on one GPU is modelled"]
    what = "its config" if stage is None else f"ZeRO-{stage}{' with offloading' if offloads else ''}"
    return "torch", [f"deepspeed: {what} is not modelled, only ZeRO-3 without offloading: a step without an engine"]


def _offloads(section: Any) -> bool:
    return isinstance(section, dict) and section.get("device", "none") != "none"


def optimizer_name(keys: Keys, key: str, default: str) -> str:
    """The setup's name of a Transformers optimizer.

    Raises:
        UserError: an optimizer that is not modelled.
    """
    name: str = keys.one_of(key, OPTIMIZERS, default)
    if name not in optimizers.optimizer_names():
        raise UserError(f"{keys.origin}: {key} {keys.get(key)!r} is not modelled; use {key}: adamw_torch")
    return name


def clips(keys: Keys, key: str = "max_grad_norm", default: float = 1.0) -> bool:
    """Whether gradients are clipped: Transformers' norm is 1.0 unless it is 0."""
    return keys.number(key, default) > 0


def checkpoint_kind(keys: Keys, on: bool) -> str:
    """The kind of activation checkpointing, where it is on: Transformers' default is not reentrant any more."""
    kwargs = keys.get("gradient_checkpointing_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise keys.wrong("gradient_checkpointing_kwargs", "a mapping")
    return ("block-reentrant" if kwargs.get("use_reentrant", False) else "block") if on else "none"


def compiled(keys: Keys) -> str:
    """The setup's `compile`: a backend or a mode switches it on (`TrainingArguments.__post_init__`).

    Raises:
        UserError: a backend or a mode that is not modelled.
    """
    backend = keys.one_of("torch_compile_backend", {"inductor": True}, None)
    mode = keys.one_of("torch_compile_mode", COMPILE, None)
    asked = keys.get("torch_compile") == "auto" or keys.flag("torch_compile")  # Axolotl's auto: where it can
    return mode or "default" if asked or backend or mode else "none"


def half(keys: Keys) -> str | None:
    """The 16-bit dtype that `bf16` and `fp16` ask for."""
    keys.exclude("bf16", "fp16")
    on = {key: keys.get(key) in (True, "auto", "full", "true") for key in ("bf16", "fp16")}
    return "bf16" if on["bf16"] else "fp16" if on["fp16"] else None


def spec(name: str, **options: Any) -> str:
    """A method as `predict` takes it; empty options are left out."""
    parts = []
    for key, value in options.items():
        if value in (None, (), "", False):
            continue
        text = "+".join(map(str, value)) if isinstance(value, tuple) else value
        parts.append(f"{key}={'true' if value is True else text}")
    return name + (":" + ",".join(parts) if parts else "")


def flavour(keys: Keys, *, four_bit: bool, dora: bool, rslora: bool, pissa: bool, plus: bool) -> str:
    """The method that LoRA's flags make of it.

    Raises:
        UserError: flags that are not modelled together.
    """
    on = [name for name, flag in (("dora", dora), ("rslora", rslora), ("pissa", pissa), ("loraplus", plus)) if flag]
    if four_bit:
        if set(on) - {"rslora", "pissa"}:
            raise UserError(f"{keys.origin}: a 4-bit base with {on[0]} is not modelled; leave one of them out")
        return "qlora"
    if len(on) > 1 and set(on) != {"rslora", "pissa"}:
        raise UserError(f"{keys.origin}: {' and '.join(on)} together are not modelled; choose one")
    return on[0] if on else "lora"
