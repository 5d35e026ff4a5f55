"""What a training config trains for: an objective and its reference, by the keys that only its trainer has."""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from ..errors import UserError
from .axolotl_kernels import asked_attention
from .fields import SDPA_FOR_FLEX, no_sft
from .keys import NOTHING, Keys
from .packing import flattens

# Of DPOConfig's `loss_type`, all of which differ from sigmoid in a few calls on one number a pair (dpo_trainer.py)
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# Keys of TRL's trainers on preferences that others lack (dpo_config.py; orpo, cpo, kto and reward_config.py)
OF_KTO = ("desirable_weight", "undesirable_weight")
KTO_LOSSES = ("kto", "apo_zero_unpaired")  # (kto_config.py)
WITH_KL = "KTO's loss, with the forward pass on other completions that apo_zero_unpaired leaves out"  # `calculate_KL`
SIMPO_LOSSES = ("simpo", "alphapo")  # (cpo_config.py)
LIKELY = "with the likelihood of chosen sequences, which a cpo_alpha of 0 leaves out"
OF_CPO = ("cpo_alpha", "simpo_gamma")
OF_REWARD = ("center_rewards_coefficient",)
OF_GRPO = ("num_generations", "max_completion_length", "use_vllm", "scale_rewards", "epsilon", "reward_funcs")
OF_OLDER = "max_completion_length"  # DPO's, KTO's and CPO's key for encoder-decoder models, and ORPO's to this day
OPEN_GRPO = "a GRPO step: the file does not say whether GRPO or a trainer of preferences reads it"
OF_PPO = (  # ppo_config.py
    "response_length", "num_ppo_epochs", "num_mini_batches", "total_episodes", "vf_coef", "cliprange",
    "cliprange_value", "kl_coef", "kl_estimator", "whiten_rewards", "missing_eos_penalty", "lam", "gamma",
    "local_rollout_forward_batch_size", "stop_token", "stop_token_id", "num_sample_generations", "temperature",
    "sft_model_path", "model_adapter_name", "ref_adapter_name", "ds3_gather_for_generation",
)  # fmt: skip
OUTSIDE = "the training step alone, without generation and rewards"
UNCORRECTED = "without the forward pass that corrects for vLLM's log-probabilities"  # beside generation
UNFUSED_LOSS = "the logits in memory, without Liger's fused loss"
# What Axolotl runs in the place of TRL's own (loaders/patch_manager.py, `_apply_trl_trainer_utils_patches`)
NOT_TRITONS = "PyTorch's log-probabilities and entropies, not Axolotl's Triton kernels of them"
OF_PREFERENCES = (
    "beta", "max_prompt_length", "precompute_ref_log_probs", "precompute_ref_batch_size", "ref_model", "loss_weights",
    "label_smoothing", "f_divergence_type", "use_weighting", "sync_ref_model", "ld_alpha", "rpo_alpha",
)  # fmt: skip
DENSE = "a dense batch, not one without padding"
INSTEAD = {  # what only some of them ask for, and what is answered instead
    "use_weighting": "without WPO's weights", "sync_ref_model": "a reference that stays as it is",
    "ld_alpha": "without weights by length", "rpo_alpha": "without the likelihood of chosen sequences",
    "padding_free": DENSE, "use_logits_to_keep": "logits of all tokens",
    "loss_weights": "one loss",
}  # fmt: skip
NEWER_DPO = "DPO as TRL 1.8 runs it, entropy and accuracy of the logits too, not as the older one that the file is for"
EMPTIED = "the allocator's cache is never emptied; Axolotl's DPO does it after every micro-batch"  # dpo/trainer.py
EMPTIED_TWICE = "the allocator's cache is never emptied; Axolotl's EBFT does it on both sides of a forward pass"
# `output_hidden_states` of `_compute_block_rewards`, which accelerate's wrapper of the model puts in fp32, too
NOT_KEPT = "the frozen network's logits alone; Axolotl's EBFT has it return what lies between its blocks, too"
# `create_ref_model`: what does not train stays in the dtype of its checkpoint, or in the bits that a key names
REFERENCE_IN_FP32 = "a reference in fp32 like what trains, not in 16 bit as LLaMA-Factory loads it"
AS_ONE = "a reference that FSDP gathers as a whole, as TRL has it, not block by block as LLaMA-Factory does"
IN_16_BIT = "a reference that is not quantised"
# Of a model that has adapters already, as Axolotl hands it to this trainer (grpo_trainer.py, `add_adapter("ref", ...)`)
COPIED = "a reference without adapters, not with the copy of them that TRL keeps as it"
# `create_model_from_path` of trl/trainer/utils.py, to which no `model_init_kwargs` of Axolotl's come
BY_TRL = "a reference in {} with {}, not in fp32 with sdpa as TRL loads the one that it makes"
PREFERENCES = ("dpo", "kto", "orpo", "cpo", "simpo", "reward")
BY_PLACE = (*PREFERENCES, "grpo", "rloo", "ppo", "prm", "sft")  # of examples: a folder or a file for each
# Trainers whose steps are none of these (trl/experimental)
OF_OTHERS = ("bco", "gkd", "gold", "minillm", "nash_md", "online_dpo", "xpo")
OF_RLOO = ("normalize_advantages", "reward_clip_range")  # (rloo_config.py)
NOT_RLOO = "GRPO's loss and advantages, not RLOO's"
COMPLETION = {"grpo": 512, "rloo": 512}  # tokens, since TRL 1.10 (grpo_config.py); Axolotl is beside 1.8
DIVERGENCE = {"rloo": 0.05}  # weights by default (rloo_config.py)


