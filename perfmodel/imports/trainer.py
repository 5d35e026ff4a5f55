"""Transformers' TrainingArguments and TRL's SFTConfig and ModelConfig, as JSON or YAML."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from . import packing
from .fields import (
    ATTENTION,
    DTYPES,
    FLEX,
    SDPA_FOR_FLEX,
    accumulated,
    attention,
    by_length,
    checkpoint_kind,
    clips,
    compiled,
    dtype_in_trl,
    engine,
    flavour,
    fsdp,
    half,
    low_bits,
    no_sft,
    optimizer_name,
    own_code,
    spec,
    undecayed,
    with_fsdps,
    without_cache,
    without_tf32,
)
from .keys import Keys
from .mesh import UNFUSED_HEAD
from .targets import as_targets
from .trained_for import UNFUSED_LOSS, of_trl, trainer_named

MARKS = (
    "per_device_train_batch_size", "use_peft", "gradient_accumulation_steps", "optim", "max_length", "dataset_name",
    "dataset_mixture", "model_name_or_path datasets",
)  # fmt: skip
# Keys that TRL's scripts alone have, besides those of one objective (trl/scripts/utils.py, trainer/sft_config.py)
OF_SFT = (
    "max_seq_length", "packing", "packing_strategy", "eval_packing", "completion_only_loss", "assistant_only_loss",
    "dataset_text_field", "dataset_kwargs",
)  # fmt: skip
OF_TRL = (
    "use_peft", "max_length", "dataset_name", "dataset_mixture", "datasets", "dataset_config", "eos_token",
    "chat_template_path", "padding_free", "model_init_kwargs", *OF_SFT,
)  # fmt: skip
# Keys that transformers' own examples have (examples/pytorch/language-modeling/run_clm.py), beside some of those
OF_SCRIPTS = ("block_size", "dataset_config_name", "validation_split_percentage", "config_name", "max_train_samples")
OPEN = "an SFT step: no key says which of TRL's trainers reads the file (--objective)"
OF_MODEL = ("dtype", "torch_dtype", "attn_implementation")  # keys of ModelConfig that `model_init_kwargs` may hold
NO_MATTER = {"revision", "trust_remote_code", "device_map", "use_cache", "low_cpu_mem_usage"}
FUSES_HEAD = ("dpo", "kto", "grpo")  # objectives whose trainers have the fused head, too, since TRL 1.16
METRICS = "the loss alone, without the accuracy and entropy that TRL takes from the logits at every step"
LIGERS_ACCURACY = "Liger's loss alone, without the accuracy that TRL asks of it"
LOGGED = "the loss alone, without the sums of entropies and hits that TRL logs, for which the host waits"
PREPARING = ("orpo", "cpo", "simpo")  # objectives whose trainers call peft's `prepare_model_for_kbit_training`
# `clone_chat_template`: tokens that the tokenizer lacks are added, and trained (sft_trainer.py, reward_trainer.py)
OF_ANOTHER = "adapters alone; TRL trains the head too where another model's chat template has tokens that are new"
COPIES_IN_FP32 = "copies of modules in fp32; beside a base in few bits TRL casts all that trains to bf16"
NORMS_PREPARED = "norms in the dtype of the rest, not in fp32"
IN_FP32 = "weights in fp32, as transformers 4 loads them where no dtype is named, not as the checkpoint has them"
AS_CHECKPOINTS = "weights in bf16, as transformers 5 loads most checkpoints where no dtype is named (--dtype)"
OLD_CHECKPOINTS = "gradient_checkpointing"  # on in TRL's own arguments, and off where a file empties it
OF_COMPLETIONS = ("completion_only_loss", "assistant_only_loss")
ALL_LABELLED = "a loss on every token; TRL's head makes no products for those without a label"  # sft_trainer.py
TEMPLATES = (".jinja", ".j2")  # of files that are only text
WORDS = {**DTYPES, **{f"torch.{name}": dtype for name, dtype in DTYPES.items()}, "auto": "bf16"}


def read(keys: Keys) -> tuple[str | None, str | None, dict[str, Any], list[str]]:
    """Model, method, setup and notes; TrainingArguments alone name neither model nor method."""
    if keys.take("model_init_kwargs", *OF_MODEL).keys() - NO_MATTER:
        keys.differ("the model's own config", "model_init_kwargs")
    objective = of_trl(keys)
    is_trl = bool(objective) or is_of_trl(keys)
    amp = half(keys)
    if amp is None and is_trl and keys.get("bf16") is None:
        amp = "bf16"  # TRL's own default, unless it is fp16
    dtype = keys.one_of("dtype", WORDS, None) or keys.one_of("torch_dtype", WORDS, None)
    notes = [] if dtype or is_trl else [AS_CHECKPOINTS]
    dtype = dtype or _unnamed(keys, is_trl=is_trl)
    own_code(keys, "model_name_or_path", in_few_bits=low_bits(keys) is not None)
    if amp not in (None, dtype) and dtype != "fp32":
        keys.differ(f"products in {dtype}, not in {amp} under autocast")
    setup: dict[str, Any] = {
        "engine": engine(keys, zero3=not objective),
        "batch": keys.count("per_device_train_batch_size", 8),
        "grad_accum": accumulated(keys),
        "dtype": dtype,
        "amp": amp if dtype in ("fp32", amp) else None,
        "optimizer": optimizer_name(keys, "optim", "adamw-fused"),
        "checkpoint": with_fsdps(_checkpoint(keys, is_trl and not _unchecked(keys)), fsdp(keys)),
        "attention": attention(keys, "attn_implementation", {**ATTENTION, **FLEX}),
        "compile": compiled(keys),
        "clip_grad": clips(keys),
        "kernels": _kernels(keys, fused=is_trl and not objective),
    }
    if keys.get("attn_implementation") in FLEX:
        keys.differ(SDPA_FOR_FLEX, "attn_implementation")
    length = next((key for key in ("max_length", "max_seq_length", "block_size") if keys.get(key) is not None), None)
    if length is not None or is_trl:
        setup["seq"] = keys.count(length or "max_length", 1024)
    uncut = is_trl and length is None and named_none(keys.values, "max_length") and "prompt" not in objective
    if uncut:
        keys.differ(packing.NEVER_CUT, "max_length")
    setup |= objective
    if not is_trl and not objective:  # TRL's trainers hand in `use_cache=False`
        without_cache(keys, setup["checkpoint"])
    if not objective:
        _loss(keys, is_trl=is_trl, kernels=setup["kernels"])
    elif setup["kernels"] == "liger":
        keys.differ(UNFUSED_LOSS, "use_liger_kernel")
    elif objective["objective"] in FUSES_HEAD:
        keys.differ(UNFUSED_HEAD)
    in_fp32 = setup["amp"] is None and (dtype == "fp32" or keys.flag("use_peft"))
    without_tf32(keys, setup["compile"], products=in_fp32)
    template = keys.text("chat_template_path")
    if template and not template.endswith(TEMPLATES) and keys.flag("use_peft"):
        keys.differ(OF_ANOTHER, "chat_template_path")
    notes += [OPEN] if is_trl and not objective and not _names_sft(keys) else []
    if objective and keys.flag("packing"):
        keys.differ("sequences apart, not packed", "packing")
    elif "seq" in setup and not objective:
        packing.packed_by_trl(keys, setup)
    if setup.get("packing", "none") == "none":
        setup["group_by_length"] = by_length(keys)
        notes += [packing.shorter("max_length")] if is_trl and not uncut and "prompt" not in objective else []
    shared_dtype = _under_zero3(keys, setup)
    with keys.said_of_method():
        method = _method(keys, is_trl, str(objective.get("objective", "sft")), shared_dtype, amp)
    if method == "full":
        undecayed(keys, setup)
    cast = dtype_in_trl(low_bits(keys), str(objective.get("objective", "sft")))
    if cast and dtype == "fp32" and keys.names("lora_modules_to_save"):
        keys.differ(COPIES_IN_FP32, "lora_modules_to_save")
    return keys.text("model_name_or_path"), method, setup, notes


def is_of_trl(keys: Keys) -> bool:
    """Whether a file is read by a script of TRL's, not as transformers' TrainingArguments alone."""
    if any(keys.values.get(key) is not None for key in OF_SCRIPTS):
        return False
    return any(keys.get(key) is not None for key in OF_TRL)


def _names_sft(keys: Keys) -> bool:
    """Whether a file says that it is SFT's: by a key, its folder or its name."""
    losses = ("nll", "dft", "chunked_nll")
    named = any(keys.values.get(key) is not None for key in OF_SFT) or keys.values.get("loss_type") in losses
    return named or trainer_named(keys.place) == "sft"


