"""Configs: the bundled ones have the published parameter counts, broken ones are refused in one line that helps.

Also: that the tape of every bundled model can be recorded at all.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from helpers import NAMES, SMALL, architecture_of, config_of, setup_of, step_of

from perfmodel import architectures
from perfmodel.architectures import Config, from_config, load
from perfmodel.architectures.runs import runs_of_layers
from perfmodel.errors import UserError
from perfmodel.methods import parse
from perfmodel.methods.parts.targeted import matches
from perfmodel.prediction.predict import predict

# Parameters of the checkpoints, tied weights once. "published": that exact figure was seen in public code, presets or
# hub listings; "built": `num_parameters()` of the transformers model of the same config (transformers 5.24). The
# sources of each are listed with the model files' own `_source` and were checked on 2026-11-24.
PUBLISHED = {
    "codellama-34b": 33_743_970_304,  # Together's catalogue
    "gpt-neo-2.7b": 2_651_307_520,  # stored public code
    "gpt2": 124_439_808,  # KerasHub presets
    "gpt2-xl": 1_557_611_200,  # KerasHub presets
    "llama-2-7b": 6_738_415_616,  # PEFT's "all params" line
    "llama-2-13b": 13_015_864_320,  # stored public code
    "llama-2-70b": 68_976_648_192,  # stored public code
    "llama-3-8b": 8_030_261_248,  # stored public code
    "llama-3.1-8b": 8_030_261_248,  # stored public code, keyed by meta-llama/Llama-3.1-8B
    "llama-3.1-70b": 70_553_706_496,  # the hub's safetensors total
    "llama-3.2-3b": 3_212_749_824,  # PEFT benchmark: num_total_params - num_trainable_params
    "mistral-7b": 7_241_732_096,  # stored public code
    "pythia-1.4b": 1_414_647_808,  # the model card's table of Pythia
    "roberta-large": 355_412_057,  # the hub's listing of F32 tensors
    "qwen2.5-3b": 3_085_938_688,  # stored public code
    "qwen2.5-7b": 7_615_616_512,  # stored public code
    "qwen2.5-14b": 14_770_033_664,  # stored public code
    "qwen2.5-32b": 32_763_876_352,  # stored public code
    "smollm2-135m": 134_515_008,  # stored public code
    "smollm2-360m": 361_821_120,  # stored public code
    "smollm2-1.7b": 1_711_376_384,  # stored public code
    "tinyllama-1.1b": 1_100_048_384,  # the hub's safetensors total
    # All of the following: stored public code, on 2026-11-29.
    "deepseek-coder-1.3b": 1_346_471_936,
    "deepseek-coder-6.7b": 6_740_512_768,
    "deepseek-llm-7b": 6_910_365_696,
    "deepseek-r1-qwen-1.5b": 1_777_088_000,
    "distilgpt2": 81_912_576,
    "gemma-2-27b": 27_227_128_320,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3-70b": 70_553_706_496,
    "ministral-8b": 8_019_808_256,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen1.5-14b": 14_167_290_880,
    "qwen1.5-32b": 32_512_218_112,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2-72b": 72_706_203_648,
    "glm-4-9b-0414": 9_400_279_040,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "granite-3.3-8b": 8_170_864_640,
    "mixtral-8x7b": 46_702_792_704,
    "olmo-2-32b": 32_234_279_936,
    "phi-4": 14_659_507_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm3-3b": 3_075_098_624,
    "stablelm-2-1.6b": 1_644_515_328,
    "solar-10.7b": 10_731_524_096,
    "yi-6b": 6_061_035_520,
    "yi-9b": 8_829_407_232,
    "yi-1.5-34b": 34_388_917_248,
}
BUILT = {
    "bert-base": 109_514_298, "bert-large": 335_174_458, "gpt-neo-1.3b": 1_315_575_808,
    "roberta-base": 124_697_433, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gpt3-xl": 2_879_554_560, "gpt3-2.7b": 2_651_553_280,
    "llama-3.2-1b": 1_235_814_400, "mistral-7b-v0.3": 7_248_023_552, "opt-125m": 125_239_296,
    "opt-1.3b": 1_315_758_080, "opt-2.7b": 2_651_596_800, "opt-6.7b": 6_658_473_984, "qwen1.5-1.8b": 1_836_828_672,
    "qwen1.5-7b": 7_721_324_544, "qwen-1.8b": 1_836_828_672, "qwen-7b": 7_721_324_544,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "bert-base-cased": 108_340_804, "bert-large-cased": 333_610_308, "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160, "codellama-70b": 68_976_910_336, "codestral-22b": 22_247_282_688,
    "deepseek-coder-33b": 33_342_991_360, "falcon3-1b": 1_669_408_768, "falcon3-3b": 3_227_655_168,
    "falcon3-7b": 7_455_550_464, "falcon3-10b": 10_305_653_760, "gpt-neo-125m": 125_198_592,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-30b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama-3.3-70b": 70_553_706_496, "mathstral-7b": 7_248_023_552, "mistral-7b-v0.2": 7_241_732_096,
    "mistral-large-123b": 122_610_069_504, "mistral-small-22b": 22_247_282_688, "open-llama-3b": 3_426_473_600,
    "open-llama-7b": 6_738_415_616, "open-llama-13b": 13_015_864_320, "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288, "opt-66b": 65_719_701_504, "qwen1.5-0.5b": 463_987_712, "qwen1.5-4b": 3_950_369_280,
    "qwen1.5-72b": 72_287_920_128, "qwen1.5-110b": 111_209_914_368, "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304, "qwen2-7b": 7_615_616_512, "smollm-135m": 134_515_008, "smollm-360m": 361_821_120,
    "smollm-1.7b": 1_711_376_384, "yi-34b": 34_388_917_248, "yi-1.5-6b": 6_061_035_520, "yi-1.5-9b": 8_829_407_232,
    "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2b": 2_506_172_416, "gemma-3-1b": 999_885_952,
    "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760, "olmo-2-7b": 7_298_617_344, "olmo-3-7b": 7_298_011_136,
    "aya-23-8b": 8_028_033_024, "starcoder2-7b": 7_173_923_840, "stablelm-2-1.6b": 1_644_515_328,
    "smollm3-3b": 3_075_098_624, "glm-4-9b": 9_399_951_360,
    "phi-2": 2_779_683_840, "falcon-7b": 6_921_720_704,
    "starcoderbase-1b": 1_137_207_296, "distilbert-base": 66_985_530, "t5-base": 222_903_552,
    "command-r-35b": 34_980_831_232, "falcon-40b": 41_303_293_952, "gemma-7b": 8_537_680_896,
    "gemma-3-270m": 268_098_176, "gemma-3-4b": 3_880_263_168, "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304, "mixtral-8x22b": 140_630_071_296, "olmo-2-1b": 1_484_916_736,
    "olmo-2-13b": 13_716_198_400, "phi-1.5": 1_418_270_720, "phi-3-mini": 3_821_079_552,
    "phi-3-medium": 13_960_238_080, "pythia-70m": 70_426_624, "pythia-160m": 162_322_944, "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632, "pythia-1.4b": 1_414_647_808, "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016, "pythia-12b": 11_846_072_320, "qwen3-235b-a22b": 235_093_634_560,
    "stablelm-3b-4e1t": 2_795_443_200,
}  # fmt: skip


def known(name: str) -> bool:
    return load(name).values["model_type"] in architectures.supported()


@pytest.mark.parametrize(("name", "parameters"), [x for x in (*PUBLISHED.items(), *BUILT.items()) if known(x[0])])
def test_bundled_models_have_their_published_parameter_count(name: str, parameters: int) -> None:
    """The first figure a user compares; it also fixes every width of the model."""
    attention = "sdpa" if load(name).values["model_type"] == "qwen" else "eager"
    step = step_of(from_config(load(name)), batch=1, seq=8, attention=attention)
    assert step.total == step.trainable == parameters


def test_every_bundled_model_of_a_known_type_has_a_count_here() -> None:
    """A new model file comes with a checked count."""
    assert {name for name in architectures.model_names() if known(name)} <= set(PUBLISHED) | set(BUILT)


def refusal(values: dict[str, Any]) -> str:
    """The message with which a config is refused: one line."""
    with pytest.raises(UserError) as caught:
        from_config(Config(values, "my/config.json", "mine"))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("my/config.json: ")
    return message


REQUIRED = [
    (name, key)
    for name in NAMES
    for key in SMALL[name]
    if (key.endswith("size") and key != "window_size")
    or key.startswith(("n_", "num_", "max_", "ffn"))
    or key == "model_type"
]


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in REQUIRED if k != "num_key_value_heads"])
def test_a_missing_key_is_named(name: str, key: str) -> None:
    """A default for a missing width would be a wrong answer that looks right."""
    values = {k: v for k, v in SMALL[name].items() if k != key}
    assert repr(key) in refusal(values)
    assert "missing" in refusal(values)


@pytest.mark.parametrize("bad", ["64", 64.0, 0, -64, True, [64], {"a": 1}])
@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in REQUIRED if k != "model_type"])
def test_a_mistyped_key_is_named_with_its_value(name: str, key: str, bad: Any) -> None:
    """JSON knows no ints apart from floats, and people edit configs by hand."""
    message = refusal({**SMALL[name], key: bad})
    assert key in message
    assert repr(bad) in message


OWN_HEAD_DIM = ("qwen3", "gemma", "glm", "glm4", "ministral", "ministral3", "seed_oss")  # that of heads is not derived


@pytest.mark.parametrize("bad", [7, ["llama"], True, {}])
def test_a_model_type_that_is_no_string_is_refused(bad: Any) -> None:
    """It is used as a key of a registry: a list there would be a traceback."""
    assert "model_type" in refusal({**SMALL["llama"], "model_type": bad})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OWN_HEAD_DIM])
def test_heads_that_do_not_divide_the_width_are_refused(name: str) -> None:
    """Rounding the head size down would lose a part of the model."""
    key = {"gpt2": "n_head", "gpt_bigcode": "n_head", "gpt_neo": "num_heads"}.get(name, "num_attention_heads")
    message = refusal({**SMALL[name], key: 5, "num_key_value_heads": 5})
    assert "64" in message
    assert "5" in message
    assert "divisible" in message


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_kv_heads_that_do_not_divide_the_heads_are_refused(name: str) -> None:
    """Grouped-query attention needs whole groups."""
    assert "num_key_value_heads 3" in refusal({**SMALL[name], "num_key_value_heads": 3})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"hidden_act": "gelu"}), ("gemma2", {"hidden_activation": "gelu"}), ("llama", {"head_dim": 15}),
        ("opt", {"do_layer_norm_before": False}), ("opt", {"word_embed_proj_dim": 32}),
        ("opt", {"activation_function": "gelu"}), ("gpt2", {"activation_function": "relu"}),
        ("bert", {"position_embedding_type": "relative_key"}), ("bert", {"hidden_act": "relu"}),
        ("gpt2", {"resid_pdrop": 1.5}), ("bert", {"hidden_dropout_prob": "0.1"}), ("llama", {"attention_bias": 1}),
        ("llama", {"tie_word_embeddings": "yes"}), ("qwen2", {"layer_types": ["sliding_attention"] * 3}),
        ("qwen3", {"layer_types": ["full_attention"]}), ("gemma2", {"layer_types": ["chunked_attention"] * 5}),
        ("gemma2", {"use_bidirectional_attention": True}), ("gemma2", {"attn_logit_softcapping": "50"}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}), ("gemma", {"hidden_act": "relu"}),
        ("gemma3_text", {"use_bidirectional_attention": True}), ("cohere", {"use_qk_norm": True}),
        ("smollm3", {"no_rope_layers": [1, 0]}), ("smollm3", {"no_rope_layers": [1, 1, 1, 1, 2]}),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5, "sliding_window": 0}),
        ("phi3", {"rope_scaling": "longrope"}), ("phi3", {"partial_rotary_factor": "half"}),
        ("glm", {"partial_rotary_factor": 0.03}), ("stablelm", {"qk_layernorm": True}),
        ("stablelm", {"use_parallel_residual": True}), ("starcoder2", {"hidden_act": "silu"}),
        ("exaone4", {"sliding_window_pattern": "LLLG"}),
        ("gpt_neox", {"rotary_pct": 0.1}), ("gpt_neox", {"hidden_act": "sigmoid"}), ("phi", {"qk_layernorm": True}),
        ("phi", {"partial_rotary_factor": 1.5}), ("falcon", {"alibi": True}), ("falcon", {"parallel_attn": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 3}), ("phi", {"num_key_value_heads": 3}),
        ("gpt_bigcode", {"scale_attn_weights": False}),
        ("roberta", {"position_embedding_type": "relative_key"}), ("roberta", {"max_position_embeddings": 2}),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}), ("bert", {"architectures": ["BertLMHeadModel"]}),
        ("falcon", {"architectures": ["FalconForTokenClassification"]}), ("llama", {"architectures": ["LlamaModel"]}),
        ("llama", {"num_labels": 1, "architectures": ["LlamaForSequenceClassification"]}),
    ],
)  # fmt: skip
def test_what_the_tape_does_not_mirror_is_refused_by_name(name: str, change: dict[str, Any]) -> None:
    """A variant that is silently treated as the usual one would be priced wrongly."""
    assert list(change)[-1] in refusal({**SMALL[name], **change})


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.5] * 6}

# What `config.json` may hold besides, and which changes the program that transformers runs.
VARIANTS = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"scale_attn_weights": False}),
    ("bert", {"is_decoder": True}),
    ("bert", {"chunk_size_feed_forward": 3}),
    ("opt", {"enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("opt", {"layerdrop": 0.1}),
    ("llama", {"pretraining_tp": 2}),
    ("llama", {"quantization_config": {"load_in_4bit": True}}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2, "attention_bias": True}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True}),
    ("gemma2", {"layer_types": ["full_attention"] * 4 + ["sliding_attention"], "sliding_window": 5}),
    ("gemma", {"attention_bias": True, "hidden_act": "gelu", "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gemma3_text", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 5}),
    ("gemma3_text", {"layer_types": ["full_attention"] * 5}),
    ("phi3", {"sliding_window": 5, "attention_dropout": 0.1}),
    ("phi3", {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": None}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [0, 1, 1, 0, 1]}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("cohere", {"attention_bias": True}),
    ("cohere2", {"sliding_window": 5, "layer_types": ["full_attention"] + ["sliding_attention"] * 4}),
    ("glm", {"partial_rotary_factor": 1.0}),
    ("glm4", {"attention_bias": True}),
    ("olmo3", {"sliding_window": 5}),
    ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 5}),
    ("exaone4", {"sliding_window": 5}),
    ("ministral", {"layer_types": ["full_attention"] + ["sliding_attention"] * 2, "sliding_window": 5}),
    ("ministral3", {"sliding_window": 5, "tie_word_embeddings": True}),
    ("seed_oss", {"attention_out_bias": True, "mlp_bias": True, "head_dim": None}),
    ("stablelm", {"use_qkv_bias": False, "partial_rotary_factor": 0.5}),
    ("starcoder2", {"sliding_window": 5, "use_bias": False}),
    ("phi", {"num_key_value_heads": 2, "resid_pdrop": 0.1, "hidden_act": "gelu"}),
    ("gpt_neox", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}}),
]


@pytest.mark.parametrize(("name", "change"), VARIANTS)
def test_a_variant_that_runs_another_program_is_mirrored_or_refused(name: str, change: dict[str, Any]) -> None:
    """Found by reading the config classes of transformers: either the tape follows the key, or it says no."""
    pytest.importorskip("peft")
    from validate.oracle import cases, counts

    config = config_of(name, **change)
    try:
        from_config(config)
    except UserError:
        return
    assert counts.compare_case(cases.Case(config, "full", setup_of(name, batch=2, seq=9))).differences == []


@pytest.mark.parametrize("name", NAMES)
def test_traits_name_layers_and_norms_that_exist(name: str) -> None:
    """A default target that matches nothing, or a norm that is forgotten, would be silently left out."""
    architecture = architecture_of(name)
    for targets in asdict(architecture.traits.targets).values():
        for target in targets or ():
            assert any(matches(layer, target) for layer in architecture.linear_names()), target
    norms = [p.name.rsplit(".", 2)[-2] for p in step_of(architecture, "full").parameters if p.kind == "norm"]
    assert set(norms) == set(architecture.traits.norms)


def test_an_architecture_without_traits_is_no_architecture() -> None:
    """Defaults would be somebody else's: GPT-2's layers, Llama's norms."""
    with pytest.raises(TypeError, match="Toy must define traits"):

        @architectures.architecture("toy")
        class Toy(architectures.Architecture):
            layer_path = "layers"


