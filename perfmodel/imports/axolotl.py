"""Axolotl's YAML (docs.axolotl.ai, config reference; axolotl/utils/schemas, loaders, core/builders at 067b021)."""

import re
from dataclasses import replace
from typing import Any

from ..architectures.config import KEPT_IN_MXFP4
from ..errors import UserError
from ..methods.parts.targeted import ALL_LINEAR
from . import packing
from .axolotl_kernels import (
    GEMMA_4,
    asked_attention,
    attention_of_axolotl,
    cuts_loss,
    experts_of_axolotl,
    fused_adapters,
    kernels_of_axolotl,
)
from .fields import (
    EMBEDDING_STATES,
    NOT_QAT,
    ON_GPTQ,
    OPTIMIZERS,
    STACKED,
    accumulated,
    checkpoint_kind,
    clips,
    compiled,
    dtype_in_trl,
    engine,
    flavour,
    float8,
    fsdp,
    half,
    in_8_bit,
    low_bits,
    names_embedding,
    optimizer_name,
    own_code,
    power_iterations,
    spec,
    undecayed,
)
from .forms import AskedForm, form_of
from .keys import NOTHING, Keys
from .targets import as_targets, unfrozen
from .trained_for import BY_TRL, makes_reference, of_axolotl
from .vocabulary import enlarged_by_axolotl

MARKS = ("micro_batch_size", "sequence_len", "adapter", "lora_target_linear")
# Models of which some layers stay as they are, by their names; transformers then quantises the head
# (`_set_quantization_config`; transformers/quantizers/base.py, `get_modules_to_not_convert`)
NOT_PACKED = ((r"falcon-?h1", ("qlora", "lora_8bit"), "out_proj"), ("jamba", ("lora_8bit",), "Mamba's"))
RECOMPUTED = "blocks recomputed, in the place of offloaded activations"  # beside adapters offloading stands alone
FROZEN_AGAIN = "all adapters train; Axolotl freezes again those that are not named"  # once PEFT made them (train.py)
FROM_INPUT = "backward from the lowest trained weight on, not through every block"
IN_4_BIT = re.compile(r"bnb|nf4|4-?bit", re.IGNORECASE)  # in the names of repositories
ONLY_OF_QLORA = "a base in 4 bits; Axolotl makes one for adapter: qlora alone"
OWN_CONFIG = "the model's own config, not another's"
# Keys for trainers of TRL, which checkpoint by default: so where Axolotl hands on nothing, of an emptied key
OF_TRL = ("rl", "reward_model", "process_reward_model")
AUTO = "auto"  # of bf16 and tf32: on where the card has it, by default too (utils/schemas/config.py)
OF_IMAGES = ("vision tower", "projector")
EMBEDDINGS = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
LISA_STATES = "a new optimizer at each switch of blocks; Axolotl keeps the states of all blocks drawn so far"
# Models whose embeddings and norms have names that Axolotl does not know (`get_linear_embedding_layers`, "norm")
UNNAMED = re.compile(r"gpt-?j|gpt-?2|cerebras-gpt|starcoder(?!2)|mpt-|bloom", re.IGNORECASE)
OTHER_KIND = "quantised base weights of this kind are not modelled"
QWEN_OF_2023 = re.compile(r"qwen-(1[._]8|7|14|72)b", re.IGNORECASE)  # its config.json: "use_flash_attn": "auto"
AUTO_FLASH = "PyTorch's attention and norms, not flash-attn's, which the model's own code takes where it is installed"
NOT_IN_SCHEMA = ("sharding_strategy", "backward_prefetch", "forward_prefetch", "limit_all_gathers")  # of `fsdp_config`
MASTERS = "weights kept in fp32; Axolotl keeps them in 16 bit under FSDP 2"
NO_BATCH_SIZE = "batch_size has no effect: Axolotl takes gradient_accumulation_steps for 1 where it is not there"
# Keys that have Axolotl make the optimizer, which knows no class of bitsandbytes' (core/trainers/mixins/optimizer.py)
GROUPS = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")
# Axolotl hands in an empty list where no layers are named, in the place of which PEFT puts no default
NO_LAYER = "/(?!)/"  # a regex that matches nothing
HEADS_AND_EMBEDDINGS = {"lm_head", "embed_out", "embed_tokens", "wte"}  # named, `lora_target_linear` takes them, too
NO_TARGETS = "no lora_target_modules, without which Axolotl's adapter has no layers: lora_target_linear: true takes all"
BOTH_FACTORS = "both factors of adapters trained; MiCA freezes B"
FP32_HEAD = "the output head in fp32, not in the dtype of the rest"


