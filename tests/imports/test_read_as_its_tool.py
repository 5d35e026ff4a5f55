"""Keys as people write them, read as the tool that they are for reads them: each was once read otherwise, silently."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from perfmodel import UserError
from perfmodel.architectures import from_config, load
from perfmodel.imports import read
from perfmodel.imports.axolotl_kernels import NO_PLUGIN
from perfmodel.imports.fallbacks import fallbacks
from perfmodel.imports.fields import ONE_RATE, SDPA_FOR_FLEX
from perfmodel.imports.mesh import UNFUSED_HEAD
from perfmodel.imports.read import Imported
from perfmodel.imports.trained_for import NOT_RLOO
from perfmodel.imports.trainer import ALL_LABELLED, OPEN

PEFTS = {"base_model_name_or_path": "gpt2"}
NAMED = {"model_name_or_path": "gpt2"}
TRL = NAMED | {"dataset_name": "x"}
ADAPTED = TRL | {"use_peft": True}
FACTORY = NAMED | {"cutoff_len": 64, "finetuning_type": "lora", "bf16": True}
ADAPTED_ALL = {"adapter": "lora", "lora_target_linear": True}
AXOLOTL = {"base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 64}
OWN_CHECKPOINTS = {"fsdp": "full_shard", "fsdp_config": {"activation_checkpointing": True}}
DEFAULTS = {"amp": "bf16", "checkpoint": "block", "seq": 1024}  # of every trainer of TRL's (trainer/base_config.py)
KIND = "an SFT step"


def found_in(folder: Path, values: dict[str, Any], name: str = "config.yaml") -> Imported:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return read(path)


@pytest.mark.parametrize(
    ("values", "setup"),
    [
        (NAMED | {"loss_type": "sigmoid", "optim": "adamw_torch"}, {"objective": "dpo", **DEFAULTS}),
        (NAMED | {"num_generations": 4, "per_device_train_batch_size": 2}, {"objective": "grpo", "amp": "bf16"}),
        (NAMED | {"completion_only_loss": True, "per_device_train_batch_size": 2}, DEFAULTS),
        (NAMED | {"datasets": [{"path": "x"}]}, DEFAULTS),
        (TRL | {"bf16": "True"}, {"amp": "bf16"}),
        (TRL | {"bf16": "no", "fp16": "yes"}, {"amp": "fp16"}),
        (TRL | {"fp16": False}, {"amp": "bf16"}),
        (TRL | {"bf16": False}, {"amp": None}),
        (TRL | {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}},
         {"dtype": "bf16", "attention": "flash2"}),
        (TRL | {"attn_implementation": "flex_attention"}, {"attention": "sdpa"}),
        (TRL | {"pad_to_multiple_of": "auto"}, {"seq": 1024}),
        (TRL | {"reward_funcs": ["x"], "max_prompt_length": 100}, {"prompt": 100, "seq": 612}),
        (TRL | {"reward_clip_range": 1.0, "max_prompt_length": 100}, {"objective": "grpo", "reference": "model"}),
        (TRL | {"max_seq_length": 64}, {"checkpoint": "none", "seq": 64}),
        (TRL | {"max_seq_length": 64, "gradient_checkpointing": True}, {"checkpoint": "block"}),
        (TRL | OWN_CHECKPOINTS | {"gradient_checkpointing": False}, {"checkpoint": "block"}),
        (TRL | {"gradient_checkpointing": False}, {"checkpoint": "none"}),
        (TRL | {"activation_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
         {"checkpoint": "block-reentrant"}),
        (TRL | {"dataset_config_name": "y", "block_size": 512}, {"amp": None, "checkpoint": "none", "seq": 512}),
        (NAMED | {"per_device_train_batch_size": 2}, {"dtype": "bf16"}),
        (NAMED | {"per_device_train_batch_size": 2, "dtype": "float32"}, {"dtype": "fp32"}),
    ],
    ids=lambda what: "-".join(map(str, what)),
)  # fmt: skip
def test_a_file_of_trl_has_trls_defaults_and_words(
    tmp_path: Path, values: dict[str, Any], setup: dict[str, Any]
) -> None:
    found = found_in(tmp_path, values)
    assert {name: found.setup.get(name) for name in setup} == setup


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (TRL | {"attn_implementation": "flex_attention"}, SDPA_FOR_FLEX),
        (TRL | {"normalize_advantages": True}, NOT_RLOO),
        (TRL | {"beta": 0.1, "loss_type": "sigmoid"}, UNFUSED_HEAD),
        (TRL | {"reward_funcs": ["x"]}, UNFUSED_HEAD),
        (TRL | {"accelerate_config": "zero2"}, "give it as --accelerate"),
        (TRL | {"model_init_kwargs": {"rope_scaling": {}}}, "the model's own config"),
        (FACTORY | {"lora_r": 64}, "keys that are unknown here (lora_r)"),
        (FACTORY | {"quantization_bit": 4, "loraplus_lr_ratio": 16}, ONE_RATE),
        (AXOLOTL | {"liger_rms_norm": True}, NO_PLUGIN),
        (AXOLOTL | ADAPTED_ALL | {"lora_target_modules": ["q_proj", "lm_head"]}, "no adapter on lm_head"),
        (TRL | {"bf16": False, "torch_compile": True}, "without TF32 (torch_compile)"),
        (FACTORY | {"bf16": False, "torch_compile_mode": "default"}, "without TF32 (torch_compile)"),
        (TRL | {"completion_only_loss": True}, ALL_LABELLED),
        (TRL | {"reward_funcs": ["x"], "beta": 0.1, "sync_ref_model": True}, "a reference that stays as it is"),
    ],
    ids=lambda what: "-".join(what) if isinstance(what, dict) else "",
)
def test_what_is_answered_otherwise_is_said(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    assert said in "; ".join(found_in(tmp_path, values).differences)
    assert said not in "; ".join(
        found_in(tmp_path, {k: v for k, v in values.items() if k in TRL | FACTORY | AXOLOTL}).differences
    )


@pytest.mark.parametrize(
    ("name", "objective", "open_"),
    [
        ("config.yaml", None, True), ("sft_config.yaml", None, False), ("dpo_config.yaml", "dpo", False),
        ("kto.yaml", "kto", False), ("reward_config.yaml", "reward", False), ("rloo_config.yaml", "grpo", False),
        ("grpo.yaml", "grpo", False), ("sft/config.yaml", None, False), ("dpo/sft.yaml", None, False),
        ("grpo/config.yaml", None, True), ("dpo/config.yaml", None, True), ("ppo.yaml", "ppo", False),
        ("prm_config.yaml", "prm", False), ("golden.yaml", None, True),
    ],
)  # fmt: skip
def test_a_name_tells_which_trainer_reads_a_file(tmp_path: Path, name: str, objective: str, open_: bool) -> None:
    """TRL's own documentation calls them so, and no key of theirs says more; without a name the guess is told."""
    found = found_in(tmp_path, TRL, name)
    assert found.setup.get("objective") == objective
    assert (OPEN in found.notes) == open_


