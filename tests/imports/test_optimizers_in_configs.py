"""The optimizer that a config names, by the name that transformers has for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from perfmodel.imports import read
from perfmodel.imports.fields import DECAYED, OPTIMIZERS

PROGRAMS = {  # Transformers' name (training_args.py, OptimizerNames): the program that it runs
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw-fused", "adamw_hf": "adamw-loop",
    "adamw_apex_fused": "adamw-fused", "adamw_bnb_8bit": "adamw-8bit", "adamw_8bit": "adamw-8bit",
    "paged_adamw_8bit": "paged-adamw-8bit", "paged_adamw": "paged-adamw", "paged_adamw_32bit": "paged-adamw",
    "adamw_torch_8bit": "ao-adamw-8bit", "adamw_torch_4bit": "ao-adamw-4bit", "muon": "muon",
    "ao_adamw_8bit": "ao-adamw-8bit", "ao_adamw_fp8": "ao-adamw-fp8", "schedule_free_adamw": "schedule-free-adamw",
    "adafactor": "adafactor", "lion_32bit": "lion", "lion_8bit": "lion-8bit", "sgd": "sgd", "rmsprop": "rmsprop",
}  # fmt: skip


def test_every_optimizer_is_expected() -> None:
    """A name without an expectation would test nothing."""
    assert set(OPTIMIZERS) == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_optimizers_name_gives_the_program_that_it_runs(tmp_path: Path, name: str) -> None:
    """Their kernels differ by a factor of ten: the loop over parameters of adamw_hf is no foreach."""
    configs = {
        "trl.json": {"per_device_train_batch_size": 1, "optim": name},
        "axolotl.yml": {"base_model": "m", "micro_batch_size": 1, "optimizer": name},
        "factory.yaml": {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "full", "optim": name},
    }
    for file, values in configs.items():
        (tmp_path / file).write_text(json.dumps(values))
        assert read(tmp_path / file).setup["optimizer"] == PROGRAMS[name], file


@pytest.mark.parametrize(
    ("values", "name", "told"),
    [
        ({"optim": "sgd", "optim_args": "momentum=0.9"}, "sgd-momentum", []),
        ({"optim": "sgd", "optim_args": {"momentum": 0.9, "nesterov": True}}, "sgd-momentum",
         ["sgd-momentum without nesterov (optim_args)"]),
        ({"optim": "sgd", "optim_args": "momentum=0.0, nesterov=false"}, "sgd", []),
        ({"optim": "sgd", "weight_decay": 0.01}, "sgd", ["without weight decay (weight_decay)"]),
        ({"optim": "rmsprop", "optim_args": "alpha=0.9,centered=True"}, "rmsprop",
         ["rmsprop without centered (optim_args)"]),
        ({"optim": "adamw_torch", "weight_decay": 0.01}, "adamw", []),
        ({"optim": "sgd", "optim_args": 3}, "sgd", []),
        ({"optim": "sgd", "optim_args": "weight_decay=0.01"}, "sgd", ["sgd without weight_decay (optim_args)"]),
        ({"optim": "adamw_torch_8bit", "optim_args": "bf16_stochastic_round=True"}, "ao-adamw-8bit",
         ["ao-adamw-8bit without bf16_stochastic_round (optim_args)"]),
        ({"optim": "adamw_torch_4bit", "optim_args": {"block_size": 256, "bf16_stochastic_round": False}},
         "ao-adamw-4bit", []),
        ({"optim": "ao_adamw_fp8", "optim_args": {"block_size": 64}}, "ao-adamw-fp8",
         ["ao-adamw-fp8 without block_size (optim_args)"]),
    ],
)  # fmt: skip
def test_arguments_of_an_optimizer_may_make_another_of_it(
    tmp_path: Path, values: dict[str, Any], name: str, told: list[str]
) -> None:
    """Momentum keeps a copy of the weights, and weight decay makes one of the gradients."""
    (tmp_path / "trl.json").write_text(json.dumps({"per_device_train_batch_size": 1, **values}))
    found = read(tmp_path / "trl.json")
    assert (found.setup["optimizer"], found.differences) == (name, told)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"optim": "adamw_torch"}, [DECAYED]),
        ({"optim": "adamw_torch", "weight_decay": 0.0}, [f"{DECAYED} (weight_decay)"]),
        ({"optim": "adamw_torch", "weight_decay": 0.01}, []),
        ({"optim": "adamw_torch", "gradient_accumulation_steps": 39}, [DECAYED]),
        ({"optim": "adamw_torch", "gradient_accumulation_steps": 40}, []),
        ({"optim": "adamw_torch", "gradient_accumulation_steps": 20, "loss_type": "ipo"}, []),
        ({"optim": "adamw_torch_fused"}, []),
        ({"optim": "adamw_torch", "use_peft": True}, []),
        ({"optim": "adamw_torch", "deepspeed": {"zero_optimization": {"stage": 3}}}, []),
    ],
)
def test_weight_decay_that_a_file_has_not_is_told(tmp_path: Path, values: dict[str, Any], told: list[str]) -> None:
    """All tools leave it out by default: a tenth of a full update on lists, so a hundredth of a short step."""
    (tmp_path / "trl.json").write_text(json.dumps({"max_length": 64, "loss_type": "nll", "packing": False, **values}))
    assert [said for said in read(tmp_path / "trl.json").differences if DECAYED in said] == told


@pytest.mark.parametrize(
    "text",
    [
        "base_model: gpt2\nmicro_batch_size: 1\noptimizer: adamw_torch",
        "model_name_or_path: gpt2\nstage: sft\nfinetuning_type: full\noptim: adamw_torch",
    ],
)
def test_weight_decay_is_off_in_every_tool(tmp_path: Path, text: str) -> None:
    """Axolotl's schema and LLaMA-Factory's arguments have transformers' default."""
    (tmp_path / "config.yml").write_text(text)
    assert DECAYED in read(tmp_path / "config.yml").differences
