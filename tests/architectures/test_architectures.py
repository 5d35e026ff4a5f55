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
from parameter_counts import BUILT, PUBLISHED, TRACED

from perfmodel import architectures
from perfmodel.architectures import Config, from_config, load
from perfmodel.architectures.runs import runs_of_layers
from perfmodel.errors import UserError
from perfmodel.methods import parse
from perfmodel.methods.parts.targeted import matches
from perfmodel.prediction.predict import predict
from validate.oracle.cases import DISTILBERT, MIXTURES


def known(name: str) -> bool:
    return load(name).kind in architectures.supported()


@pytest.mark.parametrize(("name", "parameters"), [x for x in (*PUBLISHED.items(), *BUILT.items()) if known(x[0])])
def test_bundled_models_have_their_published_parameter_count(name: str, parameters: int) -> None:
    """The first figure a user compares; it also fixes every width of the model."""
    model = from_config(load(name))
    attention = "eager" if "eager" in model.traits.attention else model.traits.attention[0]
    objective = "reward" if model.classifier is not None and model.classifier.labels == 1 else "sft"
    step = step_of(model, batch=1, seq=8, attention=attention, objective=objective)
    assert step.total == step.trainable == parameters


@pytest.mark.parametrize(("name", "parameters"), TRACED.items())
def test_traced_models_have_their_published_parameter_count(name: str, parameters: int) -> None:
    """Their dims were quoted by many hands: a wrong one shows in the sum."""
    pytest.importorskip("transformers")
    from perfmodel.setup import Setup
    from perfmodel.tracing.programs import build_model

    assert sum(p.numel() for p in build_model(load(name), Setup()).parameters()) == parameters


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
    key = {"gpt2": "n_head", "gpt_bigcode": "n_head", "gpt_neo": "num_heads", "mpt": "n_heads"}.get(
        name, "num_attention_heads"
    )
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
        ("gpt_bigcode", {"scale_attn_weights": False}), ("mpt", {"attn_config": "alibi"}),
        ("roberta", {"position_embedding_type": "relative_key"}), ("roberta", {"max_position_embeddings": 2}),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}), ("bert", {"architectures": ["BertLMHeadModel"]}),
        ("falcon", {"architectures": ["FalconForTokenClassification"]}), ("llama", {"architectures": ["LlamaModel"]}),
        ("llama", {"problem_type": "regression", "architectures": ["LlamaForSequenceClassification"]}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}), ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"add_cross_attention": True}), ("gpt2", {"scale_attn_weights": False}), ("opt", {"layerdrop": 0.1}),
        ("bert", {"chunk_size_feed_forward": 3}), ("opt", {"enable_bias": False}), ("bert", {"is_decoder": True}),
        ("opt", {"layer_norm_elementwise_affine": False}), ("llama", {"quantization_config": {"load_in_4bit": True}}),
    ],
)  # fmt: skip
def test_what_the_tape_does_not_mirror_is_refused_by_name(name: str, change: dict[str, Any]) -> None:
    """A variant that is silently treated as the usual one would be priced wrongly."""
    assert list(change)[-1] in refusal({**SMALL[name], **change})


def test_a_classifier_of_one_label_is_a_reward_model() -> None:
    """Its own loss would be a regression's, which is not mirrored; a reward's is."""
    model = from_config(config_of("llama", num_labels=1, architectures=["LlamaForSequenceClassification"]))
    with pytest.raises(UserError, match="--objective reward"):
        step_of(model)
    assert step_of(model, objective="reward").trainable == step_of("llama", objective="reward").trainable


LONGROPE = {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [1.5] * 6}

# What `config.json` may hold besides, and which changes the program that transformers runs; others are refused above.
VARIANTS = [
    ("llama", {"pretraining_tp": 2}),
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
def test_a_variant_that_runs_another_program_is_mirrored(name: str, change: dict[str, Any]) -> None:
    """Found by reading the config classes of transformers: the tape follows the key."""
    pytest.importorskip("peft")
    from validate.oracle import cases, counts

    config = config_of(name, **change)
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
    head = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    config = Config({**head, "text_config": text, "vision_config": {}}, "gemma3", "gemma3")
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


@pytest.mark.parametrize("values", [DISTILBERT, SMALL["llama"], SMALL["gpt2"]], ids=lambda values: values["model_type"])
def test_a_head_of_its_own_is_one_matrix_more(values: dict[str, Any]) -> None:
    """Tied or not is a tenth of a small model's parameters: vocabulary x width, 128 x 64 here."""
    tied, own = (
        step_of(from_config(Config({**values, "tie_word_embeddings": tied}, "x", "x"))).total for tied in (True, False)
    )
    assert own - tied == 128 * 64


@pytest.mark.parametrize(("device", "copies"), [("cpu", 0), ("cuda", 2)])
def test_falcon_sends_the_places_of_key_and_value_to_the_gpu(device: str, copies: int) -> None:
    """`fused[:, :, :, [-2]]`: the list becomes a tensor on the host, and the host waits for each copy of it."""
    architecture = architecture_of("falcon")
    step = step_of(architecture, "full", device=device, batch=2, seq=9, attention="eager")
    sent = sum(n for _, op, n in step.ops() if op.name == "_to_copy" and op.inputs[0].shape == (1,) and op.attrs.bus)
    assert sent == copies * architecture.layers


def test_a_base_that_stays_in_mxfp4_is_refused_with_what_works() -> None:
    """The config.json of gpt-oss asks for it, and Trainer takes no such model, with adapters or without."""
    packed = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = Config({**MIXTURES["gpt_oss"], "quantization_config": packed}, "gpt-oss", "gpt-oss")
    with pytest.raises(UserError, match=r"stay in MXFP4.*remove quantization_config"):
        from_config(config)
