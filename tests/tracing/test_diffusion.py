"""Image models of diffusers: traced like any other model, and PEFT's image benchmark is read as it stands."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

import torch
from test_traced import ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from perfmodel import cli
from perfmodel.architectures import Config, load
from perfmodel.calls import costs
from perfmodel.errors import UserError
from perfmodel.methods.parts.peft_adapter import PeftAdapter
from perfmodel.setup import Setup
from perfmodel.tracing import growth, recorded, traced
from perfmodel.tracing.programs import build_model, diffusion
from perfmodel.tracing.trace import CallRecorder, to_fake, without_remarks

SMALL = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 16, "axes_dims_rope": [4, 4, 4, 4],
    "guidance_embeds": False, "in_channels": 8, "joint_attention_dim": 24, "num_attention_heads": 2, "num_layers": 10,
    "num_single_layers": 11, "timestep_guidance_channels": 16,
}  # fmt: skip
LORA = PeftAdapter.of({"peft_type": "LORA", "r": 4, "target_modules": ["to_q", "to_out.0", "to_qkv_mlp_proj"]})
SETUP = Setup(batch=2, seq=diffusion.TEXT + 16, optimizer="adamw-foreach")
CONFIG = Config(SMALL, "flux", "flux")


def experiment(folder: Path, **training: Any) -> Path:
    """An experiment of PEFT's image benchmark on the small model; its file."""
    here = folder / "experiments" / "lora" / "mine"
    here.mkdir(parents=True)
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SMALL))
    defaults = {
        "model_id": str(model), "dtype": "bfloat16", "resolution": 64, "batch_size": 2, "use_gc": True,
        "max_sequence_length": 512, "optimizer_type": "AdamW", "grad_norm_clip": 1.0, **training,
    }  # fmt: skip
    (folder / "default_training_params.json").write_text(json.dumps(defaults))
    (here / "adapter_config.json").write_text(json.dumps(LORA.values))
    return here / "adapter_config.json"


def asked(*words: str) -> Any:
    return CliRunner().invoke(cli.main, ["predict", *words, "--device", "l40s"])


def test_without_diffusers_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Most who ask have no diffusers; a traceback would be all that they learn."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "home"))
    found = asked("--config", str(experiment(tmp_path)), "--traced")
    assert found.exit_code == 2
    assert "pip install 'perfmodel[diffusion]'" in found.stderr.rstrip().rsplit("\n", 1)[-1]


def test_a_class_whose_batches_are_not_known_is_refused() -> None:
    """An image model of another kind takes other inputs; it must not be answered as this one."""
    config = Config({**SMALL, "_class_name": "UNet2DConditionModel"}, "unet", "unet")
    with pytest.raises(UserError, match="Flux2Transformer2DModel can be traced, not UNet2DConditionModel"):
        traced.of_method(config, "full", SETUP)


def test_it_has_no_built_in_form_and_says_what_works() -> None:
    found = asked("--model", "black-forest-labs/FLUX.2-klein-base-4B", "--seq", "1536")
    assert found.exit_code == 2
    assert "has no built-in form: add --traced" in found.stderr


