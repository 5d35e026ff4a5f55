"""DeepSpeed's ZeRO-3 as an engine of the setup, or of one method alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from perfmodel import Setup, compare, predict
from perfmodel.devices import engine, host
from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.prediction.predict import Prediction
from perfmodel.recording.deepspeed import zero3_alone
from perfmodel.report.figures import headline

ZERO3 = "deepspeed-zero3"
PLACE = {"model": "smollm2-135m", "device": "a100-80gb-sxm"}


def step(method: str = "full", **setup: Any) -> Prediction:
    return predict(PLACE["model"], method, Setup(**{"batch": 1, "seq": 256, **setup}), PLACE["device"])


def calls(p: Prediction, phase: str) -> dict[str, int]:
    assert p.step is not None
    found: dict[str, int] = {}
    for part, op, count in p.step.ops():
        if part.phase == phase and not op.view:
            found[op.name] = found.get(op.name, 0) + count
    return found


def test_what_deepspeed_adds_is_what_its_program_does() -> None:
    """Per gradient a division and a sum, a copy where it fits the bucket; per parameter a norm in fp64.

    Counted in DeepSpeed 0.19.8 on a Llama of three layers (hidden 64): 30 parameters, of which 19 fit.
    """
    plain, zero = (step(grad_accum=2, engine=name) for name in ("torch", ZERO3))
    assert plain.step is not None
    parameters = sum(p.count for p in plain.step.parameters)
    small = sum(p.count for p in plain.step.parameters if p.numel <= plain.step.architecture.hidden**2)
    before, after = calls(plain, "backward"), calls(zero, "backward")
    more = {name: after.get(name, 0) - before.get(name, 0) for name in {*before, *after}}
    assert more["div_.Tensor"] == 2 * parameters
    assert more["copy_"] == 2 * small + parameters  # the first micro-batch starts the sum
    assert more.get("add_.Tensor", 0) == 0  # as many sums as accumulation has without it
    assert calls(zero, "optimizer")["linalg_vector_norm"] == parameters + 1
    assert calls(zero, "forward") == calls(plain, "forward")


def test_memory_is_sixteen_bytes_a_parameter_and_six_while_it_steps() -> None:
    """Weights, gradients in 16 bits, master and two moments in fp32; the sub-group's gradient flat, and in fp32."""
    p = step(seq=16, checkpoint="block", engine=ZERO3)
    assert p.memory.peak / p.total_params == pytest.approx(16 + 2 + 4, rel=0.01)
    assert p.memory.weights + p.memory.gradients == 4 * p.total_params
    assert p.memory.optimizer == pytest.approx(12 * p.total_params, rel=1e-6)


def test_the_engine_casts_the_model_and_needs_no_autocast() -> None:
    """`--amp bf16` over fp32 weights is a 16-bit model with fp32 masters: the same step as bf16 weights."""
    mixed, pure = step(dtype="fp32", amp="bf16", engine=ZERO3), step(dtype="bf16", engine=ZERO3)
    assert mixed.kernels == pure.kernels
    assert mixed.memory.peak == pure.memory.peak


def test_its_python_takes_time_on_the_host_and_follows_the_host() -> None:
    """A launch-bound step takes longer with the engine, and more so on a slower host."""
    plain, zero = (step(seq=16, engine=name) for name in ("torch", ZERO3))
    slow = predict(PLACE["model"], "full", Setup(seq=16, engine=ZERO3), PLACE["device"], host="half-speed")
    assert plain.time.phases["total"] < zero.time.phases["total"] < slow.time.phases["total"]
    by = engine.under(host.load(), ZERO3)
    assert by.fetch == pytest.approx(engine.ratios(ZERO3)["fetch"] * by.module)


def test_reduction_runs_beside_the_backward_pass() -> None:
    """DeepSpeed's own stream: where products leave bandwidth it costs the device nothing, and never less than that."""
    plain, zero = (step(batch=16, seq=2048, checkpoint="block-reentrant", engine=name) for name in ("torch", ZERO3))
    assert zero.time.phases["backward"] == pytest.approx(plain.time.phases["backward"], rel=0.02)
    tiny, with_it = (step(seq=4, engine=name) for name in ("torch", ZERO3))
    assert with_it.time.device_busy > tiny.time.device_busy


def test_one_method_may_have_it_alone() -> None:
    """Full fine-tuning through DeepSpeed against LoRA without it: what many scripts compare."""
    both = compare(PLACE["model"], [f"full:engine={ZERO3}", "lora:r=8"], Setup(seq=64), PLACE["device"])
    assert [p.setup.engine for p in both.predictions] == [ZERO3, "torch"]
    assert both.predictions[0].time == step(seq=64, engine=ZERO3).time
    assert both.predictions[0].method == f"full:engine={ZERO3}"