@pytest.mark.parametrize(
    ("base", "values", "method"),
    [
        ("TechxGenus/Meta-Llama-3-8B-Instruct-GPTQ", FACTORY | {"quantization_bit": 4}, "lora_gptq:"),
        ("unsloth/llama-3-8b-bnb-4bit", FACTORY | {"quantization_bit": 8}, "qlora:"),
        ("unsloth/llama-3-8b-bnb-4bit", FACTORY, "qlora:"),
        ("unsloth/llama-3-8b-bnb-4bit", ADAPTED, "qlora:r=16,adapter_dtype=bf16"),
        ("unsloth/llama-3-8b-bnb-4bit", FACTORY | {"quantization_bit": 4}, None),
        ("casperhansen/llama-3-8b-instruct-awq", ADAPTED | {"load_in_4bit": True}, None),
    ],
)
def test_a_packed_checkpoint_stays_as_it_is_packed(
    tmp_path: Path, base: str, values: dict[str, Any], method: str | None
) -> None:
    """Its own config counts, whatever bits a file asks for."""
    found = found_in(tmp_path, values | {"model_name_or_path": base})
    instead = list(fallbacks(found, from_config(load("llama-3-8b"))))
    others = [f.value for f in instead if f.option == "method"]
    assert len(others) == (method is not None)
    assert all(str(other).startswith(method or "") for other in others)
    assert any("QLoRA, not on awq weights" in f.said for f in instead) == ("awq" in base)


@pytest.mark.parametrize(
    ("fsdp", "form"),
    [
        ({"fsdp": "", "fsdp_config": {"min_num_params": 0}}, ("ddp", "none")),
        ({"fsdp": [], "fsdp_config": {"offload_params": True}}, ("ddp", "none")),
        ({"fsdp": "full_shard", "fsdp_config": {"offload_params": True}}, ("fsdp2", "none")),
        ({"fsdp": "full_shard", "fsdp_config": {"cpu_offload": True}}, ("fsdp2", "params")),
    ],
)
def test_fsdp_is_what_transformers_reads_of_it(tmp_path: Path, fsdp: dict[str, Any], form: tuple[str, str]) -> None:
    """A dump of TrainingArguments has an `fsdp_config` that nothing switches on."""
    found = found_in(tmp_path, TRL | fsdp)
    assert any("FSDP" in said for said in found.differences) == (form[0] != "ddp")
    assert (found.asks().parallel or "ddp", found.asks().offload) == form


