"""What the tools share: Transformers' names of optimizers and attentions, and LoRA's flavours as methods."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .. import optimizers
from ..errors import UserError
from ..setup import PAIRS
from .forms import AskedForm, accumulation, form_of, fsdp_options, zero_of
from .keys import NOTHING, Keys

# transformers/training_args.py, OptimizerNames; bitsandbytes' names with and without "bnb" mean the same
OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_hf": "adamw-loop", "adamw_torch_fused": "adamw-fused",
    "adamw_apex_fused": "adamw-fused", "adamw_bnb_8bit": "adamw-8bit", "adamw_8bit": "adamw-8bit",
    "paged_adamw_8bit": "paged-adamw-8bit", "paged_adamw_32bit": "paged-adamw", "paged_adamw": "paged-adamw",
    "adafactor": "adafactor", "lion_32bit": "lion", "lion_8bit": "lion-8bit", "sgd": "sgd",
    "rmsprop": "rmsprop", "adamw_torch_8bit": "ao-adamw-8bit", "ao_adamw_8bit": "ao-adamw-8bit",
    "adamw_torch_4bit": "ao-adamw-4bit",
    "ao_adamw_fp8": "ao-adamw-fp8", "schedule_free_adamw": "schedule-free-adamw", "muon": "muon",
}  # fmt: skip
# Names of transformers' and Axolotl's whose program is not modelled (training_args.py; axolotl/utils/schemas/enums.py)
OTHER_OPTIMIZERS = frozenset((
    "adamw_torch_npu_fused", "adamw_torch_xla", "adamw_anyprecision", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "adagrad", "rmsprop_bnb",
    "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo",
    "grokadamw", "schedule_free_radam", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
    "optimi_adamw", "ao_adamw_4bit", "adopt_adamw", "came_pytorch", "dion", "sinkgd", "flash_adamw", "flash_adam",
    "flash_sgd", "flash_sgdw", "flash_lion", "q_galore_adamw8bit",
))  # fmt: skip
DECAYING = ("adamw", "adamw-loop", "schedule-free-adamw")  # whose update has weight decay as a pass of its own
DECAYED = "AdamW with weight decay, one pass over the weights more"
# Tokens of a step above which that pass is less than a hundredth of it: of GPT-2 to an 8B model, in bf16 and fp32, on
# an H100, A100, L40S and RTX 4090 it is one at 2,000 to 20,000
HIDING_DECAY = 20_000
UNDECAYED = ("sgd", "rmsprop", "adafactor")  # whose update has no weight decay here
NO_DECAY = "without weight decay"
BEYOND = {  # by `optim_args`: what is off by default in PyTorch and torchao
    "sgd": ("momentum", "nesterov", "weight_decay"), "rmsprop": ("momentum", "centered", "weight_decay"),
    **dict.fromkeys(("ao-adamw-8bit", "ao-adamw-4bit", "ao-adamw-fp8"), ("bf16_stochastic_round", "block_size")),
}  # fmt: skip
OFF = ("0", "0.0", "false", "no", "none")
BLOCK = "256"  # values of states to a scale, by transformers and by torchao's AdamWFp8
EMBEDDING_STATES = "states of the embedding in fp32, as transformers keeps them, not in 8 bit"
FLASH = {
    "flash_attention_2": "flash2", "flash_attention_3": "flash2", "kernels-community/flash-attn2": "flash2",
    "kernels-community/flash-attn": "flash2", "kernels-community/flash-attn3": "flash2",
    "kernels-community/vllm-flash-attn3": "flash2", "flash_attention_4": "flash2",
    "kernels-community/flash-attn4": "flash2",
}  # fmt: skip
ATTENTION = {"eager": "eager", "sdpa": "sdpa", **FLASH}
FLEX = {"flex_attention": "sdpa"}
SDPA_FOR_FLEX = "sdpa, not flex attention"
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
COMPILE = {
    "default": "default", "reduce-overhead": "reduce-overhead", "max-autotune-no-cudagraphs": "default",
    "max-autotune": "reduce-overhead",
}  # fmt: skip
ACROSS_SAMPLES = "attention across packed samples"
NOT_FP8 = "products in bf16, not in fp8"
NOT_QAT = "without fake quantisation"
NOT_TUNED = "products on cuBLAS, not on the fastest of several kernels"  # Inductor's `max_autotune`
FLASH_2_FOR_3, FLASH_2_FOR_4 = "flash-attn 2, not 3", "flash-attn 2, not 4"
ONE_GPU = "one GPU"  # what is said of a program of several begins with it
UNDER_ZERO_3 = f"{ONE_GPU} under ZeRO-3"
# What the scaler of losses under fp16 does (torch/amp/grad_scaler.py): another pass over all gradients, and a sync
UNSCALED = "gradients neither scaled nor checked for infinities, which fp16 asks for"
TOGETHER_IN_ZERO = f"{UNDER_ZERO_3}, weights updated together, not in sub-groups"
ALL_OF_LIGER = "all of Liger's kernels"
ALL_FUSED = "fused kernels for all adapters"
FUSES = ("lora", "rslora", "loraplus", "pissa", "qlora")  # methods that have Axolotl's and Unsloth's kernels here
ON_GPTQ = "a base in codes of {} bits, {} in a group, on gptqmodel's kernels that train (auto_trainable)"
CASTING = ("sft", "dpo", "kto", "reward", "grpo")  # objectives whose trainers cast adapters beside a base in few bits
# Models whose repositories bring code of their own beside transformers' (`auto_map` of their config.json), and those
# of them in whose code experts are linear layers
OWN_CODE = re.compile(
    r"falcon-?(7|40|180)b|phi-?3(\.5)?-|phi-?4-mini|mimo-?7b|mpt-?(7|30)b|glm-4-9b(-chat(-1m)?)?$|nemotron-(h|nano)-",
    re.IGNORECASE,
)
OWN_EXPERTS = re.compile(
    r"kimi-?linear|deepseek-?v2|deepseek-?v3(?!\.2)|jamba-?v0\.1|minimax-?m2|trinity-|nemotron-3-", re.IGNORECASE
)
PLAIN_CODE = "transformers' own code of the model"
PLAIN_EXPERTS = f"{PLAIN_CODE}, whose experts are stacked"
STACKED = f"{PLAIN_EXPERTS} and stay in 16 bit"
ONE_RATE = "adapters updated as one group, not as LoRA+'s two"
TORCHS_FUSED = "PyTorch's fused AdamW, with moments in the dtype of the weights, not apex's, whose are in fp32"
TORCHS_MUON = "PyTorch's Muon, with AdamW for what is no matrix of a block"


def engine(keys: Keys, *, zero3: bool = True) -> str:
    """The setup's engine that `deepspeed` asks for; PyTorch in its place if not `zero3`."""
    zero = zero_of(keys)
    if zero is None:
        return "torch"
    if zero.stage == 3 and not zero.offloads and zero3:
        keys.differ(TOGETHER_IN_ZERO if zero.grouped and zero.config is None else UNDER_ZERO_3, "deepspeed")
        return "deepspeed-zero3"
    what = "DeepSpeed" if zero.stage is None else f"ZeRO-{zero.stage}{' with offloading' if zero.offloads else ''}"
    keys.differ(f"{ONE_GPU}, without {what}", "deepspeed")
    return "torch"


