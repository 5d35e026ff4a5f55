"""What configs train for, as their tools' trainers understand them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from perfmodel import UserError
from perfmodel.imports import DIFFERS, read
from perfmodel.imports.mesh import UNFUSED_HEAD
from perfmodel.imports.trained_for import (
    AS_ONE,
    BY_TRL,
    COPIED,
    DENSE,
    EMPTIED,
    EMPTIED_TWICE,
    IN_16_BIT,
    LIKELY,
    NEWER_DPO,
    NOT_KEPT,
    NOT_TRITONS,
    OPEN_GRPO,
    OUTSIDE,
    REFERENCE_IN_FP32,
    UNCORRECTED,
    UNFUSED_LOSS,
    WITH_KL,
)
from perfmodel.imports.trainer import NORMS_PREPARED
from perfmodel.setup import Setup

AXOLOTL = {"base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 64, "lora_target_linear": True}
FACTORY = {"model_name_or_path": "gpt2", "cutoff_len": 64}
TRL = {"model_name_or_path": "gpt2", "max_length": 64}
OPEN = "a DPO step: the file does not say whether DPO, KTO, ORPO or CPO reads it (beta)"
CACHE = f"{EMPTIED} (rl)"
TORCHS = f"{NOT_TRITONS} (rl)"
OF_64 = "prompts of 64 tokens, of which no key says how long they are"
WITHOUT_3 = "one GPU, without ZeRO-3 (deepspeed)"
OWN = "step as TRL's trainer runs it, not LLaMA-Factory's own form of it (stage)"

# keys of a file -> objective, reference, and what stands in the first line
SAID: tuple[tuple[dict[str, Any], str, str, list[str]], ...] = (
    (AXOLOTL | {"rl": "dpo"}, "dpo", "auto", [TORCHS, CACHE]),
    (AXOLOTL | {"rl": "ipo"}, "dpo", "auto", ["DPO's sigmoid loss (rl)", TORCHS, CACHE]),
    (
        AXOLOTL | {"rl": "dpo", "dpo_loss_type": ["ipo"]}, "dpo", "auto",
        [TORCHS, CACHE, "DPO's sigmoid loss (dpo_loss_type)"],
    ),
    (
        AXOLOTL | {"rl": "dpo", "dpo_use_liger_kernel": True}, "dpo", "auto",
        [TORCHS, CACHE, f"{UNFUSED_LOSS} (dpo_use_liger_kernel)"],
    ),
    (AXOLOTL | {"rl": "kto", "kto_desirable_weight": 0.2}, "kto", "auto", [TORCHS]),
    (AXOLOTL | {"rl": "orpo", "orpo_alpha": 0.1}, "orpo", "auto", [TORCHS]),
    (AXOLOTL | {"rl": "simpo", "simpo_gamma": 0.5}, "simpo", "auto", [TORCHS]),
    (AXOLOTL | {"rl": "dpo", "adapter": "lora", "rl_adapter_ref_model": True}, "dpo", "model", [TORCHS, CACHE]),
    (AXOLOTL | {"rl": "kto", "adapter": "lora", "rl_adapter_ref_model": True}, "kto", "auto", [TORCHS]),
    (AXOLOTL | {"rl": "kto", "adapter": "lora", "precompute_ref_log_probs": True}, "kto", "auto", [TORCHS]),
    (AXOLOTL | {"rl": "dpo", "batch_flattening": True}, "dpo", "auto", [TORCHS, CACHE]),
    (AXOLOTL | {"rl": "dpo", "precompute_ref_log_probs": True}, "dpo", "precomputed", [TORCHS, CACHE]),
    (
        AXOLOTL | {"rl": "dpo", "dpo_use_weighting": True}, "dpo", "auto",
        [TORCHS, CACHE, "without WPO's weights (dpo_use_weighting)"],
    ),
    (AXOLOTL | {"reward_model": True, "num_labels": 1}, "reward", "auto", []),
    (AXOLOTL | {"process_reward_model": True, "num_labels": 2}, "prm", "auto", []),
    (AXOLOTL | {"rl": "dpo", "deepspeed": "zero3.json"}, "dpo", "auto", [TORCHS, CACHE, WITHOUT_3]),
    (AXOLOTL | {"rl": "ebft", "adapter": "lora"}, "grpo", "auto", [TORCHS, OUTSIDE, OF_64]),
    (
        AXOLOTL | {"rl": "ebft", "adapter": "lora", "trl": {"use_vllm": True, "use_liger_loss": True}}, "grpo", "auto",
        [TORCHS, OUTSIDE, OF_64, f"{UNCORRECTED} (use_vllm)", f"{UNFUSED_LOSS} (use_liger_loss)"],
    ),
    (
        AXOLOTL
        | {"rl": "grpo", "batch_flattening": True, "flash_attention": True, "trl": {"use_data_producer": True}},
        "grpo", "auto", [TORCHS, f"{DENSE} (batch_flattening)", OUTSIDE, OF_64],
    ),
    (
        AXOLOTL | {"rl": "grpo", "batch_flattening": True, "flash_attention": True}, "grpo", "auto",
        [TORCHS, OUTSIDE, OF_64],
    ),
    (
        AXOLOTL | {"rl": "ebft", "ebft": {"mode": "strided"}}, "ebft", "auto",
        [f"{OUTSIDE} (rl)", "sdpa, not flex attention (ebft)", f"{EMPTIED_TWICE} (ebft)", f"{NOT_KEPT} (ebft)"],
    ),
    (FACTORY | {"use_asft_loss": True, "finetuning_type": "full"}, "asft", "model", []),
    (FACTORY | {"stage": "dpo"}, "dpo", "auto", [f"dpo's {OWN}"]),
    (FACTORY | {"stage": "dpo", "pref_loss": "orpo"}, "orpo", "auto", [f"orpo's {OWN}"]),
    (FACTORY | {"stage": "dpo", "pref_loss": "simpo"}, "simpo", "auto", [f"simpo's {OWN}"]),
    (FACTORY | {"stage": "dpo", "ref_model": "gpt2"}, "dpo", "model", [f"dpo's {OWN}"]),
    (
        FACTORY | {"stage": "dpo", "ref_model": "gpt2", "ref_model_quantization_bit": 4}, "dpo", "model",
        [f"dpo's {OWN}", f"{IN_16_BIT} (ref_model_quantization_bit)"],
    ),
    (FACTORY | {"stage": "dpo", "ref_model_quantization_bit": 4}, "dpo", "auto", [f"dpo's {OWN}"]),
    (
        FACTORY | {"use_asft_loss": True, "ref_model": "gpt2", "ref_model_quantization_bit": 8}, "asft", "model",
        [f"{IN_16_BIT} (ref_model_quantization_bit)"],
    ),
    (FACTORY | {"stage": "kto"}, "kto", "auto", [f"kto's {OWN}"]),
    (FACTORY | {"stage": "rm"}, "reward", "auto", [f"reward's {OWN}"]),
    (TRL | {"beta": 0.1}, "dpo", "auto", [OPEN]),
    (TRL | {"beta": 0.1, "loss_type": "sigmoid"}, "dpo", "auto", []),
    (TRL | {"loss_type": "sigmoid", "max_prompt_length": 32}, "dpo", "auto", [f"{NEWER_DPO} (max_prompt_length)"]),
    (TRL | {"loss_type": ["apo_zero"]}, "dpo", "auto", ["DPO's sigmoid loss (loss_type)"]),
    (TRL | {"loss_type": "sigmoid", "precompute_ref_log_probs": True}, "dpo", "precomputed", []),
    (
        TRL | {"loss_type": "sigmoid", "disable_dropout": False}, "dpo", "auto", ["without dropout (disable_dropout)"],
    ),
    (TRL | {"loss_type": "sigmoid", "disable_dropout": True}, "dpo", "auto", []),
    (
        TRL | {"num_generations": 8, "max_prompt_length": 32, "disable_dropout": True}, "grpo", "auto",
        [f"{OUTSIDE} (num_generations)", "with dropout (disable_dropout)"],
    ),
    (TRL | {"beta": 0.1, "desirable_weight": 1.3}, "kto", "auto", []),
    (TRL | {"loss_type": "kto"}, "kto", "auto", []),
    (TRL | {"loss_type": "apo_zero_unpaired"}, "kto", "auto", [f"{WITH_KL} (loss_type)"]),
    (TRL | {"beta": 0.1, "cpo_alpha": 1.0}, "cpo", "auto", []),
    (TRL | {"beta": 0.1, "loss_type": "simpo", "simpo_gamma": 0.5}, "simpo", "auto", []),
    (TRL | {"loss_type": "simpo"}, "simpo", "auto", []),
    (TRL | {"loss_type": "simpo", "cpo_alpha": 0.0}, "simpo", "auto", [f"{LIKELY} (cpo_alpha)"]),
    (TRL | {"loss_type": "alphapo"}, "simpo", "auto", [f"{LIKELY} (loss_type)"]),
    (AXOLOTL | {"rl": "simpo", "cpo_alpha": 0}, "simpo", "auto", [TORCHS, f"{LIKELY} (cpo_alpha)"]),
    (
        TRL | {"loss_type": "apo_zero", "padding_free": True}, "dpo", "auto",
        ["a dense batch, not one without padding (padding_free)", "DPO's sigmoid loss (loss_type)"],
    ),
    (TRL | {"loss_type": "sigmoid", "packing": True}, "dpo", "auto", ["sequences apart, not packed (packing)"]),
    (TRL | {"center_rewards_coefficient": 0.01}, "reward", "auto", []),
    (TRL | {"loss_type": "sigmoid", "max_completion_length": 64}, "dpo", "auto", []),
    (
        TRL | {"max_prompt_length": 32, "max_completion_length": 32, "beta": 0.1}, "grpo", "model",
        [f"{OPEN_GRPO} (max_completion_length)", f"{OUTSIDE} (max_completion_length)"],
    ),
)  # fmt: skip


def test_a_folder_tells_whose_completions_are_cut(tmp_path: Path) -> None:
    """Trainers of preferences had the key that GRPO has, and ORPO still has it."""
    folder = tmp_path / "orpo"
    folder.mkdir()
    (folder / "config.yml").write_text(yaml.safe_dump(TRL | {"beta": 0.1, "max_completion_length": 32}))
    found = read(folder / "config.yml")
    assert found.setup["objective"] == "orpo"
    assert not any("GRPO" in said or "unknown" in said for said in found.differences)


@pytest.mark.parametrize(("values", "objective", "reference", "differs"), SAID)
def test_a_config_trains_for_what_it_says(
    tmp_path: Path, values: dict[str, Any], objective: str, reference: str, differs: list[str]
) -> None:
    """They were all answered as SFT once: a DPO step takes two or three times as long."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(values))
    found = read(path)
    assert (found.setup["objective"], found.setup.get("reference", "auto")) == (objective, reference)
    said = [line for line in found.differences if "chunked loss" not in line and line != UNFUSED_HEAD]
    assert [line for line in said if "fp32" not in line] == differs
    assert found.setup["engine"] == "torch"