def read(keys: Keys) -> tuple[str | None, str, dict[str, Any], list[str]]:
    """Model, method, setup and notes of an Axolotl file."""
    if "base_model" not in keys:
        raise UserError(f"{keys.origin}: base_model is missing; an Axolotl config names it")
    adapter = keys.text("adapter")
    objective = of_axolotl(keys)
    _check(keys, adapter)
    if keys.get("base_model_config") not in (None, keys.get("base_model")):
        keys.differ(OWN_CONFIG, "base_model_config")
    dtype = _dtype(keys)
    pure = keys.get("bf16") == "full"
    linear_experts = keys.flag("llama4_linearized_experts")
    if linear_experts and "linearized" not in str(keys.get("base_model")).lower():
        keys.differ("experts as transformers runs them by default", "llama4_linearized_experts")
    amp = None if pure or (dtype == "fp16" and not keys.flag("fp16")) else dtype
    in_tf32 = keys.get("tf32") if "tf32" in keys.values else AUTO
    if in_tf32 and amp is None and (dtype is None or adapter is not None):  # PEFT's adapters are in fp32
        keys.differ("fp32 products without TF32", *(["tf32"] if "tf32" in keys else []))
    runs_on, checkpointed = engine(keys, zero3=not objective), fsdp(keys, by_config=True)
    own_code(keys, "base_model", in_few_bits=any(keys.values.get(key) for key in ("load_in_4bit", "load_in_8bit")))
    with keys.said_of_method():
        method = _method(keys, adapter, dtype or "fp32", str(objective.get("objective", "")))
    setup: dict[str, Any] = {
        "engine": runs_on,
        "batch": keys.count("micro_batch_size", 1),
        "seq": keys.count("sequence_len", 512),
        "grad_accum": _accumulated(keys),
        "dtype": dtype or "fp32",
        "amp": amp,
        "optimizer": optimizer_name(keys, "optimizer", OPTIMIZERS["adamw_torch_fused"]),
        "checkpoint": _checkpoint(keys, checkpoints=checkpointed),
        "attention": _attention(keys),
        "compile": (compile := compiled(keys, by_mode=False)),  # `_configure_torch_compile`
        "qat": _fake_quantised(keys),
        "fp8": float8(keys, "tensorwise", compile),  # `additional_accelerator_args`
        "clip_grad": clips(keys),
        "kernels": kernels_of_axolotl(keys),
        "experts": experts_of_axolotl(keys),
    }
    setup |= objective
    if method == "full":
        undecayed(keys, setup)
    enlarged_by_axolotl(keys)
    in_16_bit = "weights" if adapter is None else "copies of modules" if keys.names("lora_modules_to_save") else ""
    if in_16_bit and setup["amp"] and _in_fp32_under_fsdp(keys):
        keys.differ(f"{in_16_bit} in {dtype}, not in fp32 as FSDP keeps them")
    embeds = adapter is None or names_embedding(keys.names("lora_modules_to_save"))
    if in_8_bit(str(setup["optimizer"])) and embeds and any(keys.values.get(key) for key in GROUPS):
        keys.differ(EMBEDDING_STATES)
    above = keys.get("peft_layers_to_transform") or ()
    if adapter and above and setup["checkpoint"] == "none" and not (isinstance(above, list) and 0 in above):
        keys.differ(FROM_INPUT, "peft_layers_to_transform")  # `enable_input_require_grads` of loaders/adapter.py
    if _keeps_fp32(keys, adapter, dtype):
        keys.differ("embeddings and norms in the dtype of the rest, not in fp32")
    after = keys.values["qat"].get("fake_quant_after_n_steps") if setup["qat"] != "none" else None
    notes = [f"a step with fake quantisation; the first {after} have none"] if after else []
    if keys.get("batch_size") is not None and "gradient_accumulation_steps" not in keys.values:
        notes.append(NO_BATCH_SIZE)
    if not objective:
        packing.packed_by_axolotl(keys, setup, asked_attention(keys))
    loaded = (setup["dtype"], setup["attention"])
    if makes_reference(objective, adapted=adapter is not None) and loaded != ("fp32", "sdpa"):
        keys.differ(BY_TRL.format(*loaded), "rl")
    padded = keys.flag("pad_to_sequence_len", keys.flag("reward_model"))  # `hint_reward_model_pad`
    if setup.get("packing", "none") == "none":
        setup["group_by_length"] = keys.flag("group_by_length") and not keys.values.get("rl")  # core/builders/rl.py
        setup["padded"] = padded and setup["attention"] != "flash2"
        if padded and not setup["padded"]:
            notes.append(packing.TAKEN_OUT)
        elif not padded and "prompt" not in objective:  # of prompts the first line tells; EBFT's data sets pad
            notes.append(packing.shorter("sequence_len"))
    return keys.text("base_model"), method, setup, notes


