"""Samples of a micro-batch and micro-batches of a step, as DeepSpeed's config and accelerate's say them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from perfmodel.cli import main

TRL = {"model_name_or_path": "gpt2", "max_length": 64, "packing": False}
FACTORY = {"model_name_or_path": "gpt2", "cutoff_len": 64, "finetuning_type": "full", "bf16": True}
EIGHT = {"num_processes": 8, "mixed_precision": "bf16"}
DDP = {**EIGHT, "distributed_type": "MULTI_GPU"}
ZERO_3 = {"zero_optimization": {"stage": 3}}
ZERO_2 = {"zero_optimization": {"stage": 2}}
SIZES = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 16}
SIZED = {**ZERO_2, **SIZES}
SHORT_OF_FOUR = {
    **EIGHT, "distributed_type": "DEEPSPEED", "deepspeed_config": {"gradient_accumulation_steps": 4}
}  # fmt: skip


def answered(folder: Path, config: Any, launch: Any, *typed: str) -> Any:
    """A question with a training config, or a model, and a launcher's config, if there is one."""
    args = ["--model", "gpt2", "--seq", "16"]
    for option, values in (("--config", config), ("--accelerate", launch)):
        if values:
            (folder / f"{option[2:]}.yaml").write_text(yaml.safe_dump(values))
            given = [option, str(folder / f"{option[2:]}.yaml")]
            args = given if option == "--config" else [*args, *given]
    return CliRunner().invoke(main, ["predict", "--device", "h100-sxm", *args, *typed])


@pytest.mark.parametrize(
    ("config", "launch", "typed", "batch", "grad_accum"),
    [
        (None, SIZED, ("--gpus", "2"), 8, 16),
        (None, SIZED, (), 8, 16),
        (None, SIZED, ("--gpus", "2", "--batch", "2"), 2, 16),
        (None, {**SIZED, "train_micro_batch_size_per_gpu": "auto"}, ("--gpus", "2"), 1, 16),
        (None, {**ZERO_2, "train_batch_size": 32}, ("--gpus", "2"), 16, 1),
        (None, {**ZERO_2, "train_batch_size": 32}, ("--gpus", "2", "--batch", "2"), 2, 8),
        (None, {**ZERO_2, "train_batch_size": 32, "gradient_accumulation_steps": 4}, ("--gpus", "4"), 2, 4),
        (None, {**SIZED, "train_batch_size": 256}, ("--gpus", "2"), 8, 16),
        (None, {**SIZED, "train_batch_size": 256}, ("--gpus", "4", "--batch", "2"), 2, 16),
        (None, SHORT_OF_FOUR, (), 1, 4),
        ({**FACTORY, "gradient_accumulation_steps": 4}, SHORT_OF_FOUR, (), 8, 4),
        ({**FACTORY, "gradient_accumulation_steps": 2}, SHORT_OF_FOUR, ("--grad-accum", "3"), 8, 3),
        (
            {**TRL, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 16, "deepspeed": SIZED}, None,
            ("--gpus", "2"), 8, 16,
        ),
    ],
)  # fmt: skip
def test_deepspeeds_numbers_of_samples_count_where_no_others_do(
    tmp_path: Path, config: Any, launch: Any, typed: tuple[str, ...], batch: int, grad_accum: int
) -> None:
    """They were taken for keys without weight: a step of 128 samples on each GPU was answered for one."""
    result = answered(tmp_path, config, launch, *typed, "--json")
    assert result.exit_code == 0, result.stderr
    setup = json.loads(result.stdout)["setup"]
    assert (setup["batch"], setup["grad_accum"]) == (batch, grad_accum)


@pytest.mark.parametrize(
    ("config", "launch", "told"),
    [
        (
            FACTORY, SHORT_OF_FOUR,
            "the training config has grad-accum 1, DeepSpeed's config gradient_accumulation_steps 4: make them alike",
        ),
        ({**TRL, "bf16": True, "deepspeed": {**ZERO_3, "fp16": {"enabled": True}}}, None, "has bf16, DeepSpeed's"),
        ({**TRL, "deepspeed": SIZED}, DDP, "has grad-accum 1, DeepSpeed's config gradient_accumulation_steps 16"),
        (
            {**TRL, "deepspeed": {**SIZED, "zero_optimization": {"stage": 3}}}, None,
            "the training config has grad-accum 1, DeepSpeed's config gradient_accumulation_steps 16",
        ),
        (None, {**ZERO_2, "train_batch_size": 30}, "train_batch_size 30 cannot be shared by 4 GPUs: give a multiple"),
        (
            None, {**ZERO_2, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 8},
            "train_batch_size 16 cannot be shared by 4 GPUs, train_micro_batch_size_per_gpu 8: give a multiple",
        ),
        (
            None, {**SIZED, "train_batch_size": 256},
            "train_batch_size 256 is not train_micro_batch_size_per_gpu 8 x gradient_accumulation_steps 16 x 4 GPUs: "
            "give 512, or leave one of them out",
        ),
        (None, {**ZERO_2, "train_micro_batch_size_per_gpu": "many"}, "must be a positive integer, got 'many'"),
    ],
)  # fmt: skip
def test_numbers_of_samples_that_end_in_an_error_are_refused(
    tmp_path: Path, config: Any, launch: Any, told: str
) -> None:
    """transformers' trainer asks for its own or "auto"; DeepSpeed for samples that its ranks can share."""
    result = answered(tmp_path, config, launch, *([] if config else ["--gpus", "4"]))
    assert result.exit_code == 2
    assert told in result.stderr


def test_a_grid_takes_a_launchers_numbers_of_samples(tmp_path: Path) -> None:
    """Its axes hold several values; samples of all GPUs are those of the first number of them."""
    launch = tmp_path / "launch.yaml"
    launch.write_text(yaml.safe_dump({**ZERO_2, "train_batch_size": 8}))
    where = ["--model", "gpt2", "--seq", "16", "--device", "h100-sxm", "--accelerate", str(launch), "--gpus", "2-4*2"]
    result = CliRunner().invoke(main, ["sweep", *where])
    assert result.exit_code == 0, result.output
    assert "as many samples on each of any number of GPUs" in result.stdout
    assert "batch 4" in result.stdout


@pytest.mark.parametrize("beside", [False, True])
def test_another_precision_than_the_trainers_is_refused_wherever_deepspeeds_config_is(
    tmp_path: Path, beside: bool
) -> None:
    """TRL computes in bf16 by default; transformers ends the run where DeepSpeed's config says fp16."""
    half = {**ZERO_2, "fp16": {"enabled": True}}
    config, launch = (TRL, half) if beside else ({**TRL, "deepspeed": half}, None)
    result = answered(tmp_path, config, launch, "--gpus", "2")
    assert result.exit_code == 2
    assert "the training config has bf16, DeepSpeed's config fp16: make them alike" in result.stderr