def test_a_gemma_that_sees_images_is_answered_by_its_text_model_and_says_so() -> None:
    """Most Gemma 3s on the hub are such files; an answer that kept silent about the vision tower would be misread."""
    text = {key: value for key, value in SMALL["gemma3_text"].items() if key not in ("model_type", "vocab_size")}
    config = Config({"model_type": "gemma3", "text_config": text, "vision_config": {}}, "gemma3", "gemma3")
    alone = architecture_of("gemma3_text", vocab_size=262_208)
    assert asdict(from_config(config)) | {"note": ""} == {**asdict(alone), "name": "gemma3", "model_type": "gemma3"}
    assert any("only the text model" in note for note in predict(from_config(config), "lora", device="l40s").notes)
    assert "text_config" in refusal({"model_type": "gemma3"})


def test_layers_that_alternate_are_recorded_as_a_pattern() -> None:
    """26 layers of two kinds are two recordings beside the first and the last, not 26."""
    architecture = architecture_of("gemma2", layers=26, layer_types=None)
    method = parse("full").bind(architecture)
    assert runs_of_layers(architecture, method) == [(0, 1, 1), (1, 2, 12), (25, 1, 1)]
    assert runs_of_layers(architecture_of("llama", layers=26), method) == [(0, 1, 1), (1, 1, 25)]