@pytest.mark.parametrize(
    ("more", "reference", "told"),
    [
        ({"rl": "kto"}, "auto", True),
        ({"rl": "kto", "bf16": False}, "auto", False),
        ({"rl": "kto", "adapter": "lora"}, "auto", False),
        ({"rl": "kto", "adapter": "lora", "rl_adapter_ref_model": True}, "auto", False),
        ({"rl": "kto", "precompute_ref_log_probs": True}, "auto", True),
        ({"rl": "dpo"}, "auto", False),
        ({"rl": "dpo", "rl_adapter_ref_model": True}, "model", False),
        ({"rl": "orpo"}, "auto", False),
        ({"rl": "dpo", "adapter": "lora", "rl_adapter_ref_model": True}, "model", False),
        ({"rl": "grpo", "rl_beta": 0.01}, "model", True),
        ({"rl": "gdpo", "trl": {"beta": 0.001}}, "model", True),
        ({"rl": "grpo", "rl_beta": 0.01, "adapter": "lora"}, "adapter-off", False),
        ({"rl": "grpo"}, "auto", False),
    ],
)
def test_a_reference_that_axolotl_leaves_to_trl_is_in_fp32(
    tmp_path: Path, more: dict[str, Any], reference: str, told: bool
) -> None:
    """Its DPO alone hands a reference over, and its keys; TRL loads the others anew, in twice the bytes."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(AXOLOTL | more))
    found = read(path)
    assert found.setup.get("reference", "auto") == reference
    assert (f"{BY_TRL.format('bf16', 'sdpa')} (rl)" in found.differences) == told


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"adapter": "lora", "rl_beta": 0.01}, True),
        ({"adapter": "lora", "rl_beta": 0.01, "lora_target_parameters": ["experts.down_proj"]}, False),
        ({"adapter": "lora"}, False),
        ({"rl_beta": 0.01}, False),
    ],
)
def test_a_copy_of_adapters_as_reference_is_told(tmp_path: Path, more: dict[str, Any], told: bool) -> None:
    """TRL copies those of a model that has some, so that the reference's forward pass has their products, too."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(AXOLOTL | {"rl": "grpo"} | more))
    assert (f"{COPIED} (rl)" in read(path).differences) == told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"stage": "dpo", "finetuning_type": "full"}, True),
        (
            {"stage": "dpo", "finetuning_type": "full", "ref_model": "gpt2", "ref_model_quantization_bit": 4},
            False,  # which is told in its place
        ),
        ({"stage": "kto", "finetuning_type": "full"}, True),
        ({"use_asft_loss": True, "finetuning_type": "full"}, True),
        ({"stage": "dpo", "finetuning_type": "full", "pref_loss": "orpo"}, False),
        ({"stage": "dpo", "finetuning_type": "full", "pure_bf16": True}, False),
        ({"stage": "dpo", "finetuning_type": "full", "use_badam": True}, False),
        ({"stage": "dpo"}, False),
    ],
)
def test_a_reference_that_llama_factory_leaves_in_16_bit_is_told(
    tmp_path: Path, values: dict[str, Any], told: bool
) -> None:
    """It puts in fp32 what trains alone: a reference of 7 G parameters has 14 GB less."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(FACTORY | values))
    assert (REFERENCE_IN_FP32 in read(path).differences) == told


GRPO: tuple[tuple[dict[str, Any], str], ...] = (
    (AXOLOTL | {"rl": "grpo", "trl": {"max_completion_length": 32}}, "auto"),
    (AXOLOTL | {"rl": "gdpo", "trl": {"max_completion_length": 32, "beta": 0.01}}, "model"),
    (AXOLOTL | {"rl": "grpo", "rl_beta": 0.01, "trl": {"max_completion_length": 32}}, "model"),
    (AXOLOTL | {"rl": "grpo", "rl_beta": 0.01, "trl": {"max_completion_length": 32, "beta": 0.0}}, "auto"),
    (AXOLOTL | {"rl": "grpo", "adapter": "lora", "trl": {"max_completion_length": 32, "beta": 0.01}}, "adapter-off"),
    (TRL | {"num_generations": 8, "max_prompt_length": 64, "max_completion_length": 32}, "auto"),
    (
        TRL | {"max_prompt_length": 64, "max_completion_length": 32, "beta": 0.04, "use_peft": True, "epsilon": 0.2},
        "adapter-off",
    ),
)


@pytest.mark.parametrize(("values", "reference"), GRPO)
def test_grpos_training_step_has_prompts_and_completions(
    tmp_path: Path, values: dict[str, Any], reference: str
) -> None:
    """Only completions have logits, and generation is most of the run: both have to be said."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(values))
    found = read(path)
    assert found.first_line.removeprefix(DIFFERS).removeprefix(f"{TORCHS}; ").startswith(OUTSIDE)
    assert not any("shorter than" in note for note in found.notes)
    setup = Setup(**found.setup)
    assert (setup.objective, setup.seq, setup.prompt, setup.reference) == ("grpo", 96, 64, reference)


