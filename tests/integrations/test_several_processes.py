"""Of several processes the callback predicts one among the others, by what its Trainer and its launcher say."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from peft import LoraConfig, get_peft_model
from test_trainer_callback import CONFIG, SFTArguments
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from perfmodel import UserError
from perfmodel.integrations import program
from perfmodel.integrations.program import trainer_program
from perfmodel.integrations.trainer import StepPrediction


@dataclass
class SeveralArguments(TrainingArguments):
    """Of one of four processes."""

    world_size = 4


def several(folder: Path, model: Any, **asked: Any) -> program.TrainingRun:
    return trainer_program(model, SeveralArguments(str(folder), use_cpu=True, **asked))


def in_one_class(lora: bool = False) -> Any:
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])) if lora else model


@pytest.mark.parametrize(
    ("lora", "asked", "expected"),
    [
        (False, {}, {"parallel": "ddp", "ddp": "find-unused"}),
        (False, {"gradient_checkpointing": True}, {"parallel": "ddp", "ddp": "plain", "checkpoint": "block"}),
        (True, {"gradient_checkpointing": True}, {"parallel": "ddp", "ddp": "find-unused"}),
        (True, {"ddp_find_unused_parameters": False}, {"parallel": "ddp", "ddp": "plain"}),
        (False, {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}, {"reshard": False, "ddp": "plain"}),
        (True, {"fsdp": True, "bf16": True}, {"parallel": "fsdp2", "amp": "bf16", "ddp": "plain"}),
    ],
)  # fmt: skip
def test_several_processes_are_predicted_as_what_they_share(
    tmp_path: Path, lora: bool, asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    """DDP searches for unused parameters where the Trainer tells it to; what trains is counted where ranks have it."""
    run = several(tmp_path, in_one_class(lora), **asked)
    assert {name: getattr(run.setup, name) for name in expected} == expected
    assert (run.setup.gpus, run.setup.nodes, run.differences) == (4, 1, ())
    assert (run.trained is None) == bool(asked.get("fsdp"))


def test_what_a_launcher_asks_for_is_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch` hands FSDP's options and the precision on so; torchrun the processes of a node."""
    asked = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "SHARD_GRAD_OP", "FSDP_BACKWARD_PREFETCH": "BACKWARD_PRE",
        "FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_MIXED_PRECISION": "bf16", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    setup = several(tmp_path, in_one_class(), optim="adamw_torch").setup
    assert (setup.parallel, setup.reshard, setup.offload, setup.amp, setup.nodes) == (
        "fsdp1", False, "params", "bf16", 2
    )  # fmt: skip
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="LOCAL_WORLD_SIZE 3 does not divide the 4 processes"):
        several(tmp_path, in_one_class())


def test_deepspeeds_stage_is_that_of_the_plugin(tmp_path: Path) -> None:
    """It has the launcher's config too; weights that are only shards know their whole size."""
    arguments = SeveralArguments(str(tmp_path), use_cpu=True)
    arguments.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    model = in_one_class()
    for p in model.parameters():
        p.ds_shape, p.data = p.shape, torch.empty(0, dtype=torch.bfloat16)
    run = trainer_program(model, arguments)
    assert (run.setup.parallel, run.setup.dtype) == ("zero3", "bf16")


@dataclass
class OfTrl(SFTArguments):
    """As TRL's own class, of one of two processes."""

    __module__ = "trl.trainer.sft_config"
    world_size = 2


def test_trl_has_its_own_ways_with_adapters_under_zero_3(tmp_path: Path) -> None:
    """Its trainer checkpoints reentrantly there; the plain one does as it is told."""
    found = []
    for kind in (OfTrl, SeveralArguments):
        arguments = kind(str(tmp_path), use_cpu=True, gradient_checkpointing=True)
        arguments.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
        found.append(trainer_program(in_one_class(lora=True), arguments).setup.checkpoint)
    assert found == ["block-reentrant", "block"]


class TwoProcesses(SeveralArguments):
    """Their network is nobody's but this machine's."""

    world_size = 2


def test_processes_whose_exchange_is_not_modelled_are_told_from_the_step_of_one(tmp_path: Path) -> None:
    """What they exchange would look like a slow host, and whole weights beside a part of them like an error."""
    callback = StepPrediction()
    callback.model, callback.arguments = in_one_class(), TwoProcesses(str(tmp_path), use_cpu=True)
    callback._before(64)
    assert callback.program is not None
    assert callback.program.setup.gpus == 1
    (told,) = callback.program.differences
    assert told.startswith("one process alone of 2, without what they exchange or share (gpus: 2 processes on cpu-")
    assert callback.program.trained is None
    named = StepPrediction("h100-sxm", node="aws-p5")
    named.model, named.arguments = callback.model, callback.arguments
    named._before(64)
    assert named.program is not None
    assert (named.program.setup.gpus, named.program.setup.node, named.program.differences) == (2, "aws-p5", ())