def test_a_config_of_deepspeed_is_found_beside_the_file_and_above_it(tmp_path: Path) -> None:
    """As examples of a repository name it, whichever folder one asks from."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "plain.json").write_text('{"zero_optimization": {"stage": 2}}')
    for name in ("../plain.json", "plain.json", f"{tmp_path}/plain.json"):
        found = found_in(tmp_path, TRL | {"deepspeed": name}, "examples/config.yaml")
        assert found.asks().parallel == "zero2"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"model": {"_component_": "torchtune.models.llama3_1.llama3_1_8b"}, "gradient_accumulation_steps": 2},
            "torchtune",
        ),
        ({"model": "x", "train_type": "lora", "max_length": 64}, "ms-swift"),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}, "DeepSpeed's own config"),
    ],
)
def test_files_of_other_tools_are_called_by_their_name(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    """Half of their keys are transformers', too, so that they were answered as full fine-tuning."""
    with pytest.raises(UserError, match=said):
        found_in(tmp_path, values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (FACTORY | {"use_galore": True}, "use_galore goes with finetuning_type: full, not lora"),
        (
            FACTORY | {"finetuning_type": "full", "loraplus_lr_ratio": 16},
            "loraplus_lr_ratio goes with finetuning_type: lora",
        ),
        (FACTORY | {"flash_attn": "fa2", "neat_packing": True}, "takes per_device_train_batch_size: 1"),
        (TRL | {"max_grad_norm": 10**400}, "max_grad_norm must be a number"),
        (TRL | {"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
    ],
)
def test_what_the_tool_refuses_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    """A forgotten finetuning_type made GaLore a LoRA without a word."""
    with pytest.raises(UserError, match=said):
        found_in(tmp_path, values)


@pytest.mark.parametrize(
    ("values", "method"),
    [
        (FACTORY | {"use_dora": True, "use_rslora": True}, "dora"),
        (FACTORY | {"use_rslora": True}, "rslora"),
        (FACTORY | {"use_rslora": True, "loraplus_lr_ratio": 16}, "loraplus"),
        (FACTORY | {"quantization_bit": 4, "use_rslora": True}, "qlora"),
    ],
)
def test_rslora_decides_nothing_beside_another_flavour(tmp_path: Path, values: dict[str, Any], method: str) -> None:
    """It is another constant, and no other program."""
    assert str(found_in(tmp_path, values).method).startswith(method)


@pytest.mark.parametrize("name", ["gkd.yaml", "bco_config.yaml", "online_dpo.yaml", "nash_md.yaml"])
def test_a_trainer_that_is_not_modelled_is_no_sft(tmp_path: Path, name: str) -> None:
    """Files named like these were answered as SFT, one of them as DPO."""
    with pytest.raises(UserError, match="which the file's name says, is not modelled"):
        found_in(tmp_path, TRL, name)


@pytest.mark.parametrize(
    ("values", "setup"),
    [
        (FACTORY | {"finetuning_type": "full", "pure_bf16": True}, {"dtype": "bf16", "amp": "bf16"}),
        (FACTORY | {"finetuning_type": "full", "pure_bf16": True, "bf16": False}, {"dtype": "bf16", "amp": None}),
        (AXOLOTL | {"bf16": True, "fp16": True}, {"amp": "bf16"}),
        (FACTORY | OWN_CHECKPOINTS | {"disable_gradient_checkpointing": True}, {"checkpoint": "block"}),
    ],
)
def test_what_the_tool_takes_is_taken(tmp_path: Path, values: dict[str, Any], setup: dict[str, Any]) -> None:
    """Two of these were refused, and FSDP's own checkpoints were lost."""
    found = found_in(tmp_path, values)
    assert {name: found.setup.get(name) for name in setup} == setup


def test_keys_of_generation_are_known(tmp_path: Path) -> None:
    """A long list of them hid the few that do matter."""
    keys = {"temperature": 0.7, "vllm_mode": "colocate", "generation_batch_size": 8, "top_entropy_quantile": 0.2}
    said = found_in(tmp_path, TRL | {"num_generations": 4} | keys).differences
    assert [words for words in said if "unknown" in words] == ["keys that are unknown here (top_entropy_quantile)"]


def test_files_that_peft_and_transformers_write_are_read(tmp_path: Path) -> None:
    """AdaLoRA's has LoRA's `r`, and arguments have the older names of their switches beside the newer."""
    adapter = {"peft_type": "ADALORA", "r": 8, "init_r": 12, "target_modules": ["c_attn"]} | PEFTS
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    found = read(tmp_path / "adapter_config.json")
    assert found.method == "adalora:r=12,targets=c_attn"
    both = {"activation_checkpointing": True, "gradient_checkpointing": True}
    assert not any("unknown" in words for words in found_in(tmp_path, TRL | both).differences)


def test_v1s_targets_are_names(tmp_path: Path) -> None:
    """One string, which PEFT would take as a regex."""
    v1 = {"model": "gpt2", "peft_config": {"name": "lora", "target_modules": "c_attn"}, "train_dataset": "x"}
    assert "targets=c_attn," in str(found_in(tmp_path, v1).method)