def _check(keys: Keys, adapter: str | None) -> None:
    """Raise `UserError` where the form of the base weights is not modelled."""
    keys.exclude("load_in_4bit", "load_in_8bit")
    if not adapter:
        keys.refuse("gptq", "quantised weights cannot be trained without an adapter")
        keys.refuse("load_in_8bit", "quantised weights cannot be trained without an adapter")
    packed = keys.get("model_quantization_config") == "Mxfp4Config"
    why = f"{KEPT_IN_MXFP4}; add model_quantization_config_kwargs: {{dequantize: true}}" if packed else OTHER_KIND
    options = keys.get("model_quantization_config_kwargs")
    if isinstance(options, dict) and options.get("dequantize"):
        keys.used.add("model_quantization_config")  # a 16-bit model then
    else:
        keys.refuse("model_quantization_config", why)


def _keeps_fp32(keys: Keys, adapter: str | None, dtype: str | None) -> bool:
    """Whether embeddings and norms of a 16-bit model are upcast and stay so (`_configure_embedding_dtypes`).

    On a base in few bits PEFT upcasts them, and those that Axolotl finds by their names are cast back.
    """
    plain = asked_attention(keys) in (None, "eager", "sdpa")
    sharded = any(keys.values.get(key) for key in ("fsdp", "fsdp_config"))
    cut = cuts_loss(keys) or keys.values.get("cut_cross_entropy")
    cast_back = adapter is not None or not plain or bool(cut) or sharded
    unnamed = low_bits(keys) is not None and not sharded and UNNAMED.search(str(keys.get("base_model"))) is not None
    return dtype is not None and (unnamed or not cast_back)


def _dtype(keys: Keys) -> str | None:
    """The 16-bit dtype of the weights (`resolve_dtype`); float16 asks for it without autocast.

    Where no key names it bf16 is auto, and on: what the card of a question has not is priced all the same.
    """
    plain = "bf16" if keys.flag("bfloat16") else "fp16" if keys.flag("float16") or keys.flag("load_in_8bit") else None
    keys.flag("float32")
    if keys.values.get("bf16", AUTO) == AUTO:
        keys.used.add("bf16")
        return "fp16" if keys.flag("fp16") else "bf16"
    return half(keys, "bf16") or plain