def of_trl(keys: Keys) -> dict[str, Any]:
    """Objective and reference of a config of TRL's trainers, as fields of a setup; empty for SFT.

    A file does not name its trainer. Where its keys leave it open, its name says it, and of keys that several trainers
    have its folder, too; without a word, what has keys of preferences is taken for DPO's.

    Raises:
        UserError: the name of a trainer whose step is not modelled.
    """
    file = re.sub("_?config_?", "", (keys.place or ("",))[-1].lower().partition(".")[0])
    if file in OF_OTHERS:
        raise no_sft(keys, f"a step of TRL's {file} trainer, which the file's name says,", "rename it")
    words = keys.values.get("loss_type")
    losses = [word for word in (words if isinstance(words, list) else [words]) if isinstance(word, str)]
    asked = [key for key in OF_PREFERENCES if _has(keys, key)]
    by_name, place = trainer_named(keys.place[-1:]), trainer_named(keys.place)
    folder = place if place in PREFERENCES else None
    if any(_has(keys, key) for key in OF_KTO) or set(losses) & set(KTO_LOSSES):
        return preference(keys, "kto")
    simple = set(losses) & set(SIMPO_LOSSES)
    if any(_has(keys, key) for key in OF_CPO) or simple:
        return preference(keys, "simpo" if simple else "cpo")
    if any(_has(keys, key) for key in OF_REWARD):
        return preference(keys, "reward")
    of_grpo = [key for key in OF_GRPO if key in keys.values]
    if of_grpo == [OF_OLDER]:  # of preference trainers, too, as they once were
        of_grpo = [] if folder or set(losses) & set(DPO_LOSSES) else of_grpo
        if of_grpo:
            keys.differ(OPEN_GRPO, OF_OLDER)
    of_rloo = [key for key in OF_RLOO if key in keys.values]
    if of_grpo or of_rloo or by_name in COMPLETION:
        name = "rloo" if of_rloo or place == "rloo" else "grpo"
        if name == "rloo":
            keys.differ(NOT_RLOO, *of_rloo)
        prompt = keys.count("max_prompt_length", 512)
        return grpo(keys, keys, prompt, adapters=keys.flag("use_peft"), name=name)
    if any(key in keys.values for key in OF_PPO[:7]) or by_name == "ppo":
        return _ppo(keys)
    if by_name == "prm":
        return {"objective": "prm"}
    if _has(keys, "reward_model_path"):
        raise UserError(f"{keys.origin}: reward_model_path: an RL step is not modelled")
    if not (asked or set(losses) & set(DPO_LOSSES) or by_name in PREFERENCES):
        return {}
    name = folder or "dpo"
    if folder is None and not losses:
        keys.differ("a DPO step: the file does not say whether DPO, KTO, ORPO or CPO reads it", *asked[:1])
    found = preference(keys, name)
    if name == "dpo" and _has(keys, "max_prompt_length"):  # which TRL's DPOConfig has no more
        keys.differ(NEWER_DPO, "max_prompt_length")
    return found


