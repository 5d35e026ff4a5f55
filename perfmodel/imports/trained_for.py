"""What a training config trains for: an objective and its reference, by the keys that only its trainer has."""

from typing import Any

from .fields import no_sft
from .keys import Keys

# Of DPOConfig's `loss_type`, all of which differ from sigmoid in a few calls on one number a pair (dpo_trainer.py)
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
# Keys of TRL's trainers on preferences that others lack (dpo_config.py; orpo, cpo, kto and reward_config.py)
OF_KTO = ("desirable_weight", "undesirable_weight")
OF_CPO = ("cpo_alpha", "simpo_gamma")
OF_REWARD = ("center_rewards_coefficient",)
OF_GRPO = ("num_generations", "max_completion_length", "use_vllm", "scale_rewards", "epsilon", "reward_funcs")
OUTSIDE = "the training step alone, without generation and rewards"
OF_PREFERENCES = (
    "beta", "max_prompt_length", "precompute_ref_log_probs", "precompute_ref_batch_size", "ref_model", "loss_weights",
    "label_smoothing", "f_divergence_type", "use_weighting", "sync_ref_model", "ld_alpha", "rpo_alpha",
)  # fmt: skip
INSTEAD = {  # what only some of them ask for, and what is answered instead
    "use_weighting": "without WPO's weights", "sync_ref_model": "a reference that stays as it is",
    "ld_alpha": "without weights by length", "rpo_alpha": "without the likelihood of chosen sequences",
    "padding_free": "a dense batch, not one without padding", "use_logits_to_keep": "logits of all tokens",
    "loss_weights": "one loss",
}  # fmt: skip
BY_FOLDER = ("dpo", "kto", "orpo", "cpo", "simpo", "reward")  # of examples, which keep one folder for each


def of_trl(keys: Keys) -> dict[str, Any]:
    """Objective and reference of a config of TRL's trainers, as fields of a setup; empty for SFT.

    A file does not name its trainer. Where its keys leave it open, its folder says it, or it is taken for DPO's.
    """
    words = keys.values.get("loss_type")
    losses = [words] if isinstance(words, str) else words if isinstance(words, list) else []
    asked = [key for key in OF_PREFERENCES if _has(keys, key)]
    folder = next((part for part in reversed(keys.place) if part in BY_FOLDER), None)
    if any(_has(keys, key) for key in OF_KTO):
        return preference(keys, "kto")
    if any(_has(keys, key) for key in OF_CPO):
        return preference(keys, "simpo" if "simpo" in losses else "cpo")
    if any(_has(keys, key) for key in OF_REWARD):
        return preference(keys, "reward")
    if any(key in keys.values for key in OF_GRPO):
        return grpo(keys, keys, keys.count("max_prompt_length", 512), adapters=keys.flag("use_peft"))
    if not asked and not set(losses) & set(DPO_LOSSES):
        return {}
    name = folder or "dpo"
    if folder is None and not losses:
        keys.differ("a DPO step: the file does not say whether DPO, KTO, ORPO or CPO reads it", *asked[:1])
    return preference(keys, name)


def preference(keys: Keys, name: str) -> dict[str, Any]:
    """An objective with what its keys ask for."""
    keys.used.update((*OF_KTO, *OF_CPO, *OF_REWARD, *OF_PREFERENCES))
    found: dict[str, Any] = {"objective": name}
    if name in ("dpo", "kto") and keys.flag("precompute_ref_log_probs"):
        found["reference"] = "precomputed"
    for key, instead in INSTEAD.items():
        if keys.get(key) not in (None, False, [], [1.0]) and (key, keys.get(key)) != ("ld_alpha", 1.0):
            keys.differ(instead, key)
    words = keys.get("loss_type")
    if name == "dpo" and words not in (None, "sigmoid", ["sigmoid"]):
        keys.differ("DPO's sigmoid loss", "loss_type")
    return found


def grpo(keys: Keys, options: Keys, prompt: int, *, adapters: bool) -> dict[str, Any]:
    """GRPO's training step; with a weight of the divergence there is a reference.

    Args:
        options: the keys of GRPOConfig.
        prompt: tokens of a prompt.
    """
    keys.used.update((*OF_GRPO, *OF_PREFERENCES))
    keys.differ(OUTSIDE, *[key for key in OF_GRPO if key in keys.values][:1])
    if options.get("loss_type") not in (None, "dapo"):
        keys.differ("GRPO's loss as dapo has it", "loss_type")
    completion = options.count("max_completion_length", 256)
    found: dict[str, Any] = {"objective": "grpo", "prompt": prompt, "seq": prompt + completion}
    if options.number("beta"):
        found["reference"] = "adapter-off" if adapters else "model"
    return found


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
    if word in ("grpo", "gdpo"):
        section = keys.get("trl") or {}
        if not isinstance(section, dict):
            raise keys.wrong("trl", "a mapping")
        adapted = keys.text("adapter") is not None
        return grpo(keys, Keys(section, f"{keys.origin}: trl"), keys.count("sequence_len", 512), adapters=adapted)
    name = {"ipo": "dpo"}.get(word, word)
    if name not in ("dpo", "kto", "orpo", "simpo"):
        raise no_sft(keys, f"rl {word!r}", "remove rl")
    found = preference(keys, name)
    if name in ("dpo", "kto") and keys.flag("rl_adapter_ref_model"):
        found["reference"] = "model"
    for key in ("use_weighting", "padding_free", "use_logits_to_keep"):
        if keys.flag(f"dpo_{key}"):
            keys.differ(INSTEAD[key], f"dpo_{key}")
    return found


def of_llama_factory(keys: Keys) -> dict[str, Any]:
    """Objective of a LLaMA-Factory file (train/{dpo,kto,rm}); empty for SFT and pretraining.

    Raises:
        UserError: a stage that is not modelled.
    """
    stage = keys.text("stage", "sft")
    if stage in ("sft", "pt"):
        return {}
    losses = {"orpo": "orpo", "simpo": "simpo"}
    name = losses.get(str(keys.get("pref_loss")), "dpo") if stage == "dpo" else {"rm": "reward"}.get(str(stage), stage)
    if name not in BY_FOLDER:
        raise no_sft(keys, f"stage {stage!r}", "use stage: sft or pt")
    keys.differ(f"{name}'s step as TRL's trainer runs it, not LLaMA-Factory's own form of it", "stage")
    if keys.get("pref_ftx"):
        keys.differ("without the likelihood of chosen sequences", "pref_ftx")
    if keys.get("ref_model") is not None and name in ("dpo", "kto"):
        return {"objective": name, "reference": "model"}
    return {"objective": name}


def _has(keys: Keys, key: str) -> bool:
    return keys.values.get(key) not in (None, "", [], {})
