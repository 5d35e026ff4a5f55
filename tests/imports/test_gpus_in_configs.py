"""What a training config has several GPUs do by keys of its trainer: searches for unused weights, a global batch."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from perfmodel import Setup
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.imports.ddp import ENDS
from perfmodel.imports.forms import ONCE
from perfmodel.imports.llama_factory_v1 import AS_MANY
from perfmodel.imports.mesh import APART

AXOLOTL = {"base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 64, "bf16": True, "lora_target_linear": True}
FACTORY = {"model_name_or_path": "gpt2", "cutoff_len": 64, "finetuning_type": "full", "bf16": True}
TRL = {"model_name_or_path": "gpt2", "max_length": 64, "packing": False}
V1 = {"model": "tinyllama-1.1b", "model_class": "llm", "micro_batch_size": 2, "cutoff_len": 64}


def written(folder: Path, values: Any) -> Path:
    """A file with these values."""
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(
    ("values", "searches"),
    [
        (TRL, False),
        ({**TRL, "use_peft": True}, True),
        ({**TRL, "gradient_checkpointing": False}, True),
        ({**TRL, "use_peft": True, "ddp_find_unused_parameters": False}, False),
        ({**TRL, "use_peft": True, "fsdp": True}, False),
        (FACTORY, False),
        ({**FACTORY, "finetuning_type": "lora", "disable_gradient_checkpointing": True}, False),
        ({**FACTORY, "disable_gradient_checkpointing": True}, True),
        ({**FACTORY, "finetuning_type": "oft"}, True),
        ({**FACTORY, "stage": "rm"}, True),
        ({**FACTORY, "stage": "rm", "ddp_find_unused_parameters": False}, False),
        ({**AXOLOTL, "adapter": "lora"}, False),
        ({**AXOLOTL, "ddp_find_unused_parameters": True}, True),
        ({**AXOLOTL, "base_model": "google/gemma-4-12B-it", "adapter": "lora"}, True),
        ({**AXOLOTL, "base_model": "google/gemma-4-12B-it", "ddp_find_unused_parameters": False}, False),
        ({**AXOLOTL, "rl": "dpo", "adapter": "lora", "ddp_find_unused_parameters": False}, True),
        ({**AXOLOTL, "rl": "dpo", "gradient_checkpointing": True}, False),
        ({**AXOLOTL, "rl": "dpo"}, True),
        ({**FACTORY, "finetuning_type": "lora", "ddp_find_unused_parameters": True}, True),
    ],
)
def test_the_search_for_unused_parameters_is_the_tools_default(
    tmp_path: Path, values: dict[str, Any], searches: bool
) -> None:
    """The Trainer's own default beside adapters; where PyTorch ends in an error with it, that is said."""
    found = read(written(tmp_path, values))
    several = found.on_several(found.asks())
    assert (several.setup["ddp"] == "find-unused" or ENDS["find-unused"] in several.differences) == searches