def trainer_named(place: Sequence[str]) -> str | None:
    """The trainer that a path names, its file before its folders: dpo_config.yaml, recipes/dpo/config.yaml."""
    *folders, file = place or ("",)
    words = (word for word in re.split("[^a-z]+", file.lower()) if word in BY_PLACE)
    return next(chain(words, (part for part in reversed(folders) if part in BY_PLACE)), None)


def preference(keys: Keys, name: str) -> dict[str, Any]:
    """An objective with what its keys ask for."""
    keys.used.update((*OF_KTO, *OF_CPO, *OF_REWARD, *OF_PREFERENCES, OF_OLDER))
    found: dict[str, Any] = {"objective": name}
    if name in ("dpo", "kto") and keys.flag("precompute_ref_log_probs"):
        found["reference"] = "precomputed"
    for key, instead in INSTEAD.items():
        if keys.get(key) not in (None, False, [], [1.0]) and (key, keys.get(key)) != ("ld_alpha", 1.0):
            keys.differ(instead, key)
    if keys.values.get("disable_dropout") is False:  # on by default, but for GRPO
        keys.differ("without dropout", "disable_dropout")
    words = keys.get("loss_type")
    if name in ("cpo", "simpo") and (keys.number("cpo_alpha", 1.0) == 0 or words == "alphapo"):
        keys.differ(LIKELY, "loss_type" if words == "alphapo" else "cpo_alpha")
    if name == "kto" and words == "apo_zero_unpaired":
        keys.differ(WITH_KL, "loss_type")
    if name == "dpo" and words not in (None, "sigmoid", ["sigmoid"]):
        keys.differ("DPO's sigmoid loss", "loss_type")
    return found


def grpo(keys: Keys, options: Keys, prompt: int, *, adapters: bool, name: str = "") -> dict[str, Any]:
    """GRPO's training step; with a weight of the divergence there is a reference.

    Args:
        options: the keys of GRPOConfig.
        prompt: tokens of a prompt.
        name: of TRL's trainer, whose defaults count.
    """
    keys.used.update((*OF_GRPO, *OF_RLOO, *OF_PREFERENCES))
    keys.differ(OUTSIDE, *[key for key in OF_GRPO if key in keys.values][:1])
    if "max_prompt_length" not in keys:
        keys.differ(f"prompts of {prompt} tokens, of which no key says how long they are")
    if options.flag("use_vllm") and options.flag("vllm_importance_sampling_correction", True):
        keys.differ(UNCORRECTED, "use_vllm")
    if options.flag("use_liger_loss"):  # Axolotl's name of `use_liger_kernel`
        keys.differ(UNFUSED_LOSS, "use_liger_loss")
    if options.flag("disable_dropout"):
        keys.differ("with dropout", "disable_dropout")
    if options.get("loss_type") not in (None, "dapo"):
        keys.differ("GRPO's loss as dapo has it", "loss_type")
    completion = options.count("max_completion_length", COMPLETION.get(name, 256))
    found: dict[str, Any] = {"objective": "grpo", "prompt": prompt, "seq": prompt + completion}
    if options.number("beta", DIVERGENCE.get(name, 0.0)):
        if options.flag("sync_ref_model"):
            keys.differ(INSTEAD["sync_ref_model"], *_set(keys, "sync_ref_model"))
        found["reference"] = "adapter-off" if adapters else "model"
    return found


def _ppo(keys: Keys) -> dict[str, Any]:
    """PPO's training step: generation and scores are outside of it, and so is how often a batch is gone over.

    PPOTrainer makes an accelerator of its own, which `bf16` does not reach, and its loop never switches checkpoints on.
    """
    keys.used.update(OF_PPO)
    keys.differ(OUTSIDE, *[key for key in OF_PPO if key in keys.values][:1])
    keys.differ("prompts of 512 tokens, the longest that TRL's example keeps")
    keys.differ("a value and a reward model as large as the policy", *_set(keys, "reward_model_path"))
    ignored = _set(keys, "bf16", "fp16", "gradient_checkpointing")
    if ignored:
        keys.differ("no autocast and no checkpoints: PPOTrainer switches neither on", *ignored)
    rows = {"prompt": 512, "seq": 512 + keys.count("response_length", 53)}
    return {"objective": "ppo", **rows, "amp": None, "checkpoint": "none"}