def asks_for_fsdp(keys: Keys) -> bool:
    """Whether `fsdp` switches FSDP on."""
    return keys.get("fsdp") not in NOTHING


def form_of_arguments(keys: Keys) -> AskedForm:
    """The form that transformers' TrainingArguments ask for (training_args.py, `_process_fsdp_args`).

    There `fsdp_config` is nothing without `fsdp`, and what offloads is its `cpu_offload`, not accelerate's key.

    Raises:
        UserError: as of `form_of`.
    """
    options = fsdp_options(keys) if asks_for_fsdp(keys) else {}
    options.pop("offload_params", None)
    return form_of(keys.but(fsdp_config=options))


def fsdp(keys: Keys, *, by_config: bool = False) -> bool:
    """Say that FSDP is left out, where a file asks for it; returns whether it checkpoints blocks by itself.

    Args:
        by_config: whether `fsdp_config` alone asks for it, with accelerate's names of its options.
    """
    asked = [key for key in ("fsdp", "fsdp_config") if keys.get(key) not in NOTHING]
    asked = asked if by_config or asks_for_fsdp(keys) else []
    options = fsdp_options(keys) if asked else {}
    if asked:
        offloads = options.get("offload_params" if by_config else "cpu_offload")
        keys.differ(f"{ONE_GPU}, without FSDP{' and its offloading' if offloads else ''}", *asked)
    return bool(options.get("activation_checkpointing"))


