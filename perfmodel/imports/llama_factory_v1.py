"""LLaMA-Factory v1's YAML (v1/config/*_args.py, core/base_trainer.py, plugins/ of the project, at ff6d4d1).

The model is loaded in the dtype of its checkpoint, put in fp32 for full tuning, and trained without autocast by
PyTorch's AdamW; FSDP casts what it gathers to bf16.
"""

from dataclasses import replace
from typing import Any

from ..errors import UserError, nearest
from . import packing
from .fields import DTYPES, FLASH, TORCHS_MUON, attention, flavour, own_code, spec
from .forms import AskedForm, form_of
from .keys import NO_TRAINING, Keys
from .targets import as_targets

MARKS = ("model_class", "dist_config", "batching_strategy", "kernel_config", "peft_config", "quant_config")
ATTENTION = {"eager": "eager", "sdpa": "sdpa", **FLASH}
CHECKPOINT_DTYPE = "bf16"  # of nearly every checkpoint
OWN_LOSS = "transformers' loss once, without v1's own log-probabilities beside it"  # `compute_log_probs`
FUSED_LOSS = "Liger's fused loss, in the place of the logits and of v1's own log-probabilities"  # `require_logits`
OWN_CLIP = "gradients clipped together, not one after another in fp32 as FSDPTurbo does"  # `clip_grad_norm_`
# Of its own FSDP2 (distributed/fsdp2.py, `get_mp_policy` and `prepare_model`), where that of accelerate is modelled
BESIDE_BLOCKS = "the embedding gathered with the last norm and the head, not by itself"
NOT_LOADED = "adapters as the file describes them, not those that are loaded"  # `load_adapter`
AS_MANY = "as many micro-batches on any number of GPUs, not those of one global batch (global_batch_size)"
TOKEN_BUDGETS = ("dynamic_batching", "dynamic_padding_free")  # strategies that fill micro-batches by tokens


