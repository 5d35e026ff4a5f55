"""What objectives add to a step, in sums that hold for any model."""

import re
from typing import Any

import numpy as np
import pytest
from helpers import by_phase, step_of, total

from perfmodel import UserError, advise, compare, objectives, predict, sweep
from perfmodel.prediction import memory
from perfmodel.recording.record import held_bytes
from perfmodel.setup import OBJECTIVES, PAIRS, Setup
from perfmodel.tracing.setups import check_setup

LORA = "lora:r=4"
ON_PAIRS = {"batch": 2, "seq": 33}


def test_every_objective_has_a_file_and_a_name() -> None:
    """A choice of `--objective` without a program would end in a traceback."""
    assert set(objectives.known_objectives()) == set(OBJECTIVES)
    for name, found in objectives.known_objectives().items():
        assert found.name == name
        assert found.title
        assert found.source


@pytest.mark.parametrize("objective", PAIRS)
def test_a_sample_of_pairs_is_two_sequences(objective: str) -> None:
    """Tokens a second would be off by two."""
    assert (
        Setup(batch=3, seq=5, grad_accum=2, objective=objective).tokens
        == 2 * Setup(batch=3, seq=5, grad_accum=2).tokens
    )


def test_backward_of_a_preference_step_is_that_of_twice_the_batch() -> None:
    """The reference has none; the logits' gradient comes another way, but through the same products."""
    pairs = by_phase(step_of("llama", LORA, objective="dpo", **ON_PAIRS))
    twice = by_phase(step_of("llama", LORA, batch=4, seq=33))
    assert pairs["backward"] == twice["backward"]


def test_a_reference_costs_a_forward_pass() -> None:
    """Full fine-tuning: two of the same; adapters: one of the model without them, which computes as full does."""
    once = by_phase(step_of("llama", "full", batch=4, seq=33))["forward"]
    assert by_phase(step_of("llama", "full", objective="dpo", **ON_PAIRS))["forward"] == 2 * once
    adapted = by_phase(step_of("llama", LORA, batch=4, seq=33))["forward"]
    assert by_phase(step_of("llama", LORA, objective="dpo", **ON_PAIRS))["forward"] == once + adapted
    before = step_of("llama", LORA, objective="dpo", reference="precomputed", **ON_PAIRS)
    assert by_phase(before)["forward"] == adapted


def test_kto_goes_through_both_models_twice() -> None:
    """The sequences, and mismatched ones for the divergence."""
    once, adapted = (by_phase(step_of("llama", m, batch=4, seq=33))["forward"] for m in ("full", LORA))
    assert by_phase(step_of("llama", LORA, objective="kto", batch=4, seq=33))["forward"] == 2 * (once + adapted)


def test_a_reference_model_is_memory_and_no_parameter_of_the_model() -> None:
    """It neither trains nor counts, but it lies there."""
    sft, dpo = (step_of("llama", "full", objective=name, **ON_PAIRS) for name in ("sft", "dpo"))
    assert dpo.weight_bytes == 2 * sft.weight_bytes
    assert (dpo.total, dpo.trainable, dpo.state_bytes) == (sft.total, sft.trainable, sft.state_bytes)
    off, apart = (step_of("llama", LORA, objective="dpo", reference=r, **ON_PAIRS) for r in ("auto", "model"))
    assert apart.weight_bytes == off.weight_bytes + sft.weight_bytes
    assert memory.peak_bytes(apart) == memory.peak_bytes(off) + sft.weight_bytes


def test_ppo_holds_four_models_of_which_two_train() -> None:
    """Adapters train on the policy alone: the value model keeps its gradients and optimizer states, whatever trains."""
    full, lora = (step_of("llama", method, objective="ppo", grad_accum=2, **ON_PAIRS) for method in ("full", LORA))
    sft = step_of("llama", "full", **ON_PAIRS)
    headless = sft.weight_bytes - 2 * 128 * 64 + 2 * 64  # a row of scores in the place of a vocabulary
    assert full.weight_bytes == 2 * (sft.weight_bytes + headless)
    assert full.trainable == full.total == sft.total + headless // 2
    assert lora.trainable > headless // 2
    assert by_phase(full)["forward"] < 4 * by_phase(sft)["forward"]
    assert held_bytes(full) == 4 * 2 * 2 * 16 * 128  # fp32 logits of what both micro-batches' samples generated
    assert not by_phase(full)["optimizer"]
    assert not any(op.name.startswith("linalg_vector_norm") for _, op, _ in full.ops())


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in ("reward", "prm")])
def test_further_micro_batches_repeat_the_first(objective: str) -> None:
    """A reference that is made anew would be counted again."""
    one, three = (step_of("llama", "full", objective=objective, grad_accum=n, **ON_PAIRS) for n in (1, 3))
    assert three.weight_bytes == one.weight_bytes
    assert by_phase(three)["forward"] == 3 * by_phase(one)["forward"]