def _in_fp32_under_fsdp(keys: Keys) -> bool:
    """Whether accelerate puts in fp32 what trains, to gather it in 16 bit: under FSDP 2 Axolotl's patch does not."""
    options = keys.values.get("fsdp_config")
    own = options if isinstance(options, dict) else {}
    versions = (keys.values.get("fsdp_version"), own.get("version"), own.get("fsdp_version"))
    return bool(options or keys.values.get("fsdp")) and "2" not in map(str, versions)


def _attention(keys: Keys) -> str:
    if (
        asked_attention(keys) is None
        and QWEN_OF_2023.search(str(keys.get("base_model")))
        and not _upcast_for_good(keys)
    ):
        keys.differ(AUTO_FLASH)
    return attention_of_axolotl(keys)


def _accumulated(keys: Keys) -> int:
    """Micro-batches of a step.

    `batch_size`, samples of a step, counts where the other key is there and empty alone: the schema's default of 1
    stands before it (`HyperparametersConfig`, `normalize_config`).
    """
    given = accumulated(keys)
    empty = "gradient_accumulation_steps" in keys.values and keys.get("gradient_accumulation_steps") is None
    if keys.get("batch_size") is None or not empty:
        return given
    return max(1, keys.count("batch_size", 1) // keys.count("micro_batch_size", 1))


def _checkpoint(keys: Keys, *, checkpoints: bool) -> str:
    """Kind of checkpointing: reentrant unless something is said of it (`normalize_config`).

    Args:
        checkpoints: whether FSDP does it.
    """
    asked = keys.get("gradient_checkpointing")
    if isinstance(asked, str):
        keys.differ("activations stay on the GPU", "gradient_checkpointing")  # the older form of activation_offloading
    if asked in (None, False):
        by_trl = asked is None and "gradient_checkpointing" in keys.values and any(map(keys.values.get, OF_TRL))
        return "block" if checkpoints or by_trl else "none"
    offloading = keys.values.get("activation_offloading")
    if offloading == "hidden_states":
        return checkpoint_kind(keys, on=True)
    if isinstance(asked, str) or offloading not in (*NOTHING, "none"):
        if not keys.values.get("adapter"):
            return "block"  # torch's wrapper of blocks (`_apply_activation_checkpointing`)
        keys.differ(RECOMPUTED, "activation_offloading" if offloading else "gradient_checkpointing")
    if GEMMA_4.search(str(keys.get("base_model"))):
        keys.used.add("gradient_checkpointing_kwargs")
        return "block"  # never reentrant, whatever is said
    plain = not keys.values.get("unfrozen_parameters") and not keys.values.get("rl")
    if keys.get("gradient_checkpointing_kwargs") is None and plain:
        return "block-reentrant"
    return checkpoint_kind(keys, on=True)


def _method(keys: Keys, adapter: str | None, dtype: str, objective: str) -> str:
    if adapter is None:
        return _full(keys)
    if adapter not in ("lora", "qlora"):
        raise UserError(f"{keys.origin}: adapter {adapter!r} is unknown: use lora or qlora, or leave it empty")
    bits = low_bits(keys)
    if adapter == "lora" and bits == 4 and not IN_4_BIT.search(str(keys.get("base_model"))):
        keys.differ(ONLY_OF_QLORA, "load_in_4bit")  # `_set_quantization_config`
    if keys.flag("gptq"):
        bits = 4
        keys.differ(ON_GPTQ.format(4, 128), "gptq")
    if keys.flag("quantize_moe_experts") and bits is None:
        raise UserError(f"{keys.origin}: quantize_moe_experts needs load_in_4bit or load_in_8bit")
    if adapter == "qlora" and bits != 4:
        raise UserError(f"{keys.origin}: adapter qlora needs load_in_4bit: true")
    name = flavour(
        keys, bits=bits, dora=keys.flag("peft_use_dora"), rslora=keys.flag("peft_use_rslora"),
        pissa="pissa" in str(keys.get("peft_init_lora_weights") or ""), plus=keys.get("loraplus_lr_ratio") is not None,
    )  # fmt: skip
    name = "lora_gptq" if keys.flag("gptq") else name
    for model, beside, left in NOT_PACKED:
        if name in beside and re.search(model, str(keys.get("base_model")), re.IGNORECASE):
            keys.differ(f"every linear layer of a block quantised, {left} too, and not the head")
    if upcast := _upcast_for_good(keys):
        keys.differ(FP32_HEAD)
    if str(keys.get("peft_init_lora_weights")).lower() == "mica":
        keys.differ(BOTH_FACTORS, "peft_init_lora_weights")
    if keys.names("unfrozen_parameters"):
        keys.differ(FROZEN_AGAIN, "unfrozen_parameters")
    linear = keys.flag("lora_target_linear")  # joined by the named ones, which are linear layers too
    named = as_targets(keys, "lora_target_modules")
    targets = (ALL_LINEAR,) if linear else named
    if linear and (no_blocks := HEADS_AND_EMBEDDINGS & {*named}):
        keys.differ(f"no adapter on {' and '.join(sorted(no_blocks))}", "lora_target_modules")
    parameters = keys.names("lora_target_parameters")
    if not (targets or parameters or keys.values.get("lora_model_dir")):
        raise UserError(f"{keys.origin}: {NO_TARGETS}")
    layers = keys.get("peft_layers_to_transform") or ()
    by_trl = objective in ("dpo", "kto")  # which makes adapters by its own default (`_load_adapters`)
    in_fp32 = (by_trl or keys.flag("peft_autocast_adapter_dtype", True)) and not _casts_adapters(keys)
    return spec(
        name, r=keys.count("lora_r", 8), targets=(NO_LAYER,) if parameters and not targets else targets,
        dropout=keys.number("lora_dropout"), layers=tuple(layers) if isinstance(layers, list) else layers,
        adapter_dtype=dtype_in_trl(bits, objective) or (None if in_fp32 else dtype),
        implementation=fused_adapters(keys, name, targets, upcast=bool(upcast)),
        niter=power_iterations(name, keys.get("peft_init_lora_weights")),
        modules_to_save=keys.names("lora_modules_to_save"),
        double_quant=_double_quant(keys) if name == "qlora" else None, prepared=upcast,
        target_parameters=parameters, experts=keys.flag("quantize_moe_experts"),
    )  # fmt: skip


def _casts_adapters(keys: Keys) -> bool:
    """Whether adapters that PEFT made in fp32 are cast to the 16-bit dtype.

    DeepSeek-V4's kernels do it (integrations/kernels/adapters/dsv4.py, `_apply_fp32_dtype_policy`), FSDP 2 beside
    weights that are torchao's (monkeypatch/accelerate/fsdp2_quantized.py, `cast_residual_fp32`), and any FSDP beside
    trainers of preferences (`ensure_dtype` of core/builders/rl.py).
    """
    sharded = keys.values.get("fsdp_config") and not _in_fp32_under_fsdp(keys)
    beside = bool(sharded) and "nvfp4" in str(keys.get("base_model")).lower()
    all_of_it = keys.values.get("rl") and any(keys.values.get(key) for key in ("fsdp", "fsdp_config"))
    return beside or bool(all_of_it or keys.values.get("use_dsv4_kernels"))


def upcasts(keys: Keys) -> bool:
    """Whether peft's `prepare_model_for_kbit_training` runs, which puts in fp32 all that is not quantised.

    It does not where a model is sharded, nor beside quantised experts (`_prepare_model_for_quantization`). Axolotl
    casts back what is called norm, embed_tokens or lm_head (`_convert_embedding_modules_dtype`).
    """
    sharded = any("FSDP" in said or "ZeRO-3" in said for said in keys.differences)
    asked = any(keys.values.get(key) for key in ("load_in_4bit", "load_in_8bit"))
    quantised = keys.values.get("quantize_moe_experts") or STACKED in keys.differences
    return asked and not sharded and not quantised


def _upcast_for_good(keys: Keys) -> bool:
    """Whether embedding and norms stay in fp32: the Qwen of 2023 calls them wte and ln_1, and RMSNorm keeps fp32.

    With an adapter `lora` Axolotl does not prepare it.
    """
    of_2023 = QWEN_OF_2023.search(str(keys.get("base_model")))
    return of_2023 is not None and keys.get("adapter") == "qlora" and upcasts(keys)


def _double_quant(keys: Keys) -> str | None:
    """Whether the scales are quantised too: so by default (`set_quantization_config`)."""
    options = keys.get("bnb_config_kwargs") or {}
    if not isinstance(options, dict):
        raise keys.wrong("bnb_config_kwargs", "a mapping")
    if set(options) - {"bnb_4bit_use_double_quant"}:
        keys.differ("a 4-bit base in Axolotl's usual form", "bnb_config_kwargs")
    return None if options.get("bnb_4bit_use_double_quant", True) else "false"


def _fake_quantised(keys: Keys) -> str:
    """The setup's `qat`; the steps before `fake_quant_after_n_steps` run without (`prepare_model_for_qat`)."""
    asked = keys.get("qat")
    if not asked:
        return "none"
    options = asked if isinstance(asked, dict) else {}
    kind, group = (options.get("activation_dtype"), options.get("weight_dtype")), options.get("group_size", 32)
    if kind != ("int8", "int4") or not isinstance(group, int) or options.get("quantize_embedding"):
        keys.differ(NOT_QAT, "qat")
        return "none"
    return f"int8-int4:{group}"


def _full(keys: Keys) -> str:
    if keys.get("lisa_n_layers") and keys.get("lisa_step_interval"):
        keys.differ(LISA_STATES, "lisa_n_layers")
        return spec("lisa", gamma=keys.count("lisa_n_layers", 1), interval=keys.get("lisa_step_interval"))
    patterns = keys.names("unfrozen_parameters")
    if not patterns:
        return "full"
    regex = unfrozen(keys, patterns)
    trained = any(re.fullmatch(regex[1:-1], name) for name in EMBEDDINGS)
    if not trained and any(name in pattern for pattern in patterns for name in ("lm_head", "embed_tokens")):
        keys.differ(FROM_INPUT, "unfrozen_parameters")  # `enable_input_require_grads` of train.py
    return spec("selected", parameters=regex)


def form_of_axolotl(keys: Keys) -> AskedForm:
    """What several GPUs do: accelerate's FSDP 1 where no version is named."""
    options = keys.values.get("fsdp_config")
    if isinstance(options, dict):  # of which its schema leaves out what it does not know (utils/schemas/fsdp.py)
        options = {key: value for key, value in options.items() if str(key).removeprefix("fsdp_") not in NOT_IN_SCHEMA}
    found = form_of(keys.but(fsdp_config=options), fsdp_version=1)
    if found.parallel != "fsdp2":
        return found
    if keys.values.get("adapter"):
        return replace(found, setup=found.setup | {"fsdp_units": "adapters"})  # its patch of `fsdp2_prepare_model`
    blocks = found.setup | {"fsdp_units": "blocks"}
    if _dtype(keys) == "bf16":  # weights are in the dtype that they are gathered in
        return replace(found, setup=blocks | {"amp": None})
    return replace(found, setup=blocks, unlike=(*found.unlike, MASTERS))


def frozen_on_request(keys: Keys) -> tuple[str, ...]:
    """The parts of a vision-language model that do not train (utils/freeze.py, `freeze_mm_modules`)."""
    return OF_IMAGES if keys.flag("freeze_mm_modules") else ()
