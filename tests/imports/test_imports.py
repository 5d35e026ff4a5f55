"""Training configs as people write them give the setup that they describe."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from fuzzing import NO_SHRINK
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import Setup, methods
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.prediction.predict import resolve

CONFIGS = Path(__file__).parents[1] / "configs"
AMP = {"dtype": "bf16", "amp": "bf16"}
FP32_AMP = {"dtype": "fp32", "amp": "bf16"}

EXPECTED: dict[str, tuple[str | None, dict[str, Any]]] = {
    "axolotl/lora-1b.yml": (
        "lora:r=16,targets=gate_proj+down_proj+up_proj+q_proj+v_proj+k_proj+o_proj,dropout=0.05,"
        "implementation=axolotl",
        {**AMP, "batch": 2, "seq": 2048, "grad_accum": 2, "checkpoint": "block-reentrant", "attention": "flash2",
         "optimizer": "adamw-fused"},
    ),
    "axolotl/lora-all-linear.yml": (
        "lora:r=32,targets=all-linear,implementation=axolotl",
        {**AMP, "batch": 2, "seq": 4096, "grad_accum": 4, "checkpoint": "block-reentrant", "attention": "sdpa",
         "optimizer": "adamw"},
    ),
    "axolotl/qlora-8b.yml": (
        "qlora:r=64,targets=all-linear,dropout=0.05,modules_to_save=embed_tokens+lm_head,implementation=axolotl",
        {**AMP, "batch": 1, "seq": 4096, "grad_accum": 4, "optimizer": "paged-adamw-8bit",
         "checkpoint": "block-reentrant"},  # Axolotl's default (utils/config/__init__.py, normalize_config)
    ),
    "axolotl/full-3b.yml": ("full", {**AMP, "seq": 8192, "kernels": "liger", "clip_grad": True, "grad_accum": 8}),
    "axolotl/dora.yml": ("dora:r=8,targets=q_proj+v_proj", {**AMP, "batch": 4, "checkpoint": "none", "seq": 1024}),
    "axolotl/rslora.yml": (
        "rslora:r=128,targets=all-linear,implementation=axolotl", {**AMP, "checkpoint": "block-reentrant"},
    ),
    "axolotl/loraplus.yml": (
        "loraplus:r=16,targets=q_proj+k_proj+v_proj+o_proj,implementation=axolotl", {"batch": 8, "checkpoint": "none"},
    ),
    "axolotl/kernels.yml": ("lora:r=16,targets=all-linear,implementation=axolotl", {"batch": 4, "grad_accum": 2}),
    "axolotl/fp16-t4.yml": (
        "lora:r=8,targets=q_proj+v_proj",
        {"dtype": "fp16", "amp": "fp16", "attention": "eager", "grad_accum": 16},
    ),
    "axolotl/fp32-no-clipping.yml": (
        "lora:r=8,targets=c_attn",
        {"dtype": "fp32", "amp": None, "clip_grad": False, "optimizer": "sgd", "attention": "sdpa"},
    ),
    "llama_factory/lora-sft.yaml": (
        "lora:r=8,targets=all-linear,modules_to_save=embed_tokens+lm_head",
        {**AMP, "batch": 1, "seq": 2048, "grad_accum": 8, "checkpoint": "block-reentrant"},
    ),
    "llama_factory/lora-qv-pretrain.yaml": (
        "lora:r=8,targets=q_proj+v_proj,dropout=0.1",
        {"dtype": "fp16", "amp": "fp16", "attention": "flash2", "optimizer": "adamw", "seq": 1024},
    ),
    "llama_factory/full-sft.yaml": ("full", {**FP32_AMP, "grad_accum": 2}),
    "llama_factory/full-pure-bf16.yaml": (
        "full", {"dtype": "bf16", "amp": None, "optimizer": "adafactor", "kernels": "liger", "seq": 4104},
    ),
    "llama_factory/freeze.yaml": (
        "top_k:k=8,trained_dtype=fp32,checkpoint_frozen=false", {**AMP, "checkpoint": "block-reentrant"},
    ),
    "llama_factory/qlora-bnb.yaml": ("qlora:r=8,targets=all-linear", {**AMP, "grad_accum": 8}),
    "llama_factory/dora.yaml": ("dora:r=16,targets=all-linear", {"checkpoint": "none", "batch": 4}),
    "llama_factory/pissa.yaml": ("pissa:r=8,targets=all-linear,niter=16", AMP),
    "llama_factory/galore.yaml": (
        "galore:r=128", {"dtype": "bf16", "amp": None, "in_backward": True, "clip_grad": False},
    ),
    "llama_factory/unsloth.yaml": (
        "lora:r=16,targets=all-linear,implementation=unsloth",
        {"checkpoint": "block-reentrant", "clip_grad": False, "batch": 2, "grad_accum": 4},
    ),
    "trl/sft-lora.json": ("lora:r=32,dropout=0.05", {**FP32_AMP, "batch": 2, "seq": 1024, "grad_accum": 8}),
    "trl/sft-full.json": ("full", {**AMP, "seq": 2048, "checkpoint": "block"}),
    "trl/sft-qlora.json": (
        "qlora:r=64,targets=q_proj+k_proj+v_proj+o_proj,adapter_dtype=bf16,dropout=0.1",
        {**AMP, "batch": 4, "optimizer": "paged-adamw-8bit", "seq": 512},
    ),
    "trl/sft-dora.json": ("dora:r=16,targets=q_proj+v_proj", {**AMP, "checkpoint": "none", "seq": 256}),
    "trl/sft-all-linear.json": (
        "lora:r=16,targets=all-linear,dropout=0.05",
        {"attention": "flash2", "checkpoint": "block-reentrant", "batch": 4, "grad_accum": 4},
    ),
    "trl/sft-fp16.json": ("lora:r=8,targets=q_proj+v_proj,dropout=0.05", {"dtype": "fp16", "amp": "fp16", "seq": 512}),
    "trl/sft-liger.json": ("full", {"kernels": "liger+trl", "optimizer": "adamw-fused", "checkpoint": "block"}),
    "trl/arguments-only.json": (
        None, {**FP32_AMP, "dtype": "bf16", "batch": 16, "grad_accum": 2, "checkpoint": "none"},
    ),
    "trl/arguments-fp32.json": (
        None, {"dtype": "fp32", "amp": None, "optimizer": "sgd", "clip_grad": False, "checkpoint": "block"},
    ),
    "trl/sft-rslora.json": ("rslora:r=64,targets=q_proj+v_proj", {"batch": 2, "seq": 1024}),
    "peft/lora.json": ("lora:r=16,targets=q_proj+v_proj,dropout=0.05", {}),
    "peft/lora-new-tokens.json": (
        "lora:r=16,targets=q_proj+v_proj,dropout=0.05,modules_to_save=embed_tokens+lm_head", {},
    ),
    "peft/dora-top-layers.json": ("dora:r=4,targets=c_attn,layers_to_transform=10+11", {}),
    "peft/vera.json": ("vera:r=256,targets=q_proj+v_proj", {}),
    "peft/ia3.json": ("ia3:targets=k_proj+v_proj+down_proj,feedforward=down_proj", {}),
    "peft/prompt.json": ("prompt_tuning:tokens=16", {}),
}  # fmt: skip


def test_every_config_is_expected() -> None:
    """A file without an expectation would test nothing."""
    found = {str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob("*.*")}
    assert found == set(EXPECTED)
    for tool in ("axolotl", "llama_factory", "trl"):
        assert sum(name.startswith(tool) for name in found) >= 10


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_gives_the_setup_that_it_describes(name: str) -> None:
    """Method and setup, key by key, and the model that the file names."""
    method, setup = EXPECTED[name]
    found = read(CONFIGS / name)
    assert {key: found.setup.get(key) for key in setup} == setup
    Setup(**found.setup)
    if method is None:
        assert (found.method, found.model) == (None, None)
        return
    assert found.method is not None
    assert methods.parse(found.method).spec() == methods.parse(method).spec()
    assert found.model is not None
    resolve(found.model, found.method)


def test_what_has_no_weight_is_told_as_ignored() -> None:
    """A user sees which keys had no effect; none that has one is among them."""
    found = read(CONFIGS / "axolotl/lora-1b.yml")
    assert {"learning_rate", "datasets", "output_dir", "lora_alpha"} <= set(found.ignored)
    assert not {"micro_batch_size", "lora_r", "adapter", "bf16", "optimizer", "flash_attention"} & set(found.ignored)


DEFAULTS: dict[str, tuple[dict[str, Any], str]] = {  # what a tool takes where the file says nothing, by its sources
    "trl.json": ({"max_length": 64, "use_peft": True}, "lora:r=16,dropout=0.05"),  # trl/trainer/model_config.py
    "axolotl.yml": (  # axolotl/utils/schemas/peft.py has none for lora_r, PEFT's is 8
        {"base_model": "gpt2", "micro_batch_size": 1, "adapter": "lora", "lora_target_modules": ["c_attn"]},
        "lora:r=8,targets=c_attn",
    ),
    "lora.yaml": (  # llamafactory/hparams/finetuning_args.py
        {"model_name_or_path": "gpt2", "cutoff_len": 64, "finetuning_type": "lora"}, "lora:r=8,targets=all-linear",
    ),
    "galore.yaml": (
        {"model_name_or_path": "gpt2", "cutoff_len": 64, "finetuning_type": "full", "use_galore": True}, "galore:r=16",
    ),
    "apollo.yaml": (
        {"model_name_or_path": "gpt2", "cutoff_len": 64, "finetuning_type": "full", "use_apollo": True}, "apollo:r=16",
    ),
    "gap.yaml": (
        {"model_name_or_path": "gpt2", "finetuning_type": "full", "use_galore": True, "galore_update_interval": 50},
        "galore:r=16,update_proj_gap=50",
    ),
    "freeze.yaml": (
        {"model_name_or_path": "gpt2", "cutoff_len": 64, "finetuning_type": "freeze"},
        "top_k:k=2,trained_dtype=fp32,checkpoint_frozen=false",
    ),
    "pro.yaml": (  # model/adapter.py, `_setup_freeze_tuning`
        {"model_name_or_path": "gpt2", "finetuning_type": "freeze", "use_llama_pro": True},
        "top_k:k=2,trained_dtype=fp32,spread=true,checkpoint_frozen=false",
    ),
    "oft.yaml": ({"model_name_or_path": "gpt2", "finetuning_type": "oft"}, "oft:block_size=32,targets=all-linear"),
    "qoft.yaml": (
        {"model_name_or_path": "gpt2", "finetuning_type": "oft", "quantization_bit": 4}, "qoft:targets=all-linear",
    ),
    "oft_target.yaml": (  # which no code of LLaMA-Factory reads (model/adapter.py, `_setup_lora_tuning`)
        {"model_name_or_path": "gpt2", "finetuning_type": "oft", "oft_target": "c_fc", "lora_target": "c_attn"},
        "oft:block_size=32,targets=c_attn",
    ),
    "v1.yaml": (  # llamafactory/v1/plugins/model_plugins/peft.py
        {"model": "gpt2", "model_class": "llm", "peft_config": {"name": "lora"}},
        "lora:r=8,targets=all-linear,dropout=0.05",
    ),
    "v1-freeze.yaml": (  # v1/core/base_trainer.py, `gradient_checkpointing_enable`: of every block
        {"model": "gpt2", "model_class": "llm", "peft_config": {"name": "freeze"}}, "top_k:k=2,trained_dtype=fp32",
    ),
    "v1_auto.yaml": (  # llamafactory/v1/plugins/model_plugins/quantization.py
        {"model": "gpt2", "model_class": "llm", "peft_config": {"name": "lora"}, "quant_config": {"name": "auto"}},
        "lora:r=8,targets=all-linear,dropout=0.05",
    ),
    "v1_once.yaml": (
        {"model": "gpt2", "peft_config": {"name": "lora"},
         "quant_config": {"name": "bnb", "double_quantization": False}},
        "qlora:r=8,targets=all-linear,dropout=0.05,double_quant=false,compute_dtype=fp16",
    ),
    "v1_bf16.yaml": (
        {"model": "gpt2", "peft_config": {"name": "lora"},
         "quant_config": {"name": "bnb", "compute_dtype": "bfloat16"}},
        "qlora:r=8,targets=all-linear,dropout=0.05",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_file_leaves_out_is_the_tools_default(tmp_path: Path, name: str) -> None:
    """Most files say little: a rank of another tool would be another method."""
    values, method = DEFAULTS[name]
    (tmp_path / name).write_text(json.dumps(values))
    found = read(tmp_path / name).method
    assert found is not None
    assert methods.parse(found).spec() == methods.parse(method).spec()


BASE = "base_model: gpt2\nmicro_batch_size: 1\nsequence_len: 64\nlora_target_modules: [c_attn]\n"
FACTORY = "model_name_or_path: gpt2\ncutoff_len: 64\n"


@pytest.mark.parametrize(
    ("suffix", "text", "words"),
    [
        ("yml", BASE + "adapter: qlora", "needs load_in_4bit"),
        ("yml", BASE + "adapter: qlora\nload_in_8bit: true", "needs load_in_4bit"),
        ("yml", BASE + "adapter: lorra", "use lora or qlora"),
        ("yml", BASE + "adapter: lora\nlora_r: -3", "lora_r must be a positive integer"),
        ("yml", BASE + "adapter: lora\nlora_r: many", "lora_r must be a positive integer"),
        ("yml", BASE + "optimizer: adamw_torsh", "did you mean 'adamw_torch'"),
        ("yml", BASE + "flash_attention: true\neager_attention: true", "exclude each other"),
        ("yml", BASE + "model_quantization_config: Mxfp4Config", r"stay in MXFP4.*dequantize: true"),
        ("yml", BASE + "model_quantization_config: FineGrainedFP8Config", "of this kind are not modelled"),
        ("yml", "micro_batch_size: 1", "base_model is missing"),
        ("yml", "a: [1", "not valid YAML"),
        ("yml", "- a\n- b", "keys and values are expected"),
        ("yml", "x: 1", "not a config of PEFT"),
        ("yaml", FACTORY + "finetuning_type: full\nquantization_bit: 4", "exclude each other"),
        ("yaml", FACTORY + "stage: ppo", "'ppo' is not modelled"),
        ("yaml", FACTORY + "finetuning_type: lora\nuse_dora: true\npissa_init: true", "together are not modelled"),
        ("yaml", FACTORY + "flash_attn: fa9", "is unknown"),
        ("yml", BASE + "rl: spin", "rl 'spin' is not modelled: it is no SFT step"),
        ("yml", BASE + "optimizer: lomo", "optimizer 'lomo' is not modelled; use optimizer: adamw_torch"),
        ("yml", BASE + "attn_implementation: sage", "attn_implementation 'sage' is not modelled"),
        ("yml", BASE + "adapter: lora\nlora_target_modules: [layers.1.*]", "a regex stands alone, not in a list"),
        ("yaml", FACTORY + "use_apollo: true\napollo_proj: svd", "only APOLLO's random projections are modelled"),
        ("yml", BASE + "unfrozen_parameters: ['^model.embed_tokens.weight$[:320]']", "some rows of a weight"),
        ("yml", BASE + "adapter: lora\nquantize_moe_experts: true", "needs load_in_4bit or load_in_8bit"),
        ("yaml", FACTORY + "mixture_of_depths: convert", "mixture of depths is not modelled"),
        ("yaml", FACTORY + "freeze_language_model: true", "the vision tower alone is not modelled"),
        ("yaml", FACTORY + "quantization_bit: 3", "quantization_bit 3 is not modelled: use 4 or 8"),
        ("yaml", FACTORY + "finetuning_type: oft\nquantization_bit: 8", "OFT on an 8-bit base is not modelled"),
        ("yaml", "model: m\nmodel_class: cls", "model_class 'cls' is unknown"),
        ("yaml", "model: m\nmodel_class: llm\noptim_config: {name: lion}", "optim_config 'lion' is not modelled"),
        ("yaml", "model_name_or_path: m\nmax_length: 8\nreward_model_path: m", "an RL step is not modelled"),
        ("yaml", "compute_environment: LOCAL_MACHINE", "no training config: accelerate's own config"),
        ("yaml", FACTORY + "infer_backend: vllm", "no training config: a config of inference"),
        ("json", '{"zero_optimization": {"stage": 3}}', "no training config: DeepSpeed's own config"),
        ("yaml", '"<|svg|>": a drawing\n"<|end|>": its end', "no training config: new tokens"),
        ("json", '{"peft_type": "LORA", "target_modules": "a/b"}', "neither a list of names nor a regex"),
        ("json", '{"per_device_train_batch_size": 0}', "must be a positive integer"),
        ("json", '{"use_peft": false, "load_in_4bit": true}', "needs use_peft"),
        ("json", "{", "not valid JSON"),
    ],
)
def test_wrong_and_contradictory_keys_give_one_clear_line(tmp_path: Path, suffix: str, text: str, words: str) -> None:
    """The line names file, key and what would be right."""
    path = tmp_path / f"config.{suffix}"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as error:
        read(path)
    assert "\n" not in str(error.value)


values = st.one_of(st.none(), st.booleans(), st.integers(-2, 4), st.text(max_size=6), st.lists(st.none(), max_size=2))
originals = {name: yaml.safe_load((CONFIGS / name).read_text()) for name in EXPECTED}


@settings(max_examples=150, phases=NO_SHRINK)
@given(name=st.sampled_from(sorted(EXPECTED)), data=st.data())
def test_a_spoilt_config_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, name: str, data: Any) -> None:
    """Whatever stands under a key: a setup or a `UserError`, never another exception."""
    original = dict(originals[name])
    for key in data.draw(st.lists(st.sampled_from(sorted(original)), max_size=3)):
        original[key] = data.draw(values)
    path = tmp_path_factory.mktemp("spoilt") / "config.json"
    path.write_text(json.dumps(original))
    with suppress(UserError):
        found = read(path)
        Setup(**found.setup)
        if found.method:
            methods.parse(found.method)


def test_the_command_line_wins_over_the_file() -> None:
    """The file gives defaults; an option that is typed counts."""
    command = ["predict", "--config", str(CONFIGS / "axolotl/lora-all-linear.yml"), "--device", "a100-80gb-sxm"]
    result = CliRunner().invoke(main, [*command, "--batch", "1", "--seq", "512", "--json"])
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["setup"]["batch"], answer["setup"]["seq"], answer["setup"]["grad_accum"]) == (1, 512, 4)
    assert answer["method"] == "lora:r=32,targets=all-linear,implementation=axolotl"
    assert "ignored" in result.stderr
    assert "learning_rate" in result.stderr


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("yml", BASE + "adapter: lora\nload_in_8bit: true\nlora_r: 4"),
        ("yaml", FACTORY + "quantization_bit: 8\nlora_rank: 4"),
        ("yaml", "model_name_or_path: gpt2\nmax_length: 8\nuse_peft: true\nload_in_8bit: true\nlora_r: 4"),
    ],
)
def test_a_base_in_8_bit_is_llm_int8(suffix: str, text: str, tmp_path: Path) -> None:
    """One in ten of the configs that people share; read as 16 bit it would need twice the memory."""
    path = tmp_path / f"config.{suffix}"
    path.write_text(text)
    assert str(read(path).method).startswith("lora_8bit:r=4")


V1 = "model: gpt2\nmodel_class: llm\n"
FSDP = "dist_config: {name: fsdp2}\n"


@pytest.mark.parametrize(
    ("text", "precision"),
    [
        ("", ("fp32", None)),
        ("bf16: false\n", ("fp32", None)),
        (FSDP, ("fp32", "bf16")),
        (f"{FSDP}bf16: false\n", ("fp32", None)),
        ("dist_config: {name: fsdpturbo}\n", ("bf16", None)),
        ("dist_config: {name: deepspeed, config_file: not_here.json}\n", ("fp32", "bf16")),
        (f"{FSDP}peft_config: {{name: lora}}\n", ("bf16", None)),
    ],
)
def test_full_tuning_of_v1_holds_fp32(tmp_path: Path, text: str, precision: tuple[str, str | None]) -> None:
    """Read as bf16, weights and optimizer states would need half of the memory that they have."""
    (tmp_path / "v1.yaml").write_text(V1 + text)
    found = read(tmp_path / "v1.yaml")
    assert (found.setup["dtype"], found.setup["amp"]) == precision
    assert any("autocast" in said for said in found.differences) == (precision == ("fp32", "bf16"))
    assert any("own log-probabilities" in said for said in found.differences)
    assert any("gradients clipped" in said for said in found.differences) == ("fsdpturbo" in text)


@pytest.mark.parametrize(
    ("model", "asked", "runs"),
    [
        ("google/gemma-2-9b-it", "auto", "flash2"),
        ("google/gemma-2-9b-it", "sdpa", "sdpa"),
        ("openai/gpt-oss-20b", "auto", "flash2"),
        ("google/gemma-3-1b-it", "auto", "sdpa"),
    ],
)
def test_llama_factory_chooses_the_attention_of_some_models(tmp_path: Path, model: str, asked: str, runs: str) -> None:
    """Gemma 2's scores are capped and gpt-oss has sinks: their attention is not transformers' own choice there."""
    file = tmp_path / "train.yml"
    file.write_text(f"model_name_or_path: {model}\ncutoff_len: 64\nflash_attn: {asked}\n")
    assert read(file).setup["attention"] == runs
    assert any("flash-attn 2, not 3" in said for said in read(file).differences) == ("gpt-oss" in model)
