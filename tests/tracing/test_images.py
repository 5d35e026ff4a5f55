"""Models of images and text: a trace of fake images is what a step on real ones dispatches."""

from collections import Counter
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perfmodel import UserError, traced
from perfmodel.architectures import Config, load
from perfmodel.prediction.predict import predict
from perfmodel.setup import Setup
from perfmodel.tracing import programs
from perfmodel.tracing.known import VALUE
from perfmodel.tracing.programs.image_text import IMAGE, TAKES
from perfmodel.tracing.programs.image_text import TEXT as TEXT_TOKEN
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
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {**TEXT, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
         "vision_config": {**TOWER, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
         "image_token_id": 63},
    ),
    "pixtral": (
        "LlavaForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "mistral"}, "image_token_index": 63, "vision_feature_layer": -1,
         "vision_feature_select_strategy": "full", "vision_config": {**TOWER, "head_dim": 16, "model_type": "pixtral"}},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "mistral"}, "image_token_index": 63, "spatial_merge_size": 2,
         "vision_config": {**TOWER, "head_dim": 16, "image_size": 112, "model_type": "pixtral"}},
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "llama"}, "image_token_id": 63, "scale_factor": 4,
         "vision_config": {**TOWER, "model_type": "smolvlm_vision"}},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        {"text_config": {**TEXT, "model_type": "qwen3"}, "image_token_id": 63, "image_seq_length": 4,
         "vision_config": {**TOWER, "image_size": [56, 56], "patch_size": [14, 14]}},
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {"text_config": {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0},
         "image_token_index": 63, "vision_config": {**TOWER, "num_global_layers": 1, "attention_heads": 2,
         "intermediate_layers_indices": [0], "vision_output_dim": 64}},
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "image_token_id": 63,
         "vision_config": {**QWEN, "image_size": 56, "spatial_merge_size": 2, "out_hidden_size": 32}},
    ),
    "paddleocr_vl": (
        "PaddleOCRVLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "image_token_id": 63,
         "vision_config": {**TOWER, "spatial_merge_size": 2}},
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
SETUP = Setup(batch=2, seq=128, dtype="fp32", images=2, image_size=(84, 112))


def config_of(name: str) -> Config:
    head, values = SMALL[name]
    return Config({"model_type": "llava" if name == "pixtral" else name, "architectures": [head], **values}, name, name)


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


@pytest.mark.parametrize("size", [(448, 448), (300, 900), (1000, 700), (64, 2000), (60, 40)])
def test_images_are_cut_as_the_processors_of_transformers_cut_them(size: tuple[int, int]) -> None:
    """How many tiles and tokens an image becomes decides what the tower computes and what fits into a sample."""
    pytest.importorskip("PIL")
    smolvlm, got_ocr2, pixtral = (
        import_module(f"transformers.models.{name}.image_processing_pil_{name}")
        for name in ("smolvlm", "got_ocr2", "pixtral")
    )
    sides = {"size": {"longest_edge": 224}, "max_image_size": {"longest_edge": 56}}
    tiles, rows, _ = smolvlm.SmolVLMImageProcessorPil().get_number_of_image_patches(*size, sides)
    assert Counter(kinds_of("smolvlm", size)) == {IMAGE: tiles, TEXT_TOKEN: 2 * tiles + rows + 2}
    sides = {"patch_size": {"height": 56, "width": 56}, "crop_to_patches": True}
    tiles = got_ocr2.GotOcr2ImageProcessorPil().get_number_of_image_patches(*size, sides)
    assert kinds_of("internvl", size) == [IMAGE] * 4 * tiles
    height, width = pixtral.get_resize_output_image_size(np.zeros((*size, 3)), 112, 28)
    assert kinds_of("mistral3", size) == ([IMAGE] * (width // 28) + [TEXT_TOKEN]) * (height // 28)


def kinds_of(name: str, size: tuple[int, int]) -> list[int]:
    """Types of the tokens that stand for an image of a size."""
    config = programs.config_of(config_of(name))
    takes = TAKES[config.model_type, config.vision_config.model_type]
    return takes.see(config, replace(SETUP, image_size=size)).kinds


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
    assert any("1 image of 112 x 112 pixels a sample" in note for note in steps[2].notes)


def test_a_kept_program_does_not_hold_for_samples_that_its_images_do_not_fit_into() -> None:
    """It holds for longer ones; where the images begin to fit no config says."""
    model, setup = traced(config_of("qwen2_5_vl")), Setup(batch=2, seq=96, images=2, image_size=(112, 112))
    one, both = (predict(model, "full", replace(setup, seq=seq), "l40s") for seq in (192, np.array([96, 192])))
    assert both.flops["total"][1] == one.flops["total"]
    with pytest.raises(UserError, match="raise --seq"):
        predict(model, "full", replace(setup, seq=32), "l40s")


def test_a_tower_that_does_not_run_gets_no_gradients() -> None:
    """Text alone: AdamW keeps no state for parameters whose gradient never comes."""
    step, _ = of_method(config_of("llava"), "full", Setup(batch=1, seq=16))
    used = {p.name.split(".")[1] for p in step.parameters if p.used}
    assert used == {"language_model"} | {p.name.split(".")[1] for p in step.parameters if p.name.startswith("lm_head")}


@pytest.mark.parametrize(
    ("name", "setup", "says"),
    [
        ("llava", {"seq": 30}, "raise --seq"),
        ("siglip", {"seq": 96}, "not modelled for llava"),
        ("llama", {"seq": 96}, "takes no images$"),
        ("gemma", {"seq": 96}, "takes no images; gemma-3-4b-vision does"),
    ],
)
def test_images_that_nobody_can_take_are_refused(name: str, setup: dict[str, Any], says: str) -> None:
    configs = {
        "llava": config_of("llava"),
        "siglip": Config(
            {**config_of("llava").values, "vision_config": {**TOWER, "model_type": "siglip_vision_model"}}, "s", "s"
        ),
        "gemma": load("gemma-3-4b"),
        "llama": Config({**TEXT, "model_type": "llama"}, "llama", "llama"),
    }
    with pytest.raises(UserError, match=says):
        predict(traced(configs[name]), "full", Setup(batch=1, images=2, **setup), "l40s")


def test_a_tower_of_many_blocks_gives_the_outputs_that_are_chosen_among_them() -> None:
    """LLaVA takes those of the last block but one; hooks stood on the few blocks that were traced first."""
    head, values = SMALL["llava"]

    def calls(blocks: int) -> int:
        tower = {**values["vision_config"], "num_hidden_layers": blocks}
        own = {**values, "vision_config": tower, "model_type": "llava", "architectures": [head]}
        step, _ = of_method(Config(own, "llava", "llava"), "full", SETUP)
        return sum(count for part, _, count in step.ops() if part.phase == "forward")

    six, seven, eight = (calls(n) for n in (6, 7, 8))
    assert eight - seven == seven - six > 0