def _set(keys: Keys, *names: str) -> list[str]:
    return [name for name in names if keys.values.get(name) not in NOTHING]


def of_axolotl(keys: Keys) -> dict[str, Any]:
    """Objective and reference of an Axolotl file (core/builders/rl.py); empty for SFT.

    Raises:
        UserError: an objective that is not modelled.
    """
    word = keys.text("rl")
    if keys.flag("reward_model"):
        return preference(keys, "reward")
    if keys.flag("process_reward_model"):
        return {"objective": "prm"}
    if word is None:
        return {}
    if word == "ipo":
        keys.differ("DPO's sigmoid loss", "rl")
    adapted = keys.text("adapter") is not None
    strided = _section(keys, "ebft") if word == "ebft" else {}
    if strided.get("mode") == "strided":
        return _strided(keys, Keys(strided, f"{keys.origin}: ebft"), adapters=adapted)
    keys.differ(NOT_TRITONS, "rl")
    if word in ("grpo", "gdpo", "ebft"):
        if word == "ebft" and not adapted:
            keys.differ("without the frozen network that rewards come from", "ebft")
        section = {key: value for key, value in _section(keys, "trl").items() if value is not None}
        options = Keys({"beta": keys.get("rl_beta"), **section}, f"{keys.origin}: trl")
        if flattens(keys, asked_attention(keys)) and (
            options.flag("async_prefetch") or options.flag("use_data_producer")
        ):
            keys.differ(DENSE, "batch_flattening")
        found = grpo(keys, options, keys.count("sequence_len", 512), adapters=adapted)
        if found.get("reference") == "adapter-off" and not keys.names("lora_target_parameters"):
            keys.differ(COPIED, "rl")
        return found
    name = {"ipo": "dpo"}.get(word, word)
    if name not in ("dpo", "kto", "orpo", "simpo"):
        raise no_sft(keys, f"rl {word!r}", "remove rl")
    found = preference(keys, name)
    if name != "dpo":  # whose trainer alone is told of a reference (core/builders/rl.py)
        found.pop("reference", None)
    elif keys.flag("rl_adapter_ref_model"):
        found["reference"] = "model"
    _differ_in_dpo(keys, name)
    return found


def makes_reference(objective: dict[str, Any], *, adapted: bool) -> bool:
    """Whether TRL's trainer makes a reference by itself, as Axolotl hands in that of DPO alone.

    Args:
        objective: fields of a setup, by `of_axolotl`.
    """
    name = objective.get("objective")
    return not adapted and (name == "kto" or (name, objective.get("reference")) == ("grpo", "model"))


def _differ_in_dpo(keys: Keys, name: str) -> None:
    """Say what else Axolotl's DPO does, by itself or by keys of its own (core/trainers/dpo)."""
    if name == "dpo":
        keys.differ(EMPTIED, "rl")
    for key in ("use_weighting", "padding_free", "use_logits_to_keep"):
        if keys.flag(f"dpo_{key}"):
            keys.differ(INSTEAD[key], f"dpo_{key}")
    if keys.flag("dpo_use_liger_kernel"):
        keys.differ(UNFUSED_LOSS, "dpo_use_liger_kernel")
    if keys.get("dpo_loss_type") not in (None, "sigmoid", ["sigmoid"]):
        keys.differ("DPO's sigmoid loss", "dpo_loss_type")


def _section(keys: Keys, name: str) -> dict[str, Any]:
    section = keys.get(name) or {}
    if not isinstance(section, dict):
        raise keys.wrong(name, "a mapping")
    return section