def with_fsdps(kind: str, by_fsdp: bool) -> str:
    """The checkpoints of a step of which FSDP wraps the blocks by itself, where the trainer does not."""
    return "block" if by_fsdp and kind == "none" else kind


def without_tf32(keys: Keys, compile: str, *, products: bool) -> None:
    """Say that products of fp32 run without TF32, where it is asked for, or switched on beside a compiled model.

    That switch is of `TrainingArguments.__post_init__`, under its ninth heading, where no key speaks of TF32.

    Args:
        products: whether there are any of fp32.
    """
    named = keys.get("tf32")
    if not products:
        return
    if compile != "none" if named is None else keys.flag("tf32"):
        keys.differ("fp32 products without TF32", "torch_compile" if named is None else "tf32")


def no_sft(keys: Keys, asked: str, instead: str) -> UserError:
    """The complaint about an objective that is not modelled."""
    return UserError(f"{keys.origin}: {asked} is not modelled: it is no SFT step; for its SFT part {instead}")


def optimizer_name(keys: Keys, key: str, default: str) -> str:
    """The setup's name of a Transformers optimizer.

    Raises:
        UserError: an optimizer that is not modelled.
    """
    word = keys.text(key)
    name: str | None = None if word in OTHER_OPTIMIZERS else keys.one_of(key, OPTIMIZERS, default)
    if name not in optimizers.optimizer_names():
        raise UserError(f"{keys.origin}: {key} {word!r} is not modelled; use {key}: adamw_torch")
    if name == "muon":
        keys.differ(TORCHS_MUON, key)
    if word == "adamw_apex_fused":
        keys.differ(TORCHS_FUSED, key)
    if name in UNDECAYED and keys.number("weight_decay"):
        keys.differ(NO_DECAY, "weight_decay")
    return _with_arguments(keys, name) if name in BEYOND else name


def in_8_bit(optimizer: str) -> bool:
    """Whether an optimizer has bitsandbytes' states in 8 bit, where transformers leaves those of embeddings in fp32."""
    return optimizer.removeprefix("paged-") in ("adamw-8bit", "lion-8bit")


def names_embedding(copied: Iterable[str]) -> bool:
    """Whether an embedding is among modules, by the names that models have for it: embed_tokens, wte and the like."""
    return any("embed" in name or "wte" in name for name in copied)


def _with_arguments(keys: Keys, name: str) -> str:
    """The optimizer that `optim_args` makes of SGD, RMSprop or torchao's AdamW (transformers/trainer_optimizer.py)."""
    given = keys.values.get("optim_args")
    pairs = given.replace(" ", "").split(",") if isinstance(given, str) else []
    options = given if isinstance(given, dict) else dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    on = [option for option in BEYOND[name] if str(options.get(option, 0)).lower() not in (*OFF, BLOCK)]
    if name == "sgd" and "momentum" in on:
        name, on = "sgd-momentum", [option for option in on if option != "momentum"]
    if on:
        keys.differ(f"{name} without {' and '.join(on)}", "optim_args")
    return name