@pytest.mark.parametrize(
    ("values", "ddp", "said"),
    [
        ({**TRL, "use_peft": True}, "find-unused", []),
        ({**TRL, "use_peft": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "plain",
         [ENDS["find-unused"]]),
        ({**TRL, "ddp_static_graph": True, "gradient_accumulation_steps": 1}, "static-graph", []),
        ({**TRL, "ddp_static_graph": True, "gradient_accumulation_steps": 2}, "plain", [ENDS["static-graph"]]),
    ],
)  # fmt: skip
def test_what_ddp_is_told_of_the_graph_runs_or_is_said(
    tmp_path: Path, values: dict[str, Any], ddp: str, said: list[str]
) -> None:
    """What ends in an error in PyTorch is answered without it, which is said."""
    found = read(written(tmp_path, values))
    several = found.on_several(found.asks())
    assert several.setup["ddp"] == ddp
    assert Setup(**several.setup, gpus=8).ddp == ddp
    assert [words for words in several.differences if "ddp_" in words] == said
    assert not any("ddp_" in words for words in found.differences)


@pytest.mark.parametrize(
    ("values", "typed", "micro_batches"),
    [
        ({"global_batch_size": 16}, (), 8),
        ({"global_batch_size": 16}, ("--gpus", "4"), 2),
        ({"global_batch_size": 16}, ("--gpus", "16"), 1),
        ({"global_batch_size": 16}, ("--gpus", "4", "--grad-accum", "3"), 3),
        ({}, ("--gpus", "4"), 1),
    ],
)
def test_gpus_share_the_samples_of_a_global_batch(
    tmp_path: Path, values: dict[str, Any], typed: tuple[str, ...], micro_batches: int
) -> None:
    """LLaMA-Factory v1 counts those of all GPUs, where the other tools count micro-batches of each."""
    config = str(written(tmp_path, {**V1, **values}))
    asked = ["predict", "--device", "h100-sxm", "--config", config, *typed, "--json"]
    answer = json.loads(CliRunner().invoke(main, asked).stdout)
    assert answer["setup"]["grad_accum"] == micro_batches


@pytest.mark.parametrize("split", [True, False])
def test_gpus_share_a_batch_that_accelerate_splits(tmp_path: Path, split: bool) -> None:
    """What is called a batch of one device is then that of all; accelerate takes none that leaves a rest."""
    values = {**TRL, "per_device_train_batch_size": 8, "accelerator_config": {"split_batches": split}}
    found = read(written(tmp_path, values))
    several = found.on_several(found.asks())
    assert [several.over((n,)).setup["batch"] for n in (1, 2, 8)] == ([8, 4, 1] if split else [8, 8, 8])
    assert (APART in several.over((2, 4)).differences) == split
    if split:
        with pytest.raises(UserError, match="shared by 3 GPUs"):
            several.over((3,))


@pytest.mark.parametrize(
    ("dist", "gpus", "told"),
    [
        (None, 4, True),
        ({"name": "fsdp2"}, 4, True),
        ({"name": "deepspeed", "config_file": "ds_z2_config.json"}, 4, False),
    ],
)
def test_gradients_of_every_micro_batch_are_exchanged(
    tmp_path: Path, dist: dict[str, Any] | None, gpus: int, told: bool
) -> None:
    """LLaMA-Factory v1 has no `no_sync`, and its FSDP2 reduces in fp32."""
    found = read(written(tmp_path, {**V1, "global_batch_size": 16, "dist_config": dist}))
    several = found.on_several(found.asks()).over((gpus,))
    assert several.setup.get("sync_each_batch", False) == told
    assert several.setup.get("reduce_dtype") == ("fp32" if several.setup["parallel"] == "fsdp2" else None)
    assert ONCE not in several.differences
    Setup(**several.setup, gpus=gpus)


def test_micro_batches_on_several_numbers_of_gpus_are_told(tmp_path: Path) -> None:
    """They are as many for all of a sweep's GPUs, which one global batch would not give."""
    found = read(written(tmp_path, {**V1, "global_batch_size": 16}))
    assert found.over((2, 4)).differences == [*found.differences, AS_MANY]
    assert found.over((4, 4)).setup["grad_accum"] == 2


EVERY = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({}, True), ({"fsdp": True}, True), ({"fsdp": True, "fsdp_config": {"version": 1}}, True),
        ({"deepspeed": "zero2.json"}, False), ({"deepspeed": "zero3.json"}, False),
    ],
)  # fmt: skip
def test_gradients_are_exchanged_for_every_micro_batch(tmp_path: Path, form: dict[str, Any], told: bool) -> None:
    """accelerate's `no_sync` is left out then, under FSDP too; DeepSpeed does it anyway."""
    own = tmp_path / "accelerator.json"
    own.write_text(json.dumps(EVERY))
    for config in (EVERY, str(own)):
        found = read(written(tmp_path, {**TRL, **form, "gradient_accumulation_steps": 4, "accelerator_config": config}))
        several = found.on_several(found.asks())
        assert several.setup.get("sync_each_batch", False) == told
        assert not any(words.startswith(ONCE) for words in (*several.differences, *found.differences))


@pytest.mark.parametrize("file", [TRL, FACTORY, AXOLOTL])
def test_micro_batches_that_accelerates_part_names_count(tmp_path: Path, file: dict[str, Any]) -> None:
    """The trainer takes them for its own where the file has one, and ends where it has more."""
    named = {**file, "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}
    assert read(written(tmp_path, named)).setup["grad_accum"] == 4
    assert read(written(tmp_path, {**named, "gradient_accumulation_steps": 1})).setup["grad_accum"] == 4
    with pytest.raises(UserError, match="exclude each other"):
        read(written(tmp_path, {**named, "gradient_accumulation_steps": 2}))
    named["accelerator_config"]["gradient_accumulation_kwargs"]["num_steps"] = "many"
    with pytest.raises(UserError, match="num_steps must be a positive integer"):
        read(written(tmp_path, named))


def test_one_gpu_under_zero_3_is_that_of_deepspeeds_config(tmp_path: Path) -> None:
    """Its optimizer, its clipping and its buckets are the step's on one GPU, too; none of it is without DeepSpeed."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": "auto", "sub_group_size": 0, "overlap_comm": False}
    own = {"zero_optimization": zero, "optimizer": {"type": "AdamW"}, "bf16": {"enabled": True}}
    found = read(written(tmp_path, {**TRL, "bf16": False, "deepspeed": own}))
    assert (found.setup["engine"], found.setup["clip_grad"], found.setup["amp"]) == ("deepspeed-zero3", False, "bf16")
    told = [
        "the optimizer that the training config names (optimizer)",
        "weights updated together, not in sub-groups (zero_optimization.sub_group_size)",
        "buckets of the hidden size squared, not DeepSpeed's 500,000,000 elements",
    ]
    assert set(told) <= set(found.differences)
    assert "one GPU under ZeRO-3 (deepspeed)" in found.differences
    assert not any("beside backward" in words for words in found.differences), "one GPU exchanges nothing"
    without = found.replaced([("engine", "one GPU, without ZeRO-3")])
    assert not set(told) & set(without.differences)
    named = read(written(tmp_path, {**TRL, "deepspeed": "zero3.json"}))
    assert any(words.startswith("ZeRO-3 as the file's name says") for words in named.differences)
