"""Steps of TRL's objectives on the tape against programs that run them on real tensors.

Twice: against losses in plain torch (`tests/references/reference_objectives.py`), and, where the TRL that they are
written from is installed, against TRL's own methods.
"""

from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("peft")

from reference_objectives import LOSSES as OF_TRL
from reference_objectives import Run
from reference_own_losses import OWN_LOSSES
from reference_steps import judged

LOSSES = OF_TRL | OWN_LOSSES

TRL = "1.8."  # the version that is mirrored: from 1.9 on log-probabilities are made in chunks, without logits
SETUPS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp32, one sample": {"dtype": "fp32", "batch": 1},
    "autocast, checkpoints": {"dtype": "fp32", "amp": "bf16", "checkpoint": "block"},
    "two micro-batches, eager": {"grad_accum": 2, "attention": "eager", "optimizer": "adamw-fused"},
    "more than a chunk of tokens": {"batch": 3, "seq": 33, "checkpoint": "block-reentrant"},
}
METHODS = ("full", "lora:r=4,targets=all-linear,dropout=0.1")
CASES = [(o, METHODS[(i + j) % 2], s) for i, o in enumerate(LOSSES) for j, s in enumerate(SETUPS)]
OTHERS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("dpo", "llama", "lora:r=4", {"reference": "model"}),
    ("dpo", "llama", "full", {"reference": "precomputed"}),
    ("dpo", "gpt2", "full", {}),
    ("dpo", "qwen2", "top_k:k=1", {}),
    ("dpo", "llama", "lora:r=4,layers=1-2", {}),
    ("dpo", "gpt2", "ia3", {"dtype": "fp32"}),
    ("kto", "llama", "lora:r=4", {"reference": "precomputed"}),
    ("grpo", "llama", "lora:r=4", {"reference": "adapter-off"}),
    ("grpo", "qwen2", "full", {"reference": "model", "prompt": 5}),
    ("orpo", "qwen3", "lora:r=4", {}),
    ("asft", "qwen2", "full", {"reference": "model"}),
    ("ebft", "llama", "lora:r=4", {"batch": 1, "seq": 601, "prompt": 90}),
    ("reward", "qwen2", "lora:r=4", {}),
    ("ppo", "llama", "lora:r=4", {"reference": "model"}),
    ("ppo", "qwen2", "full", {"prompt": 5, "grad_accum": 3}),
    ("ppo", "gpt_neox", "full", {}),
    ("ppo", "gemma", "top_k:k=1", {}),
    ("dpo", "starcoder2", "full", {"checkpoint": "block"}),  # its dropout is no module, which nothing switches off
    ("dpo", "seed_oss", "lora:r=4,targets=all-linear", {}),
    ("dpo", "opt", "full", {}),
    ("dpo", "gpt_bigcode", "lora:r=4", {}),
    ("grpo", "gpt2", "full", {"reference": "model", "prompt": 5}),
    ("dpo", "gpt_neo", "full", {"attention": "eager"}),
)
PEAK = 0.02  # as `counts.PEAK_TOLERANCE`


def agree(name: str, method: str, losses: Any, **setup: Any) -> None:
    found = judged(name, method, losses, **setup)
    assert found.differences == []
    assert found.flops > 0
    assert found.peak_ratio == pytest.approx(1, abs=PEAK)


@pytest.mark.parametrize(("objective", "method", "setup"), CASES)
def test_a_step_makes_the_calls_of_a_program_in_torch(objective: str, method: str, setup: str) -> None:
    """Pairs, reference, log-probabilities and what is logged: a forgotten pass is a third of the step."""
    agree("llama", method, LOSSES, objective=objective, **SETUPS[setup])


@pytest.mark.parametrize(("objective", "name", "method", "setup"), OTHERS)
def test_references_of_all_kinds_and_other_models(
    objective: str, name: str, method: str, setup: dict[str, Any]
) -> None:
    """A second model, the model without adapters, or none: they differ by gigabytes and by a forward pass."""
    agree(name, method, LOSSES, objective=objective, **setup)