def accumulated(keys: Keys) -> int:
    """Micro-batches of a step: where that is one, accelerate's part may name more.

    Raises:
        UserError: both do, where transformers' trainer ends (`create_accelerator_and_postprocess`), or a value of the
            wrong type.
    """
    given, named = keys.count("gradient_accumulation_steps", 1), accumulation(keys).get("num_steps")
    if named is None:
        return given
    if given > 1:
        raise UserError(
            f"{keys.origin}: gradient_accumulation_steps and num_steps of accelerator_config exclude each other: leave "
            "one of them out"
        )
    keys.used.add("accelerator_config")
    return Keys({"num_steps": named}, f"{keys.origin}: accelerator_config").count("num_steps", 1)


def own_code(keys: Keys, key: str, *, in_few_bits: bool) -> None:
    """Say it where `trust_remote_code` takes the code of the model's repository, which is never run here.

    Args:
        key: that names the model.
        in_few_bits: whether bitsandbytes makes 4 or 8 bits of its linear layers.
    """
    if not keys.values.get("trust_remote_code"):
        return
    model = str(keys.get(key))
    if OWN_EXPERTS.search(model):
        keys.differ(STACKED if in_few_bits else PLAIN_EXPERTS, "trust_remote_code")
    elif OWN_CODE.search(model):
        keys.differ(PLAIN_CODE, "trust_remote_code")


def low_bits(keys: Keys) -> int | None:
    """Bits of bitsandbytes' base weights that `load_in_4bit` or `load_in_8bit` asks for, None if neither does."""
    keys.exclude("load_in_4bit", "load_in_8bit")
    eight = keys.flag("load_in_8bit")
    return 4 if keys.flag("load_in_4bit") else 8 if eight else None


def without_cache(keys: Keys, checkpoint: str) -> None:
    """Say that no cache of keys and values is filled in training, where transformers' trainer is asked for one.

    Its copies of both are held until backward; blocks that are checkpointed have none (modeling_layers.py).
    """
    if keys.flag("use_cache") and checkpoint == "none":
        keys.differ("without a cache of keys and values", "use_cache")


def dtype_in_trl(bits: int | None, objective: str) -> str | None:
    """The dtype that TRL's trainers give to adapters beside a base of 4 or 8 bits; None: PEFT's own.

    Source: trl/trainer/{sft,dpo,kto,reward,grpo}_trainer.py, `_is_quantized_model`.
    """
    return "bf16" if bits is not None and objective in CASTING else None


def attention(keys: Keys, key: str, choices: Mapping[str, str], default: str = "sdpa") -> str:
    """The setup's name of an implementation of attention, which may end in @revision; flash-attn 3 and 4 are answered
    as 2."""
    word, _, _ = (keys.text(key) or "").partition("@")
    found: str = keys.but(**{key: word}).one_of(key, choices, default)
    for version, said in (("3", FLASH_2_FOR_3), ("4", FLASH_2_FOR_4)):
        if found == "flash2" and version in word:
            keys.differ(said, key)
    return found


def by_length(keys: Keys) -> bool:
    """Whether samples of similar length share a micro-batch: transformers' sampler, by its newer name or the older."""
    return keys.get("train_sampling_strategy") == "group_by_length" or keys.flag("group_by_length")


def undecayed(keys: Keys, setup: Mapping[str, Any]) -> None:
    """Say that full tuning's AdamW has weight decay, where the file has none, as by default (training_args.py).

    One in ten of the passes over all weights; in a fused kernel, in few adapters and in a long step it is nothing.
    """
    rows = setup["batch"] * setup["grad_accum"] * (2 if setup.get("objective") in PAIRS else 1)
    hidden = rows * setup.get("seq", 1) > HIDING_DECAY
    decays = setup["optimizer"] in DECAYING and setup["engine"] == "torch" and not hidden
    if decays and not keys.number("weight_decay"):
        keys.differ(DECAYED, *(["weight_decay"] if "weight_decay" in keys else []))


def clips(keys: Keys) -> bool:
    """Whether gradients are clipped: Transformers' norm is 1.0 unless it is 0."""
    return keys.number("max_grad_norm", 1.0) > 0