def _strided(keys: Keys, options: Keys, *, adapters: bool) -> dict[str, Any]:
    """EBFT's step on rollouts at places along documents (core/trainers/ebft/strided.py).

    Raises:
        UserError: documents too short for a block.
    """
    seq, generated = keys.count("sequence_len", 512), options.count("generate_max_len", 8)
    blocks = (seq - generated - options.count("context_length", 8)) // options.count("stride", 8) + 1
    if blocks < 1:
        raise UserError(f"{keys.origin}: sequence_len {seq} has no room for a block of ebft; give more")
    keys.differ(OUTSIDE, "rl")
    keys.differ(SDPA_FOR_FLEX, "ebft")
    keys.differ(EMPTIED_TWICE, "ebft")
    keys.differ(NOT_KEPT, "ebft")
    if adapters:
        keys.differ("all rollouts of a document in one pass, not one after another", "ebft")
    if options.number("ce_coef"):
        keys.differ("without the cross entropy of given tokens", "ebft")
    if "min_completion_prefix" in options:
        keys.differ("blocks along whole documents, not along completions alone", "ebft")
    if keys.flag("torch_compile"):
        keys.differ("without torch.compile", "torch_compile")
    rollouts = keys.count("micro_batch_size", 1) * options.count("n_samples_per_prompt", 4)
    rows = {"batch": rollouts, "prompt": seq, "seq": seq + blocks * generated}
    # (`check_ebft_gradient_checkpointing_reentrant` of utils/schemas/validation.py)
    flex = asked_attention(keys) == "flex_attention" and keys.values.get("gradient_checkpointing")
    return {"objective": "ebft", **rows, "compile": "none", **({"checkpoint": "block-reentrant"} if flex else {})}


def of_llama_factory(keys: Keys) -> dict[str, Any]:
    """Objective of a LLaMA-Factory file (train/{dpo,kto,rm}); empty for SFT and pretraining.

    Raises:
        UserError: a stage that is not modelled.
    """
    stage = keys.text("stage", "sft")
    if stage == "sft" and keys.flag("use_asft_loss"):
        return _asft(keys)
    if stage in ("sft", "pt"):
        return {}
    losses = {"orpo": "orpo", "simpo": "simpo"}
    name = losses.get(str(keys.get("pref_loss")), "dpo") if stage == "dpo" else {"rm": "reward"}.get(str(stage), stage)
    if name == "ppo":
        raise UserError(
            f"{keys.origin}: stage 'ppo' is not modelled: it trains a value head on the policy itself (TRL 0.9); "
            "--objective ppo answers for TRL's own trainer, with a value model beside the policy"
        )
    if name not in PREFERENCES:
        raise no_sft(keys, f"stage {stage!r}", "use stage: sft or pt")
    keys.differ(f"{name}'s step as TRL's trainer runs it, not LLaMA-Factory's own form of it", "stage")
    if keys.get("pref_ftx"):
        keys.differ("without the likelihood of chosen sequences", "pref_ftx")
    if name not in ("dpo", "kto"):
        return {"objective": name}
    _differ_in_reference(keys)
    return {"objective": name, **({"reference": "model"} if keys.get("ref_model") is not None else {})}


def _differ_in_reference(keys: Keys) -> None:
    """Say how LLaMA-Factory loads a reference (trainer_utils.py, `create_ref_model`)."""
    if keys.get("ref_model") is not None and _has(keys, "ref_model_quantization_bit"):
        keys.differ(IN_16_BIT, "ref_model_quantization_bit")
    elif keys.text("finetuning_type") == "full" and not _set(keys, "pure_bf16", "use_badam"):
        keys.differ(REFERENCE_IN_FP32)


def cut_otherwise(setup: Mapping[str, Any], method: str | None) -> list[str]:
    """What is said of LLaMA-Factory's reference on several GPUs (train/dpo/trainer.py, by `fsdp2_prepare_model`)."""
    own = setup.get("reference") == "model" or method in (None, "full")
    return [AS_ONE] if setup["parallel"] == "fsdp2" and setup.get("objective") in ("dpo", "kto") and own else []


def _asft(keys: Keys) -> dict[str, Any]:
    """ASFT's step; without a `ref_model` the reference is the model itself, loaded again.

    Raises:
        UserError: adapters, for which LLaMA-Factory makes no reference (trainer_utils.py, `create_ref_model`).
    """
    keys.used.add("asft_alpha")
    named = keys.text("ref_model") is not None
    if keys.text("finetuning_type", "lora") == "lora" and not named:
        raise UserError(f"{keys.origin}: use_asft_loss: LLaMA-Factory makes no reference for lora; give ref_model")
    _differ_in_reference(keys)
    return {"objective": "asft", "reference": "model"}


def _has(keys: Keys, key: str) -> bool:
    return keys.values.get(key) not in (None, "", [], {})
