"""Models that only a trace can answer for: a command traces them by itself, and says so first."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

from perfmodel import cli
from perfmodel.architectures import has_form, load, model_names
from perfmodel.commands import traces
from perfmodel.imports import Imported
from perfmodel.imports.fallbacks import UNBALANCED
from perfmodel.imports.mesh import UNCUT
from perfmodel.tracing import kernels

APERTUS = {
    "model_type": "apertus", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
SDPA = ("attention", "PyTorch's attention, not flash-attn")
FILE = """
base_model: {model}
adapter: qlora
load_in_4bit: true
lora_r: 4
lora_target_modules: 'model.layers.[\\d]+.(mlp|self_attn).(up|down|q|k|v|o)_proj'
micro_batch_size: 1
sequence_len: 32
bf16: auto
flash_attention: true
torch_compile: true
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(APERTUS))
    return path


def test_a_model_without_built_in_form_is_traced_by_itself(model: Path) -> None:
    """Who names his model should not have to know which models the tape has."""
    result = CliRunner().invoke(cli.main, ["predict", "--model", str(model), "--device", "l40s", "--json"])
    assert result.exit_code == 0, result.output
    assert any("traced" in note for note in json.loads(result.stdout)["notes"])


def test_the_first_line_says_that_a_file_is_answered_by_a_trace(model: Path, tmp_path: Path) -> None:
    """What a trace cannot follow is answered otherwise, and stands there too."""
    file = tmp_path / "train.yml"
    file.write_text(FILE.format(model=model) + "\nexperts_implementation: eager\n")
    result = CliRunner().invoke(cli.main, ["predict", "--config", str(file), "--device", "l40s"])
    assert result.exit_code == 0, result.output
    first = result.stdout.partition("\n\n")[0]
    assert "without torch.compile" in first
    assert "experts as transformers runs them by default (experts_implementation)" in first
    assert f"{traces.TRACED}: apertus has no built-in form" in first


@pytest.mark.parametrize(
    ("model", "images", "says"), [("falcon-h1-1.5b", 0, []), ("falcon-h1-1.5b", 1, [SDPA]), ("mamba-2.8b", 0, [SDPA])]
)
def test_flash_attn_is_followed_where_the_model_has_it(model: str, images: int, says: list[Any]) -> None:
    """Most configs of large models ask for it; towers of images take it over ragged rows, which no trace has."""
    options = {"model": model, "images": images, "attention": "flash2"}
    assert traces.followed(options, {"attention"})[1] == says
    assert traces.followed(options, set())[1] == []  # what is typed is refused instead


@pytest.mark.parametrize(
    ("kernels", "dtype", "objective", "answered", "says"),
    [
        ("cce", "bf16", "sft", "cce", []), ("cce", "fp32", "sft", "torch", [("kernels", UNCUT)]),
        ("liger+cce", "bf16", "sft", "cce", [("kernels", "without Liger's kernels")]),
        ("cce", "bf16", "dpo", "torch", [("kernels", "")]),  # whose loss takes logits in Axolotl, too
    ],
)  # fmt: skip
def test_cut_cross_entropy_is_followed(
    kernels: str, dtype: str, objective: str, answered: str, says: list[Any]
) -> None:
    """Liger's kernels are not; a loss that takes logits has no use for it."""
    options = {"model": "apertus-8b", "kernels": kernels, "dtype": dtype, "objective": objective}
    made, said = traces.followed(options, {"kernels"})
    assert (made["kernels"], said) == (answered, says)
    assert traces.followed(options, set()) == (options, [])
    inner = {**options, "model": "llama-4-scout-17b-16e", "kernels": "cce", "dtype": "bf16", "objective": "sft"}
    assert traces.followed(inner, {"kernels"})[1] == [("kernels", UNCUT)]


def test_models_without_flash_attn_are_those_of_transformers() -> None:
    """Else a config would end in a refusal that a first line could have said."""
    transformers = pytest.importorskip("transformers")
    from perfmodel.tracing import programs

    configs = [config for config in map(load, model_names()) if not has_form(config.kind)]
    classes = {c.kind: getattr(transformers, programs.family_of(c)[1], None) for c in configs}
    unable = {kind for kind, found in classes.items() if found and not getattr(found, "_supports_flash_attn", False)}
    assert unable <= traces.WITHOUT_FLASH