def checkpoint_kind(keys: Keys, on: bool, options: str = "gradient_checkpointing_kwargs") -> str:
    """The kind of activation checkpointing, where it is on: Transformers' default is not reentrant any more."""
    kwargs = keys.get(options) or {}
    if not isinstance(kwargs, dict):
        raise keys.wrong(options, "a mapping")
    return ("block-reentrant" if kwargs.get("use_reentrant", False) else "block") if on else "none"


def compiled(keys: Keys, *, by_mode: bool = True) -> str:
    """The setup's `compile`.

    Args:
        by_mode: whether a backend or a mode alone switches it on, as in `TrainingArguments.__post_init__`.

    Raises:
        UserError: a backend or a mode that is not modelled.
    """
    backend = keys.one_of("torch_compile_backend", {"inductor": True}, None)
    mode = keys.one_of("torch_compile_mode", COMPILE, None)
    asked = keys.get("torch_compile") == "auto" or keys.flag("torch_compile")  # Axolotl's auto: where it can
    if not asked and not (by_mode and (backend or mode)):
        return "none"
    if str(keys.get("torch_compile_mode")).startswith("max-autotune"):
        keys.differ(NOT_TUNED, "torch_compile_mode")
    return mode or "default"


def float8(keys: Keys, recipe: str, compile: str) -> str:
    """The setup's `fp8`: the recipe with which a tool's `fp8` converts linear layers.

    Args:
        compile: the setup's, beside which float8 products are not modelled.
    """
    if not keys.flag("fp8"):
        return "none"
    if compile != "none":
        keys.differ(NOT_FP8, "fp8")
        return "none"
    return recipe


def unscaled(setup: Mapping[str, Any]) -> list[str]:
    """What is said of a step under fp16, which no form of it scales."""
    return [UNSCALED] if setup.get("amp") == "fp16" else []


def half(keys: Keys, both: str | None = None) -> str | None:
    """The 16-bit dtype that `bf16` and `fp16` ask for.

    Args:
        both: what a tool takes where they both do; None: they exclude each other.
    """
    if both is None:
        keys.exclude("bf16", "fp16")
    on = {key: keys.get(key) in ("auto", "full") or keys.flag(key) for key in ("bf16", "fp16")}
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


def power_iterations(method: str, start: Any) -> int | None:
    """PiSSA's `niter`, of peft's `init_lora_weights` as pissa_niter_16; None for a whole SVD, and other methods."""
    found = re.fullmatch(r"pissa_niter_(\d+)", str(start))
    return int(found[1]) if found and method == "pissa" else None


def flavour(keys: Keys, *, bits: int | None, dora: bool, rslora: bool, pissa: bool, plus: bool) -> str:
    """The method that LoRA's flags make of it, on base weights of 4 or 8 bits or on plain ones.

    rsLoRA is another constant beside all of them.

    Raises:
        UserError: flags that are not modelled together.
    """
    on = [name for name, flag in (("dora", dora), ("pissa", pissa)) if flag]
    if bits is not None and dora:
        raise UserError(f"{keys.origin}: dora on {bits}-bit weights is not modelled; leave one of them out")
    if len(on) > 1:
        raise UserError(f"{keys.origin}: {' and '.join(on)} together are not modelled; choose one")
    if plus and (on or bits is not None):
        keys.differ(ONE_RATE)
    if bits is not None:
        return {4: "qlora", 8: "lora_8bit"}[bits]
    return on[0] if on else "loraplus" if plus else "rslora" if rslora else "lora"


def unknown_to(parallel: str) -> tuple[str, ...]:
    """Fields of a setup that a form has not: DeepSpeed exchanges as its stage does, only FSDP casts to reduce, and only
    FSDP2 has units to choose.
    """
    each = ("sync_each_batch",) if parallel.startswith("zero") else ()
    units = () if parallel == "fsdp2" else ("fsdp_units",)
    return (*units, *each) if parallel.startswith("fsdp") else ("reduce_dtype", *units, *each)
