"""Models of images and text: a trace of fake images is what a step on real ones dispatches."""

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perfmodel import UserError, traced
from perfmodel.architectures import Config
from perfmodel.prediction.predict import predict
from perfmodel.setup import Setup
from perfmodel.tracing import programs
from perfmodel.tracing.known import VALUE
from perfmodel.tracing.trace import CallRecorder, eager_program, to_fake
from perfmodel.tracing.traced import of_method

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "head_dim": 16,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "LlavaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": {**TOWER, "model_type": "clip_vision_model"},
         "image_token_index": 63},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "image_token_id": 63,
         "vision_config": {**QWEN, "fullatt_block_indexes": [1], "window_size": 56}},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "image_token_id": 63,
         "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 64}},
    ),
}  # fmt: skip
SETUP = Setup(batch=2, seq=96, dtype="fp32", images=2, image_size=(84, 112))


def config_of(name: str) -> Config:
    head, values = SMALL[name]
    return Config({"model_type": name, "architectures": [head], **values}, name, name)


def calls_of(model: Any, inputs: Any, *, knows: bool) -> Counter[Any]:
    """What forward and backward dispatch."""
    recorder = CallRecorder(knows=knows)
    recorder.recording = True
    with eager_program(), recorder.observe("step"):
        model(**inputs).loss.backward()
    return recorder.trace.calls["step"]


@pytest.mark.parametrize("name", SMALL)
def test_fake_images_dispatch_what_real_ones_do(name: str) -> None:
    """Where image tokens stand and how large an image is are data: a trace must split the work as it is split."""
    config, found = config_of(name), []
    for real in (True, False):
        family, _ = programs.family_of(config)
        model = programs.build_model(config, SETUP, device="cpu" if real else "meta").train()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        if not real:
            to_fake(model, mode, "cpu")
        with mode:
            inputs = family.inputs(model, SETUP, "cpu")
            if not real:
                found.append(calls_of(model, inputs, knows=True))
        if real:
            whole = {key: getattr(t, VALUE, torch.zeros(t.shape, dtype=t.dtype)) for key, t in inputs.items()}
            found.append(calls_of(model, whole, knows=False))
    real_calls, fake_calls = ({key: n for key, n in calls.items() if _counts(key)} for calls in found)
    assert real_calls == fake_calls


def _counts(call: Any) -> bool:
    """Gradients are added in place on real tensors alone; reads of data make no kernel on the CPU."""
    return call[0] not in ("add.Tensor", "add_.Tensor", "_local_scalar_dense")


def test_images_cost_what_their_size_costs() -> None:
    """More pixels are more patches and more tokens of the sample; without images the tower does not run."""
    model = traced(config_of("qwen2_5_vl"))
    steps = [
        predict(model, "full", Setup(batch=2, seq=96, images=n, image_size=size), "l40s")
        for n, size in ((0, (56, 56)), (1, (56, 56)), (1, (112, 112)), (2, (112, 112)))
    ]
    flops = [step.flops["total"] for step in steps]
    assert flops == sorted(set(flops))
    assert any("no vision input" in note for note in steps[0].notes)
    assert any("1 image(s) of 112 x 112 pixels" in note for note in steps[2].notes)


def test_a_tower_that_does_not_run_gets_no_gradients() -> None:
    """Text alone: AdamW keeps no state for parameters whose gradient never comes."""
    step, _ = of_method(config_of("llava"), "full", Setup(batch=1, seq=16))
    used = {p.name.split(".")[1] for p in step.parameters if p.used}
    assert used == {"language_model"} | {p.name.split(".")[1] for p in step.parameters if p.name.startswith("lm_head")}


@pytest.mark.parametrize(
    ("name", "setup", "says"),
    [
        ("llava", {"seq": 30}, "raise --seq"),
        ("pixtral", {"seq": 96}, "not modelled for llava"),
        ("llama", {"seq": 96}, "takes no images"),
    ],
)
def test_images_that_nobody_can_take_are_refused(name: str, setup: dict[str, Any], says: str) -> None:
    configs = {
        "llava": config_of("llava"),
        "pixtral": Config({**config_of("llava").values, "vision_config": {**TOWER, "model_type": "pixtral"}}, "p", "p"),
        "llama": Config({**TEXT, "model_type": "llama"}, "llama", "llama"),
    }
    with pytest.raises(UserError, match=says):
        predict(traced(configs[name]), "full", Setup(batch=1, images=2, **setup), "l40s")