def test_an_unsupported_model_type_lists_the_supported_ones() -> None:
    """The user learns at once what can be asked instead."""
    message = refusal({**SMALL["llama"], "model_type": "lama"})
    assert "did you mean 'llama'?" in message
    assert all(name in message for name in architectures.supported())


def message_of(path: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"), (b"{", "not valid JSON"), (b"not json", "not valid JSON"), (b"\xff\xfe", "read"),
        (b"[1, 2]", "holds a list"), (b"null", "holds nothing"), (b"3", "holds a number"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    """An interrupted download is the usual reason."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for where in (path, tmp_path):
        message = message_of(where)
        assert str(path) in message
        assert expected in message


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """A checkpoint folder of another format."""
    assert f"{tmp_path} has no config.json" in message_of(tmp_path)


def test_a_config_is_read_from_its_file_or_its_folder(tmp_path: Path) -> None:
    """Both are what people have: the folder of a checkpoint, or the one file."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL["llama"]))
    (folder / "other.json").write_text(json.dumps(SMALL["gpt2"]))
    assert [load(str(p)).name for p in (folder, folder / "config.json", folder / "other.json")] == [
        "my-model", "my-model", "other",
    ]  # fmt: skip
    assert from_config(load(str(folder))).model_type == "llama"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    """One line, not a traceback."""
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0)
    assert "cannot be read" in message_of(path)


@pytest.mark.parametrize("name", ["", " ", "x" * 5000, "a\0b", "nowhere/config.json", "./nowhere", "/nowhere/at/all"])
def test_nonsense_is_refused_in_one_line(name: str) -> None:
    """Whatever a shell script puts there."""
    assert len(message_of(name)) < 1000


def test_a_hub_id_offline_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a cluster node without network the answer is: give the file."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = message_of("nobody/no-such-model-here")
    assert "nobody/no-such-model-here" in message
    assert "config.json" in message