@pytest.mark.parametrize(("method", "checkpoint"), [("full", "none"), (LORA, "block")])
def test_it_follows_exactly_from_a_few_of_its_blocks(
    method: Any, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of blocks of two kinds: what is left out is what a trace of all finds, call for call."""
    pytest.importorskip("diffusers")
    setup = Setup(**{**SETUP.as_dict(), "checkpoint": checkpoint})
    few, made = traced.of_method(CONFIG, method, setup)
    assert made.extrapolated
    with monkeypatch.context() as changed:
        changed.setattr(growth._Plan, "cost", 10**9)
        every, _ = traced.of_method(CONFIG, method, setup)
    for phase in ("forward", "backward"):
        assert ops(few, phase) == ops(every, phase)
    for count in ("nodes", "modules", "checkpoints", "adapters"):
        assert host(few, count) == host(every, count)
    assert host(few, "checkpoints") == (21 if checkpoint == "block" else 0)


def host(step: Any, count: str) -> int:
    return sum(getattr(part.host, count) * times for part, times in step.parts())


def test_flops_are_those_that_torch_counts() -> None:
    """The loop of the benchmark, forward and backward, counted by PyTorch's own counter."""
    pytest.importorskip("diffusers")
    step, _ = traced.of_method(CONFIG, "full", SETUP)
    with without_remarks():
        model, mode = build_model(CONFIG, SETUP), FakeTensorMode()
    to_fake(model, mode, "cpu")
    with mode, CallRecorder(), FlopCounterMode(display=False) as counter:
        diffusion.flow_matching(model, diffusion.images(model, SETUP, "cpu")).backward()
    made: Counter[str] = Counter()
    for part, op, times in step.ops():
        made[part.phase] += costs.flops(op) * times
    assert made["forward"] + made["backward"] == counter.get_total_flops()


def test_norms_and_attention_are_the_kernels_of_a_gpu() -> None:
    """On the CPU torch writes an RMS norm as six calls and attention as another kernel."""
    pytest.importorskip("diffusers")
    step, _ = traced.of_method(CONFIG, "full", SETUP)
    names = Counter({op.name: times for _, op, times in step.ops()})
    assert names["_fused_rms_norm"]
    assert names["_fused_rms_norm_backward"]
    assert names["_scaled_dot_product_flash_attention"]
    assert not names["rsqrt"]


def test_bases_of_an_adapted_model_move_to_the_device_with_it() -> None:
    """FRoD's bases are buffers: copied over the bus in each forward pass they would quadruple its step on FLUX.2."""
    pytest.importorskip("diffusers")
    frod = PeftAdapter.of({"peft_type": "FROD", "target_modules": ["to_q", "to_qkv_mlp_proj"]})
    step, _ = traced.of_method(CONFIG, frod, SETUP)
    made = [op for part, _ in step.parts() for op in part.ops]
    assert made
    assert not [op for op in made if op.attrs.bus]


def test_the_bundled_model_has_the_parameters_that_peft_counts() -> None:
    """PEFT's results/full-finetuning--flux2-klein-default.json: 3,875,544,576 of them train."""
    pytest.importorskip("diffusers")
    model = build_model(load("flux.2-klein-4b"), Setup())
    assert sum(p.numel() for p in model.parameters()) == 3_875_544_576
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_recorded_program_holds_for_other_images(tmp_path: Path) -> None:
    """The size of the image is what people change; no size may need another trace, and none without an image is one."""
    pytest.importorskip("diffusers")
    model = recorded.traced(CONFIG, tmp_path)
    from perfmodel import predict

    found = {seq: predict(model, "full", batch=2, seq=seq, device="l40s") for seq in (576, 1536)}
    again = traced.of_method(CONFIG, "full", Setup(batch=2, seq=1536))[0]
    made = sum(costs.flops(op) * times for part, op, times in again.ops() if part.phase != "optimizer")
    assert found[1536].flops["forward"] + found[1536].flops["backward"] == made
    with pytest.raises(UserError, match="it counts the 512 tokens of the text"):
        predict(model, "full", batch=2, seq=512, device="l40s")


def test_an_experiment_of_pefts_image_benchmark_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 x 64 pixels are 16 tokens of the image; without --traced the complaint names it."""
    pytest.importorskip("diffusers")
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "home"))
    path = experiment(tmp_path)
    assert "a model of images has no built-in form: add --traced" in asked("--config", str(path)).stderr
    found = asked("--config", str(path), "--traced", "--json")
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout)
    assert (answer["setup"]["batch"], answer["setup"]["seq"], answer["setup"]["checkpoint"]) == (2, 528, "block")
    assert answer["method"] == "lora"
    assert answer["differs_from_config"] == []
    assert any("latents and text embeddings are made before the training" in note for note in answer["notes"])
    assert not any("the embedding's output" in note for note in answer["notes"]), "it has none"


def test_what_an_experiment_asks_for_otherwise_stands_in_the_first_line(tmp_path: Path) -> None:
    """Adapters in 16 bit and another optimizer of the adapter are not what a trace of its config runs."""
    from perfmodel.imports import read

    path = experiment(tmp_path, autocast_adapter_dtype=False, optimizer_type="lora+", max_sequence_length=256)
    usual, line = read(experiment(tmp_path / "usual")).first_line, read(path).first_line
    assert "max_sequence_length" not in usual
    for key in ("autocast_adapter_dtype", "optimizer_type", "max_sequence_length"):
        assert key in line