def test_a_reward_model_has_no_vocabulary_at_its_end() -> None:
    """The head is one row: a model of a large vocabulary loses a good part of its products."""
    reward, sft = (step_of("llama", "full", objective=name, batch=2, seq=33) for name in ("reward", "sft"))
    assert total(reward) < 2 * total(sft)
    assert not any(op.outputs and op.outputs[0].shape[-1:] == (128,) for _, op, _ in reward.ops() if op.name == "mm")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_grid_gives_what_its_points_give(objective: str) -> None:
    """Loops over rows and chunks split a grid; put together it must be the points."""
    batch, seq = np.array([1, 2, 2, 3]), np.array([33, 64, 65, 300])
    found = predict("llama-3.2-1b", LORA, device="l40s", batch=batch, seq=seq, objective=objective)
    for i in range(len(batch)):
        one = predict("llama-3.2-1b", LORA, device="l40s", batch=int(batch[i]), seq=int(seq[i]), objective=objective)
        assert found.time.phases["total"][i] == pytest.approx(one.time.phases["total"], rel=1e-12)
        assert found.memory.peak[i] == one.memory.peak
        assert found.dispatches["total"][i] == one.dispatches["total"]


REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    (LORA, {"objective": "dpo", "compile": "default"}, "objective dpo with compile default is not modelled"),
    ("full", {"objective": "kto", "engine": "deepspeed-zero3"}, "objective kto with engine deepspeed-zero3"),
    ("prompt_tuning:tokens=4", {"objective": "dpo"}, "objective dpo with virtual tokens (prompt_tuning)"),
    ("full", {"objective": "dpo", "reference": "adapter-off"}, "reference adapter-off: full has no adapters"),
    ("full", {"objective": "orpo", "reference": "model"}, "reference model: orpo compares with none"),
    ("full", {"objective": "asft", "reference": "precomputed"}, "reference precomputed: asft takes more of it"),
    ("full", {"objective": "ppo", "reference": "precomputed"}, "reference precomputed: ppo compares with it"),
    ("loraplus", {"objective": "ppo"}, "objective ppo with the optimizer step of loraplus"),
    ("full", {"objective": "ppo", "amp": "bf16"}, "objective ppo under autocast with bf16 weights"),
    ("full", {"objective": "dpo", "prompt": 32}, "prompt 32: dpo has logits of prompts too"),
    ("full", {"objective": "grpo", "prompt": 64}, "prompt 64 leaves nothing of seq 64 to a completion"),
    ("full", {"objective": "dpo", "seq": 1}, "no token of seq 1 is predicted by another"),
    ("full", {"objective": "dop"}, "objective 'dop' is unknown: did you mean 'dpo'"),
    ("full", {"objective": "dpo", "reference": "none"}, "reference 'none' is unknown"),
)


@pytest.mark.parametrize(("method", "setup", "said"), REFUSED)
def test_what_does_not_go_together_is_refused_in_a_line(method: str, setup: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        predict("llama-3.2-1b", method, device="l40s", **{"seq": 64, **setup})


@pytest.mark.parametrize("objective", ["dpo", "reward", "prm", "ppo"])
def test_an_encoder_has_no_such_objective(objective: str) -> None:
    with pytest.raises(UserError, match=f"objective {objective}"):
        predict("bert-large", "full", device="l40s", seq=64, objective=objective)


def test_a_trace_knows_few_objectives() -> None:
    with pytest.raises(UserError, match="--traced cannot follow --objective kto: use sft, dpo, grpo"):
        check_setup(Setup(objective="kto"))


def test_every_question_takes_an_objective() -> None:
    """Whether LoRA pays is another question for DPO: full fine-tuning holds the model twice."""
    asked = {"device": "l40s", "seq": 64, "objective": "dpo"}
    full, lora = compare("llama-3.2-1b", ["full", "lora"], **asked).predictions
    assert full.memory.weights > 1.9 * lora.memory.weights
    assert any("a second, frozen model" in note for note in full.notes)
    assert any("the model without its adapters" in note for note in lora.notes)
    assert advise("llama-3.2-1b", "lora", methods=[], **asked).best.prediction.setup.objective == "dpo"
    (block,) = sweep("llama-3.2-1b", ["lora"], device="l40s", seq=[32, 64], objective="dpo").blocks()
    assert len(block["seq"]) == 2