def test_ppos_training_step_is_what_its_trainer_does(tmp_path: Path) -> None:
    """Its trainer keeps three more models and ignores what the file says of autocast and checkpoints."""
    path = tmp_path / "config.yml"
    asked = {"response_length": 32, "num_ppo_epochs": 1, "reward_model_path": "gpt2", "bf16": True}
    path.write_text(yaml.safe_dump(TRL | asked))
    found = read(path)
    for said in (OUTSIDE, "a value and a reward model as large as the policy", "PPOTrainer switches neither on (bf16)"):
        assert said in found.first_line
    setup = Setup(**found.setup)
    assert (setup.objective, setup.seq, setup.prompt, setup.amp) == ("ppo", 544, 512, None)


@pytest.mark.parametrize(
    ("values", "method", "told"),
    [
        ({"load_in_4bit": True}, "qlora:r=16,dropout=0.05,double_quant=false", True),
        ({"load_in_4bit": True, "fp16": True}, "qlora:r=16,dropout=0.05,double_quant=false,prepared=true", False),
        ({"load_in_8bit": True}, "lora_8bit:r=16,dropout=0.05,prepared=true", False),
        ({}, "lora:r=16,dropout=0.05", False),
    ],
)
def test_trls_orpo_and_cpo_prepare_a_base_in_few_bits(
    tmp_path: Path, values: dict[str, Any], method: str, told: bool
) -> None:
    """Norms, embeddings and head become fp32; beside 4 bits and bf16 only the norms stay so."""
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(TRL | {"beta": 0.1, "cpo_alpha": 1.0, "use_peft": True} | values))
    found = read(path)
    assert (found.method, NORMS_PREPARED in found.first_line) == (method, told)