@pytest.mark.parametrize(
    ("method", "setup", "told"),
    [
        ("full", {"engine": "deepspeed"}, "did you mean"),
        ("full:engine=zero3", {}, "engine 'zero3' is unknown"),
        ("galore:r=8", {"engine": ZERO3}, "galore: its own update is not modelled"),
        ("full", {"engine": ZERO3, "compile": "default"}, "leave out --compile"),
    ],
)
def test_what_is_not_modelled_is_refused_in_a_line(method: str, setup: dict[str, Any], told: str) -> None:
    """A figure for another program would be worse than none."""
    with pytest.raises(UserError, match=told):
        step(method, **setup)


ZERO = {"stage": 3, "overlap_comm": True}
TOGETHER = "weights updated together, not in sub-groups"


@pytest.mark.parametrize(
    ("value", "runs", "told"),
    [
        ("deepspeed_configs/zero3_bf16.json", ZERO3, TOGETHER),
        ("examples/deepspeed/ds_z3_config.json", ZERO3, "one GPU under ZeRO-3 (deepspeed)"),
        ("examples/deepspeed/ds_z3_offload_config.json", "torch", "one GPU, without ZeRO-3 with offloading"),
        ("deepspeed_configs/zero2.json", "torch", "one GPU, without ZeRO-2"),
        ("ds.json", "torch", "one GPU, without DeepSpeed"),
        ({"zero_optimization": ZERO}, ZERO3, "one GPU under ZeRO-3 (deepspeed)"),
        ({"zero_optimization": {**ZERO, "sub_group_size": 0}}, ZERO3, TOGETHER),
        ({"zero_optimization": {**ZERO, "sub_group_size": 10**9}}, ZERO3, "one GPU under ZeRO-3 (deepspeed)"),
        ({"zero_optimization": {**ZERO, "offload_optimizer": {"device": "none"}}}, ZERO3, "one GPU under ZeRO-3"),
        ({"zero_optimization": {**ZERO, "offload_param": {"device": "cpu"}}}, "torch", "with offloading"),
    ],
)
def test_training_configs_name_it(tmp_path: Path, value: Any, runs: str, told: str) -> None:
    """The key `deepspeed` of TrainingArguments, Axolotl and LLaMA-Factory: a path, or DeepSpeed's config itself."""
    configs = {
        "trl.json": {"per_device_train_batch_size": 1, "deepspeed": value},
        "axolotl.yml": {"base_model": "m", "micro_batch_size": 1, "deepspeed": value},
        "factory.yaml": {"model_name_or_path": "m", "stage": "sft", "finetuning_type": "full", "deepspeed": value},
    }
    for name, values in configs.items():
        (tmp_path / name).write_text(json.dumps(values))
        found = read(tmp_path / name)
        assert found.setup["engine"] == runs, name
        assert told in found.first_line, name
        assert "deepspeed" not in found.ignored


@pytest.mark.parametrize("device", ["cpu", "nvme"])
@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_whatever_is_offloaded_is_another_program(tmp_path: Path, section: str, device: str) -> None:
    """States or weights that travel over PCIe in every step: a figure without the way would be far too good."""
    config = {"zero_optimization": {**ZERO, section: {"device": device, "pin_memory": True}}}
    (tmp_path / "z3.json").write_text(json.dumps(config))
    for value in (config, str(tmp_path / "z3.json")):
        (tmp_path / "trl.json").write_text(json.dumps({"per_device_train_batch_size": 1, "deepspeed": value}))
        found = read(tmp_path / "trl.json")
        assert found.setup["engine"] == "torch"
        assert "without ZeRO-3 with offloading" in found.first_line


def test_a_comparison_does_not_give_one_methods_engine_to_all() -> None:
    """The line above the table describes every column."""
    alone = compare(PLACE["model"], [f"full:engine={ZERO3}", "lora:r=8"], Setup(seq=64), PLACE["device"])
    shared = compare(PLACE["model"], ["full", "lora:r=8"], Setup(seq=64, engine=ZERO3), PLACE["device"])
    assert ZERO3 not in headline(alone.predictions[0])
    assert ZERO3 in headline(shared.predictions[0])


def test_what_was_measured_elsewhere_is_said_of_deepspeed_alone() -> None:
    """A note on every answer is a note that nobody reads."""
    assert [zero3_alone.NOTE in step(engine=name).notes for name in ("torch", ZERO3)] == [False, True]