def _trainer(kind: Any, run: Run, **known: Any) -> Any:
    """A trainer of TRL's of which only what its loss reads is there."""
    from accelerate import Accelerator

    trainer = kind.__new__(kind)
    reentrant = {"use_reentrant": run.setup.checkpoint == "block-reentrant"}
    trainer.__dict__ |= {
        "model": run.model, "ref_model": run.reference, "accelerator": Accelerator(cpu=True), "beta": 0.1,
        "args": SimpleNamespace(gradient_checkpointing_kwargs=reentrant, center_rewards_coefficient=None),
        "_metrics": defaultdict(lambda: defaultdict(list)), "_total_train_tokens": 0, "aux_loss_enabled": False,
        "precompute_ref_logps": run.setup.reference == "precomputed", "ld_alpha": None, "is_encoder_decoder": False,
        "f_divergence_type": "reverse_kl", "loss_types": ["sigmoid"], "loss_weights": [1.0], "use_weighting": False,
        "padding_value": 0, "pad_token_id": 0, "label_smoothing": 0.0, **known,
    }  # fmt: skip
    return trainer


def _batch(run: Run) -> dict[str, Any]:
    return {"input_ids": run.ids, "attention_mask": run.ones}


def _dpo(run: Run) -> Any:
    from trl import DPOTrainer

    batch = _batch(run) | {"completion_mask": run.ones}
    batch |= {f"ref_{kind}_logps": run.table for kind in ("chosen", "rejected")}
    return _trainer(DPOTrainer, run)._compute_loss(run.model, batch, False)


def _kto(run: Run) -> Any:
    from trl import KTOTrainer

    batch = _batch(run) | {"completion_mask": run.ones}
    batch |= {f"KL_{key}": value for key, value in batch.items()}
    samples = run.setup.batch
    batch |= {"label": [2 * i < samples for i in range(samples)]}
    batch |= dict.fromkeys(("ref_logps", "ref_KL_logps"), run.table)
    known = {"calculate_KL": True, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0}
    return _trainer(KTOTrainer, run, **known)._compute_loss(run.model, batch, False)


def _reward(run: Run) -> Any:
    from trl import RewardTrainer

    return _trainer(RewardTrainer, run).compute_loss(run.model, _batch(run))


def _in_two(kind: Any, run: Run, **known: Any) -> Any:
    keys, sides = ("input_ids", "attention_mask", "labels"), {"chosen": run.chosen, "rejected": run.rejected}
    batch = {f"{side}_{key}": x for side, tensors in sides.items() for key, x in zip(keys, tensors, strict=True)}
    return _trainer(kind, run, **known).get_batch_loss_metrics(run.model, batch)[0]


def _orpo(run: Run) -> Any:
    from trl.experimental.orpo import ORPOTrainer

    return _in_two(ORPOTrainer, run)


def _cpo(run: Run, loss_type: str = "sigmoid") -> Any:
    from trl.experimental.cpo import CPOTrainer

    return _in_two(CPOTrainer, run, loss_type=loss_type, alpha=0.0, cpo_alpha=1.0, simpo_gamma=0.5)


def _grpo(run: Run) -> Any:
    from trl import GRPOTrainer

    batch = {
        "prompt_ids": run.prompts, "prompt_mask": run.prompt_ones, "completion_ids": run.completions,
        "completion_mask": run.completion_ones, "advantages": run.advantages, "num_items_in_batch": run.tokens,
    }  # fmt: skip
    known = {
        "model_kwarg_keys": {"logits_to_keep"}, "temperature": 1.0, "_entropy_bonus_enabled": False, "beta": 0.0,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.2, "use_vllm": False,
    }  # fmt: skip
    trainer = _trainer(GRPOTrainer, run, **known)
    trainer.args.delta = None
    return trainer._compute_loss(run.model, batch)


OF_TRL = {
    "dpo": _dpo, "kto": _kto, "reward": _reward, "orpo": _orpo, "cpo": _cpo, "simpo": lambda run: _cpo(run, "simpo"),
    "grpo": _grpo,
}  # fmt: skip


def _trl_is_mirrored() -> bool:
    try:
        return version("trl").startswith(TRL)
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not _trl_is_mirrored(), reason=f"needs TRL {TRL}x")
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", OF_TRL)
def test_a_step_makes_the_calls_of_trl(objective: str, method: str, setup: str) -> None:
    """The references above are ours; this is the program that people run."""
    agree("llama", method, OF_TRL, objective=objective, **SETUPS[setup])