def test_the_engine_of_a_trace_is_said_once(model: Path, tmp_path: Path) -> None:
    """That of the config stood beside it, and contradicted it."""
    file = tmp_path / "train.yml"
    file.write_text(FILE.format(model=model) + "deepspeed: zero3.json\n")
    result = CliRunner().invoke(cli.main, ["predict", "--config", str(file), "--device", "l40s"])
    assert result.exit_code == 0, result.output
    first = result.stdout.partition("\n\n")[0]
    assert "one GPU, without ZeRO-3" in first
    assert "one GPU under ZeRO-3" not in first
    assert "--gpus N beside it answers for N" in first


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "zero3"])
def test_a_trace_answers_for_several_gpus(model: Path, parallel: str) -> None:
    """Models without a built-in form had no answer there, which are the newest."""
    asked = ["predict", "--model", str(model), "--device", "h100-sxm", "--seq", "16", "--gpus", "2"]
    result = CliRunner().invoke(cli.main, [*asked, "--parallel", parallel])
    assert result.exit_code == 0, result.output
    assert "a GPU's collectives:" in result.stdout
    result = CliRunner().invoke(cli.main, [*asked, "--parallel", parallel, "--tp", "2"])
    assert result.exit_code == 2
    assert "tp: 2 on several GPUs is not modelled by a trace; use --tp 1" in result.stderr


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("fsdp_version: 2\nfsdp_config:\n  reshard_after_forward: true\n", "adapters gathered with their blocks"),
        ("tensor_parallel_size: 2\n", "layers not shared by GPUs (tensor parallel)"),
    ],
)
def test_what_no_trace_follows_on_several_gpus_is_answered_otherwise(
    more: str, said: str, model: Path, tmp_path: Path
) -> None:
    """A file of several GPUs was refused where its model has no built-in form; the first line says what differs."""
    file = tmp_path / "train.yml"
    file.write_text(FILE.format(model=model) + more)
    asked = ["predict", "--config", str(file), "--device", "l40s"]
    result = CliRunner().invoke(cli.main, [*asked, "--gpus", "4"])
    assert result.exit_code == 0, result.output
    first = result.stdout.partition("\n\n")[0]
    assert said in first
    assert "one GPU" not in first
    alone = CliRunner().invoke(cli.main, asked)
    assert said not in alone.stdout


def test_what_a_tool_does_otherwise_is_said() -> None:
    """LLaMA-Factory's `all` stops before a frozen vision tower; kernels of packages are not in a trace."""
    both = ("vision tower", "projector")
    adapted = Imported("LLaMA-Factory", None, "lora:targets=all-linear", {}, [], [], frozen=both)
    said = traces.otherwise("qwen3.5-4b", adapted)
    assert "flash-linear-attention" in said[0]
    assert said[1] == "adapters on the vision tower too"
    full = replace(adapted, method="full", setup={"dtype": "fp32"})
    assert traces.otherwise("qwen3.5-4b", full)[1] == "the vision tower and the projector trained too, in fp32"
    assert traces.otherwise("qwen3.5-4b", replace(full, frozen=())) == [said[0], traces.ADDED_IMAGE]
    of_text = replace(full, frozen=(), differences=["batches of text, without images or sound (image_max_pixels)"])
    assert traces.otherwise("qwen3.5-4b", of_text) == said[:1]
    assert traces.otherwise("apertus-8b", adapted) == []
    assert traces.otherwise("gemma-3n-e2b", adapted) == ["the text decoder alone of a vision-language model"]
    assert traces.otherwise("gemma-4-e2b", replace(adapted, tool="Axolotl", frozen=())) == ["without its audio tower"]
    assert UNBALANCED in traces.otherwise("qwen1.5-moe-a2.7b", replace(adapted, balances=True))
    assert "AltUp" in traces.otherwise("gemma-3n-e2b", replace(adapted, method="qlora"))[1]
    packed = replace(adapted, setup={"dtype": "bf16"})
    assert traces.otherwise("Mapika/GLM-5.2-NVFP4", packed) == ["weights in bf16, not nvfp4"]
    assert traces.otherwise("Mapika/GLM-5.2-NVFP4", replace(packed, method="qlora")) == ["QLoRA, not on nvfp4 weights"]
    prepared = replace(packed, tool="Axolotl", upcasts=True, frozen=())
    assert traces.otherwise("trinity-nano", prepared) == ["experts in bf16, not in fp32"]
    assert traces.otherwise("llama-4-scout-17b-16e-linearized", prepared) == []
    assert traces.otherwise("apertus-8b", prepared) == []
    assert traces.of_peft_alone("lora:r=8,implementation=unsloth,dropout=0.1", "gpt2")[0] == "lora:r=8,dropout=0.1"


def test_a_module_is_found_by_the_name_that_it_had() -> None:
    """Axolotl's files for Voxtral name its layers as transformers 4 did; their regex would match nothing."""
    old, new = (f"qlora:targets=/{path}.layers.\\d+.q_proj/" for path in traces.RENAMED["voxtral"][:2])
    assert traces.of_peft_alone(old, "voxtral-mini-3b") == (
        new, ["language_model.model as model.language_model, its name in transformers 5.24"],
    )  # fmt: skip
    assert traces.of_peft_alone(new, "voxtral-mini-3b") == (new, [])
    assert traces.of_peft_alone(old, "llava-1.5-7b") == (old, [])
    of_whole, of_decoder = (f"qlora:targets=/{path}.layers.\\d+.q_proj/" for path in ("model.language_model", "model"))
    assert traces.of_peft_alone(of_whole, "gemma-3n-e2b")[0] == of_decoder