def _unnamed(keys: Keys, *, is_trl: bool) -> str:
    """The dtype where the file names none: TRL's fp32 (model_config.py); an empty `dtype` or no TRL, the checkpoint's.

    So it is since transformers 5. The key's older name is of a TRL beside transformers 4, to which none meant fp32.
    """
    if named_none(keys.values, "dtype") or not is_trl:
        return WORDS["auto"]
    if named_none(keys.values, "torch_dtype"):
        keys.differ(IN_FP32, "torch_dtype")
    return "fp32"


def _unchecked(keys: Keys) -> bool:
    """Whether TRL's own default of checkpoints is out of force: emptied, or of a release that had none.

    It came with TRL 0.21 (https://github.com/huggingface/trl/pull/3510), which knew no `max_seq_length` any more.
    """
    return named_none(keys.values, OLD_CHECKPOINTS) or keys.get("max_seq_length") is not None


def named_none(values: Mapping[str, Any], key: str) -> bool:
    """Whether a file names a key and nothing as its value."""
    return key in values and values[key] is None


def _under_zero3(keys: Keys, setup: dict[str, Any]) -> str | None:
    """The dtype of adapters under ZeRO-3, that of the weights; makes checkpoints reentrant, too (sft_trainer.py)."""
    if setup["engine"] != "deepspeed-zero3" or not keys.flag("use_peft"):
        return None
    if setup["checkpoint"] == "block":
        setup["checkpoint"] = "block-reentrant"
    return str(setup["dtype"])


