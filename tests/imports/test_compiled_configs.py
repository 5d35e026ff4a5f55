"""`torch_compile` in configs of several GPUs: the forms that have a compiled step are answered with it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from perfmodel.cli import main
from perfmodel.imports import read
from perfmodel.imports.read import ASK

AXOLOTL = {
    "base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 64, "bf16": True, "lora_target_linear": True,
    "adapter": "lora", "torch_compile": True,
}  # fmt: skip
FSDP_2 = {"fsdp_version": 2, "fsdp_config": {"transformer_layer_cls_to_wrap": "GPT2Block"}}


def written(folder: Path, values: dict[str, Any]) -> str:
    """A file with these values; returns its path."""
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({**AXOLOTL, **values}))
    return str(path)


def on_two(config: str) -> Result:
    """The answer for two GPUs."""
    return CliRunner().invoke(main, ["predict", "--device", "h100-sxm", "--config", config, "--gpus", "2"])


def test_a_compiled_step_is_offered_and_answered(tmp_path: Path) -> None:
    """The file's program falls into a graph a block, and the answer says so."""
    config = written(tmp_path, FSDP_2)
    assert ASK in read(Path(config)).first_line
    words = " ".join(on_two(config).stdout.split())
    assert "torch.compile, fsdp2" in words
    assert "each block is a graph of its own between FSDP2's hooks" in words


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({**FSDP_2, "peft_use_dora": True}, "what Dynamo makes of dora"),
        ({"deepspeed": "zero3.json"}, "eager mode"),
        ({**FSDP_2, "torch_compile_mode": "reduce-overhead"}, "use --compile default"),
        ({**FSDP_2, "tensor_parallel_size": 2}, "use --tp 1"),
    ],
)
def test_what_would_be_refused_is_not_offered(tmp_path: Path, values: dict[str, Any], why: str) -> None:
    """A hint that ends in a refusal is worse than none."""
    config = written(tmp_path, values)
    assert ASK not in read(Path(config)).first_line
    result = on_two(config)
    assert (result.exit_code, why in result.stderr) == (2, True)


LAUNCHER = {
    "distributed_type": "FSDP", "num_processes": 8, "num_machines": 1, "mixed_precision": "bf16",
    "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("dynamo", "own", "compiled"),
    [
        ({"dynamo_backend": "INDUCTOR"}, {"torch_compile": False}, True),
        ({"dynamo_backend": "INDUCTOR", "dynamo_use_regional_compilation": True}, {"torch_compile": False}, False),
        ({"dynamo_backend": "INDUCTOR"}, {"torch_compile": False, "peft_use_dora": True}, False),
        ({"dynamo_backend": "INDUCTOR"}, {}, True),
    ],
)
def test_a_launcher_compiles_what_its_config_does_not(
    tmp_path: Path, dynamo: dict[str, Any], own: dict[str, Any], compiled: bool
) -> None:
    """accelerate's `dynamo_config` counts where the Trainer says nothing; what is not modelled is left out."""
    config = written(tmp_path, own)
    launcher = tmp_path / "accelerate.yaml"
    launcher.write_text(yaml.safe_dump({**LAUNCHER, "dynamo_config": dynamo}))
    words = ["predict", "--device", "h100-sxm", "--config", config, "--accelerate", str(launcher)]
    answer = CliRunner().invoke(main, words)
    assert answer.exit_code == 0, answer.stderr
    assert ("torch.compile, fsdp2" in " ".join(answer.stdout.split())) == compiled
    assert ("without torch.compile (dynamo_config)" in answer.stdout) == (not compiled)


@pytest.mark.parametrize(
    ("own", "gpus", "compiled"),
    [
        ({}, 2, True),
        ({"gradient_checkpointing": True}, 2, False),
        (FSDP_2, 4, True),
        ({**FSDP_2, "adapter": None}, 4, True),
    ],
)
def test_a_launcher_compiles_layers_that_gpus_share(
    tmp_path: Path, own: dict[str, Any], gpus: int, compiled: bool
) -> None:
    """Alone or under FSDP2, as `--compile` beside `--tp` does; PyTorch cannot compile checkpoints there."""
    off = {"torch_compile": False, "base_model": "llama-3.2-1b", "lora_mlp_kernel": False, "tensor_parallel_size": 2}
    config, launcher = written(tmp_path, off | own), tmp_path / "accelerate.yaml"
    launched = {"distributed_type": "FSDP" if "fsdp_config" in own else "MULTI_GPU", "num_processes": gpus}
    launched |= {"mixed_precision": "bf16", "dynamo_config": {"dynamo_backend": "INDUCTOR"}}
    launched |= {"fsdp_config": LAUNCHER["fsdp_config"]} if "fsdp_config" in own else {}
    launcher.write_text(yaml.safe_dump(launched))
    words = ["predict", "--device", "h100-sxm", "--config", config, "--accelerate", str(launcher)]
    answer = CliRunner().invoke(main, words)
    assert answer.exit_code == 0, answer.stderr
    assert "tensor parallel 2" in " ".join(answer.stdout.split())
    assert ("torch.compile," in " ".join(answer.stdout.split())) == compiled
    assert ("without torch.compile (dynamo_config)" in answer.stdout) == (not compiled)


def test_a_launcher_compiles_nothing_that_it_offloads(tmp_path: Path) -> None:
    """The one is not modelled beside the other: the answer says what it leaves out, and is one."""
    launcher = tmp_path / "accelerate.yaml"
    offloads = {**LAUNCHER["fsdp_config"], "fsdp_offload_params": True}
    compiles = {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}
    launcher.write_text(yaml.safe_dump({**LAUNCHER, **compiles, "fsdp_config": offloads}))
    config = written(tmp_path, {"torch_compile": False})
    words = ["predict", "--device", "h100-sxm", "--config", config, "--accelerate", str(launcher)]
    answer = CliRunner().invoke(main, words)
    assert answer.exit_code == 0, answer.stderr
    assert "weights and optimizer offloaded" in " ".join(answer.stdout.split())
    assert "without torch.compile (dynamo_config)" in answer.stdout


@pytest.mark.parametrize("backend", ["NO", "no"])
def test_a_launcher_that_compiles_nothing_is_not_told_so(tmp_path: Path, backend: str) -> None:
    launcher = tmp_path / "accelerate.yaml"
    launcher.write_text(yaml.safe_dump({**LAUNCHER, "dynamo_config": {"dynamo_backend": backend}}))
    words = ["predict", "--device", "h100-sxm", "--config", written(tmp_path, {}), "--accelerate", str(launcher)]
    answer = CliRunner().invoke(main, words)
    assert answer.exit_code == 0, answer.stderr
    assert "dynamo_config" not in answer.output