def test_what_bitsandbytes_refuses_is_said() -> None:
    """Older transformers gave latent attention three dimensions, which its 8-bit layers take."""
    for method, said in (("lora_8bit:r=16", 1), ("lora:r=16", 0)):
        for model in ("kimi-linear-48b-a3b", "glm-4.7-flash"):
            assert len(traces.of_peft_alone(method, model)[1]) == said
    assert traces.of_peft_alone("lora_8bit:r=16", "apertus-8b")[1] == []


def test_experts_that_were_layers_lose_their_dropout() -> None:
    """PEFT refuses dropout beside stacked experts, which it adapts where their layers of transformers 4 are named."""
    named, attention = "qlora:r=8,targets=up_proj+gate_proj+down_proj", "qlora:r=8,targets=q_proj,dropout=0.05"
    for method in (named, "lora:targets=all-linear", named.replace("=up_proj", "=shared_experts.up_proj")):
        plain, said = traces.of_peft_alone(f"{method},dropout=0.05", "trinity-nano")
        assert (plain, len(said)) == (method, 1)
        assert traces.of_peft_alone(method, "trinity-nano") == (method, [])
    assert traces.of_peft_alone(attention, "trinity-nano") == (attention, [])
    assert traces.of_peft_alone(f"{named},dropout=0.05", "apertus-8b")[1] == []


def test_layers_that_mean_packed_experts_get_no_adapters() -> None:
    """PEFT takes a shared expert's layers for those of all experts: adapters on packed weights are not modelled."""
    shared = "+".join(f"shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj"))
    plain, said = traces.of_peft_alone(f"qlora:targets=q_proj+{shared},experts=true", "qwen3-next-80b-a3b")
    assert "shared_expert" not in plain
    assert [words.count("shared_expert.") for words in said] == [3]
    for method in ("qlora:targets=q_proj,experts=true", f"qlora:targets=q_proj+{shared}"):
        assert traces.of_peft_alone(method, "qwen3-next-80b-a3b") == (method, [])


def test_types_whose_experts_were_layers_are_those_of_transformers() -> None:
    """The table spares a command torch; another version of transformers may know more types."""
    pytest.importorskip("transformers")
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    kinds = {name for name, like in _MODEL_TO_CONVERSION_PATTERN.items() if like in ("mixtral", "qwen2_moe")}
    assert {name for name in kinds if name.islower()} == traces.EXPERTS_BY_LAYER


def test_packages_of_kernels_are_those_of_transformers() -> None:
    """The table spares a command torch; a model that is not in it would pass for the program that its users run."""
    transformers = pytest.importorskip("transformers")
    asks = re.compile(r"use_kernel_func_from_hub_with_fallback\(\s*\"\w+\",\s*\"(\w+)\"")
    kinds = re.compile(r"model_type: str = \"(\w+)\"|model_type = \"(\w+)\"")
    names = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
    towers = ("_vision", "_audio")  # which run no such kernel
    asked = {}
    for program in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        if packages := {names[package] for package in asks.findall(program.read_text())}:
            config = program.with_name(program.name.replace("modeling", "configuration")).read_text()
            asked |= {kind: packages for kind in map("".join, kinds.findall(config)) if not kind.endswith(towers)}
    assert len(asked) >= 10
    for kind, packages in asked.items():
        assert packages <= set(kernels.PACKAGES[kind].split(" and ")), kind


def test_a_package_that_a_tool_refuses_is_not_missed() -> None:
    """Axolotl ends where causal-conv1d is installed beside LFM2: PyTorch's code is what its file runs."""
    found = Imported("Axolotl", None, "full", {"dtype": "bf16"}, [], [])
    assert traces.otherwise("lfm2-350m", found) == []
    assert traces.otherwise("lfm2-350m", replace(found, tool="Transformers/TRL")) == [kernels.without_kernels("lfm2")]
    assert "causal-conv1d" in kernels.without_kernels("lfm2")


def test_what_is_typed_is_not_changed(model: Path) -> None:
    arguments = ["predict", "--model", str(model), "--device", "l40s", "--kernels", "liger"]
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert "--kernels liger" in result.stderr


@pytest.mark.parametrize("size", ["448", "0x448", "ax448", "448x448x3"])
def test_a_size_that_is_none_is_refused(size: str) -> None:
    result = CliRunner().invoke(cli.main, ["predict", "--model", "gpt2", "--device", "l40s", "--image-size", size])
    assert result.exit_code == 2
    assert "no size in pixels" in result.stderr


def test_the_tape_has_no_images() -> None:
    from perfmodel import UserError, predict

    with pytest.raises(UserError, match="add --traced"):
        predict("gpt2", device="l40s", images=1)
