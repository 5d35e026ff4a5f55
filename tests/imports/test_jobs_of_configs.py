"""What a training config says of the whole job, and which full fine-tuning an adapter of its is compared with."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel import predict
from perfmodel.cli import main
from perfmodel.imports import read

TRL = "model_name_or_path: HuggingFaceTB/SmolLM2-135M\nper_device_train_batch_size: 4\nmax_length: 512\n"
FACTORY = "model_name_or_path: gpt2\nfinetuning_type: {}\nper_device_train_batch_size: 4\nbf16: true\n"
V1 = "model: gpt2\nmodel_class: llm\nmicro_batch_size: 4\n"
AXOLOTL = "base_model: gpt2\nmicro_batch_size: 4\nsequence_len: 512\n"


@pytest.mark.parametrize(
    ("text", "job"),
    [
        (TRL, {"epochs": 3.0, "save_every": 500}),
        (TRL + "save_strategy: epoch", {"epochs": 3.0, "save_every": 1 / 3}),
        (TRL + "save_strategy: epoch\nmax_steps: 9", {"epochs": 3.0, "max_steps": 9}),
        (TRL + 'num_train_epochs: "5"\nsave_steps: 0.1', {"epochs": 5, "save_every": 0.1}),
        (TRL + "save_only_model: true", {"epochs": 3.0, "save_every": 500, "save_only_model": True}),
        (TRL + "save_strategy: no\nnum_train_epochs: 2", {"epochs": 2}),
        (TRL + 'save_strategy: "no"\nsave_steps: 100\nmax_steps: 50', {"epochs": 3.0, "max_steps": 50}),
        (TRL + "max_steps: -1\nsave_steps: 20", {"epochs": 3.0, "save_every": 20}),
        (FACTORY.format("lora"), {"epochs": 3.0, "save_every": 500}),
        (FACTORY.format("lora") + "max_steps: 7", {"epochs": 3.0, "save_every": 500, "max_steps": 7}),
        (V1, {"epochs": 3}),
        (AXOLOTL, {}),
        (AXOLOTL + "num_epochs: 3", {"epochs": 3, "save_every": 1 / 3}),
        (AXOLOTL + "num_epochs: 3\nsaves_per_epoch: 4", {"epochs": 3, "save_every": 1 / 12}),
        (AXOLOTL + "num_epochs: 2\nmax_steps: 30\nsave_steps: 10", {"epochs": 2, "max_steps": 30, "save_every": 10}),
    ],
)
def test_epochs_steps_and_checkpoints_are_those_of_the_tool(text: str, job: dict[str, Any], tmp_path: Path) -> None:
    """A file without epochs is of three (Axolotl's of one), and `max_steps` counts before them."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    found = read(file)
    assert found.job == job
    of_job = {"max_steps", "num_train_epochs", "num_epochs", "save_steps", "save_strategy", "saves_per_epoch"}
    assert not of_job & set(found.ignored)


def planned(*options: str) -> dict[str, Any]:
    run = CliRunner().invoke(main, ["plan", "--device", "l40s", "--samples", "400", "--json", *options])
    assert run.exit_code == 0, run.output
    return dict(json.loads(run.stdout)["runs"][0])


def test_steps_of_a_config_give_way_to_epochs_that_are_typed(tmp_path: Path) -> None:
    """What is typed wins, as for every option."""
    file = tmp_path / "config.yaml"
    file.write_text(TRL + "max_steps: 50\ngradient_accumulation_steps: 1")
    given = ("--config", str(file))
    assert [planned(*given, *more)["steps"] for more in ((), ("--epochs", "2"), ("--max-steps", "9"))] == [50, 200, 9]


@pytest.mark.parametrize(
    ("kind", "more", "baseline"),
    [
        ("lora", "", "full:trained_dtype=fp32"), ("lora", "quantization_bit: 4", "full:trained_dtype=fp32"),
        ("full", "", "full"),
    ],
)  # fmt: skip
def test_an_adapter_is_compared_with_the_tools_own_full_fine_tuning(
    kind: str, more: str, baseline: str, tmp_path: Path
) -> None:
    """LLaMA-Factory's keeps all weights in fp32: 147 GB for 68, and the verdict on LoRA turned round."""
    file = tmp_path / "config.yaml"
    file.write_text(FACTORY.format(kind) + more)
    assert read(file).baseline == baseline


@pytest.mark.parametrize(
    "form", [{}, *({"gpus": 8, "parallel": p} for p in ("ddp", "fsdp2", "fsdp1", "zero2", "zero3"))]
)
def test_weights_in_fp32_beside_a_base_in_16_bit_are_those_of_an_fp32_model(form: dict[str, Any]) -> None:
    """All train, so the base's dtype is nobody's."""
    alike: dict[str, Any] = {"device": "h100-sxm", "seq": 256, "amp": "bf16", **form}
    ours = predict("llama-3.2-1b", "full:trained_dtype=fp32", dtype="bf16", **alike)
    plain = predict("llama-3.2-1b", "full", dtype="fp32", **alike)
    assert ours.time.phases["total"] == pytest.approx(plain.time.phases["total"], rel=1e-9)
    assert (ours.memory.peak, ours.kernels) == (plain.memory.peak, plain.kernels)