def _kernels(keys: Keys, *, fused: bool) -> str:
    """Liger's, and SFTTrainer's head, fused since TRL 1.16; while the length was called `max_seq_length` it was not."""
    liger, fused = keys.flag("use_liger_kernel"), fused and "max_seq_length" not in keys.values
    return "+".join(name for name, asked in (("liger", liger), ("trl", fused)) if asked) or "torch"


def _loss(keys: Keys, *, is_trl: bool, kernels: str) -> None:
    """Say what SFTTrainer's loss is more than what is answered (`compute_loss`).

    Raises:
        UserError: the loss of another objective.
    """
    word = keys.text("loss_type")
    if word not in (None, "nll", "dft", "chunked_nll"):
        raise no_sft(keys, f"loss_type {word!r}", "remove loss_type")
    if word == "dft":
        keys.differ("cross entropy, without DFT's weights", "loss_type")
    if kernels.endswith("trl") and (masked := [key for key in OF_COMPLETIONS if keys.flag(key)]):
        keys.differ(ALL_LABELLED, *masked)
    if is_trl:
        keys.differ(LOGGED if kernels.endswith("trl") else LIGERS_ACCURACY if kernels == "liger" else METRICS)


def _checkpoint(keys: Keys, default: bool) -> str:
    """The newer `activation_checkpointing` and the older name of the same."""
    newer, older = ([f"{kind}_checkpointing{end}" for end in ("", "_kwargs")] for kind in ("activation", "gradient"))
    switch, kwargs = (new if keys.get(new) is not None else old for new, old in zip(newer, older, strict=True))
    keys.used.update(old for old, key in zip(older, (switch, kwargs), strict=True) if key != old)
    options = keys.get(kwargs)
    for key, usual in (("every_n_layers", 1), ("offload", False)):
        if isinstance(options, dict) and options.get(key) not in (None, usual):
            keys.differ("every block checkpointed, on the GPU", kwargs)
    return checkpoint_kind(keys, keys.flag(switch, default), kwargs)


def _method(keys: Keys, is_trl: bool, objective: str, shared_dtype: str | None, amp: str | None) -> str | None:
    if not keys.flag("use_peft"):
        if bits := low_bits(keys):
            raise UserError(f"{keys.origin}: load_in_{bits}bit needs use_peft: true")
        return "full" if is_trl else None
    bits = low_bits(keys)
    name = flavour(
        keys, bits=bits, dora=keys.flag("use_dora"), rslora=keys.flag("use_rslora"),
        pissa=False, plus=False,
    )  # fmt: skip
    targets = as_targets(keys, "lora_target_modules", alone_is_regex=True)  # `ModelConfig.__post_init__` unpacks it
    return spec(
        name, r=keys.count("lora_r", 16), targets=targets,
        dropout=keys.number("lora_dropout", 0.05), modules_to_save=keys.names("lora_modules_to_save"),
        adapter_dtype=dtype_in_trl(bits, objective) or shared_dtype,
        double_quant=None if name != "qlora" else _double(keys), target_parameters=keys.names("lora_target_parameters"),
        prepared=_prepared(keys, bits, objective, amp), quant_storage=_held(keys) if name == "qlora" else None,
    )  # fmt: skip


def _prepared(keys: Keys, bits: int | None, objective: str, amp: str | None) -> bool:
    """Whether norms, embeddings and head are put in fp32 beside a base in few bits (experimental/{orpo,cpo}).

    With `bf16` beside 4 bits embeddings and head are put back, norms are not (`peft_module_casting_to_bf16`).
    """
    if bits is None or objective not in PREPARING:
        return False
    if bits == 4 and amp == "bf16":
        keys.differ(NORMS_PREPARED, "load_in_4bit")
        return False
    return True


def _held(keys: Keys) -> str | None:
    """The dtype that holds what is packed in 4 bits; bytes unless the file says otherwise."""
    found: str | None = keys.one_of("bnb_4bit_quant_storage", {"uint8": None, **DTYPES}, None)
    return found


def _double(keys: Keys) -> str:
    return "true" if keys.flag("use_bnb_nested_quant") else "false"