def test_the_folder_of_an_example_says_what_its_keys_leave_open(tmp_path: Path) -> None:
    """alignment-handbook keeps ORPO's recipes in a folder of that name; their keys are DPO's."""
    folder = tmp_path / "orpo"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(TRL | {"beta": 0.1, "max_prompt_length": 32}))
    found = read(folder / "config.yaml")
    assert (found.setup["objective"], found.first_line) == ("orpo", "")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (AXOLOTL | {"rl": "spin"}, "rl 'spin' is not modelled"),
        (FACTORY | {"stage": "ppo"}, "stage 'ppo' is not modelled"),
        (TRL | {"reward_model_path": "gpt2"}, "reward_model_path: an RL step is not modelled"),
    ],
)
def test_other_objectives_are_refused_by_name(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    """A step of another kind is not answered as one that is known."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=said):
        read(path)


@pytest.mark.parametrize(
    ("more", "cast"),
    [({"rl": "dpo"}, True), ({"rl": "ebft"}, True), ({"rl": "orpo"}, False), ({}, False)],
)
def test_trls_trainers_cast_adapters_beside_a_base_in_few_bits(
    tmp_path: Path, more: dict[str, Any], cast: bool
) -> None:
    """PEFT makes them fp32: twice the gradients and states, and a cast in every layer. Axolotl's SFT is not TRL's."""
    (tmp_path / "c.yml").write_text(yaml.safe_dump(AXOLOTL | {"adapter": "lora", "load_in_8bit": True} | more))
    assert ("adapter_dtype=bf16" in str(read(tmp_path / "c.yml").method)) == cast
    (tmp_path / "c.yml").write_text(yaml.safe_dump(AXOLOTL | {"adapter": "lora"} | more))
    assert "adapter_dtype" not in str(read(tmp_path / "c.yml").method)


def test_trl_under_zero3(tmp_path: Path) -> None:
    """Parameters are gathered together in one dtype, and TRL then makes the blocks' checkpoints reentrant."""
    file = tmp_path / "trl.json"
    asked = {"max_length": 64, "use_peft": True, "dtype": "bfloat16", "deepspeed": "zero3.json"}
    file.write_text(json.dumps(asked))
    found = read(file)
    assert found.setup["checkpoint"] == "block-reentrant"
    assert "adapter_dtype=bf16" in str(found.method)
    file.write_text(json.dumps(asked | {"deepspeed": None}))
    assert read(file).setup["checkpoint"] == "block"
    assert "adapter_dtype" not in str(read(file).method)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"finetuning_type": "full", "stage": "dpo"}, True),
        ({"finetuning_type": "lora", "stage": "kto"}, False),
        ({"finetuning_type": "lora", "stage": "dpo", "ref_model": "gpt2"}, True),
        ({"finetuning_type": "full", "stage": "sft", "use_asft_loss": True}, False),  # as it is cut there
    ],
)
def test_a_reference_is_cut_as_its_tool_does_it(tmp_path: Path, values: dict[str, Any], said: bool) -> None:
    """Gathered as a whole it needs far more memory than block by block; under DeepSpeed all tools have it alike."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**FACTORY, "bf16": True, **values}))
    found = read(path)
    several = {form: found.on_several(found.asks().as_typed(form)) for form in ("fsdp2", "zero3")}
    assert (AS_ONE in several["fsdp2"].differences) is said
    assert AS_ONE not in several["zero3"].differences
    assert Setup(**several["zero3"].setup, gpus=8).parallel == "zero3"