def read(keys: Keys) -> tuple[str | None, str, dict[str, Any], list[str]]:
    """Model, method, setup and notes of a file of LLaMA-Factory v1."""
    keys.one_of("model_class", {"llm": True}, True)
    with keys.said_of_method():
        method = _method(keys)
    own_code(keys, "model", in_few_bits=bool(keys.values.get("quant_config")))
    kernels = _section(keys, "kernel_config").get("name")
    if kernels not in (None, "auto", "liger_kernel"):
        keys.differ("without further kernels", "kernel_config")
    micro = keys.count("micro_batch_size", 1)
    strategy = keys.text("batching_strategy")
    if strategy in TOKEN_BUDGETS:
        keys.differ("micro-batches of equal length", "batching_strategy")
    setup: dict[str, Any] = {
        "batch": micro,
        "seq": keys.count("cutoff_len", 2048),
        "grad_accum": max(1, (samples(keys) or micro) // micro),
        **_precision(keys, method),
        "optimizer": _optimizer(keys),
        "checkpoint": "block" if keys.flag("enable_activation_checkpointing", True) else "none",
        "attention": attention(keys, "flash_attn", ATTENTION),
        "clip_grad": True,
        "kernels": "liger" if kernels == "liger_kernel" else "torch",
    }
    if strategy == "padding_free":
        packing.packed_flat(keys, setup, "batching_strategy")
    elif strategy == "dynamic_padding_free":
        packing.packed_full(keys, setup, "batching_strategy")
    keys.number("max_grad_norm", 1.0)
    if _dist(keys).get("name") == "fsdpturbo":
        keys.differ(OWN_CLIP)
    keys.differ("an SFT step: the file does not say whether `sft` or `dpo` reads it")
    keys.differ(FUSED_LOSS if setup["kernels"] == "liger" else OWN_LOSS)
    notes = [] if "packing" in setup else [packing.shorter("cutoff_len")]
    return keys.text("model", "Qwen/Qwen3-4B-Instruct-2507"), method, setup, notes


def samples(keys: Keys) -> int | None:
    """Samples of a step on all GPUs together, where the file says how many (core/utils/batching.py)."""
    return keys.count("global_batch_size", 1) if keys.get("global_batch_size") is not None else None


def _precision(keys: Keys, method: str) -> dict[str, str | None]:
    """The dtype of the weights, and autocast in the place of casts (v1/core/model_engine.py, `_init_model`).

    `bf16` is FSDP's dtype of computation alone, and FSDPTurbo's of the weights; DeepSpeed's own config has its dtype.
    """
    half = keys.flag("bf16", True)
    if method != "full":
        if not half:
            keys.differ("weights in the dtype of the checkpoint", "bf16")
        if "trained_dtype" not in method:
            return {"dtype": CHECKPOINT_DTYPE, "amp": None}
        keys.differ("autocast where fp32 blocks meet bf16 ones, in the place of FSDP's casts")
        return {"dtype": CHECKPOINT_DTYPE, "amp": CHECKPOINT_DTYPE}
    dist = _dist(keys)
    name = dist.get("name")
    if name == "fsdpturbo" and half:
        return {"dtype": "bf16", "amp": None}
    if (name == "fsdp2" and half) or (name == "deepspeed" and _in_bf16(keys, dist.get("config_file"))):
        keys.differ(f"autocast, in the place of {'FSDP' if name == 'fsdp2' else 'DeepSpeed'}'s casts")
        return {"dtype": "fp32", "amp": "bf16"}
    return {"dtype": "fp32", "amp": None}


def _dist(keys: Keys) -> dict[str, Any]:
    """`dist_config`, which stays unread: data/configs/ says that nothing is sharded on one GPU."""
    dist = keys.values.get("dist_config")
    return dist if isinstance(dist, dict) else {}


def form_of_llama_factory_v1(keys: Keys) -> AskedForm:
    """What several GPUs do: DDP where `dist_config` names nothing; FSDP2 casts what it gathers.

    Its loop asks neither of them to wait with gradients for the last micro-batch (core/base_trainer.py, `fit`).

    Raises:
        UserError: a name that is none of them, or a value of the wrong type.
    """
    if keys.count("cp_size", 1) > 1:
        keys.one_of("cp_mode", {"ulysses": True}, True)  # the only one that is registered (parallelization/)
    dist = Keys(_dist(keys), f"{keys.origin}: dist_config")
    name = dist.one_of("name", {name: name for name in ("fsdp2", "fsdpturbo", "deepspeed")}, None)
    several = (samples(keys) or 0) > keys.count("micro_batch_size", 1)
    setup: dict[str, Any] = {"sync_each_batch": True} if several else {}
    if name is None:
        found = form_of(keys)
        return replace(found, setup={**found.setup, **setup})
    if name == "deepspeed":
        return form_of(keys.but(deepspeed=dist.get("config_file")))
    options = {"version": 2, **dist.values}
    sharded = form_of(keys.but(fsdp_config=options))
    if name == "fsdpturbo":
        return replace(sharded, unlike=(*sharded.unlike, "FSDP2, not FSDPTurbo"))
    half, adapts = keys.flag("bf16", True), _section(keys, "peft_config").get("name") == "lora"
    unlike = (*sharded.unlike, BESIDE_BLOCKS)
    setup["fsdp_units"] = "adapters" if adapts else "blocks"
    setup |= {"amp": "bf16", "reduce_dtype": "fp32"} if half else {}
    return replace(sharded, setup=setup, unlike=unlike)


def _in_bf16(keys: Keys, config_file: Any) -> bool:
    """Whether DeepSpeed's config computes in bf16; so without a word of it (`infer_deepspeed_mixed_precision`)."""
    values = (keys.object_in(config_file) if isinstance(config_file, str) else None) or {}
    bf16, fp16 = (_section(Keys(values, str(config_file)), key).get("enabled", "auto") for key in ("bf16", "fp16"))
    return bf16 is True or (bf16 is not False and fp16 is not False)


def _section(keys: Keys, key: str) -> dict[str, Any]:
    value = keys.get(key)
    if value is not None and not isinstance(value, dict):
        raise keys.wrong(key, "a mapping")
    return value or {}


def _optimizer(keys: Keys) -> str:
    """AdamW, or what a plugin brings (v1/plugins/trainer_plugins/optimizers/optimizer.py)."""
    name = _section(keys, "optim_config").get("name")
    if name is None:
        return "adamw"
    if name != "muon":
        raise UserError(f"{keys.origin}: optim_config {name!r} is not modelled; remove optim_config for AdamW's step")
    keys.differ(TORCHS_MUON, "optim_config")
    return "muon"


def _method(keys: Keys) -> str:
    quantised = _section(keys, "quant_config")
    if quantised.get("name") == "auto" and quantised.get("quantization_bit") is None:
        quantised = {}  # then nothing is quantised (`quantization_auto`)
    if quantised and (quantised.get("name") not in ("auto", "bnb") or quantised.get("quantization_bit", 4) != 4):
        raise UserError(
            f"{keys.origin}: quant_config: quantised base weights of this kind are not modelled; use 4 bits"
        )
    options = Keys(_section(keys, "peft_config"), f"{keys.origin}: peft_config")
    kind = options.text("name")
    if quantised and kind != "lora":
        raise UserError(f"{keys.origin}: quant_config needs peft_config of the name lora")
    if "export_dir" in options:
        raise UserError(f"{keys.origin}: {NO_TRAINING}: an export")
    if kind is None:
        return "full"
    if kind == "freeze":
        for key in ("freeze_extra_modules", "freeze_trainable_modules"):
            if options.get(key) not in (None, "all", []):
                raise UserError(f"{keys.origin}: {key} is not modelled, only all of the last blocks")
        upcast = "fp32" if options.flag("cast_trainable_params_to_fp32", True) else None
        k = options.count("freeze_trainable_layers", 2)
        return spec("top_k", k=k, trained_dtype=upcast)  # transformers' own checkpoints, of frozen blocks too
    if kind != "lora":
        raise UserError(f"{keys.origin}: peft_config {kind!r} is not modelled: use lora or freeze")
    name = flavour(
        options, bits=4 if quantised else None, dora=options.flag("use_dora"), rslora=options.flag("use_rslora"),
        pissa=False, plus=False,
    )  # fmt: skip
    if "adapter_name_or_path" in options:
        keys.differ(NOT_LOADED, "peft_config")
    every = options.get("target_modules") in (None, "all")
    named = options.values.get("target_modules")
    if isinstance(named, str):  # one name, where PEFT would take a regex (plugins/model_plugins/peft.py)
        options = options.but(target_modules=[named])
    return spec(
        name, r=options.count("r", 8), targets=("all-linear",) if every else as_targets(options, "target_modules"),
        dropout=options.number("lora_dropout", 0.05), modules_to_save=options.names("modules_to_save"),
        double_quant=None if quantised.get("double_quantization", True) else "false",
        compute_dtype=_computed_in(keys, quantised) if quantised else None,
    )  # fmt: skip


def _computed_in(keys: Keys, quantised: dict[str, Any]) -> str | None:
    """What 4-bit layers compute in, None for the dtype of the others: fp16 by default (`BnbParams`), with casts around.

    Raises:
        UserError: no dtype.
    """
    word = str(quantised.get("compute_dtype", "float16"))
    if word not in DTYPES:
        raise UserError(f"{keys.origin}: quant_config: compute_dtype {word!r} is unknown: {nearest(word, DTYPES)}")
    return None if DTYPES[word] == CHECKPOINT_DTYPE else DTYPES[word]
