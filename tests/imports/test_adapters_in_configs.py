"""Adapters as configs have them: regex targets, tuners that only a trace knows, PEFT's own experiments."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from perfmodel import methods, predict
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.imports.adapter import NOT_FACTORED
from perfmodel.imports.fields import UNSCALED
from perfmodel.imports.peft_benchmark import BY_DEFAULT, NEVER_EMPTIED, NOT_CACHED, ONE_SHAPE
from perfmodel.methods.lora import Lora
from perfmodel.methods.lora_alike import Pissa
from perfmodel.prediction.predict import resolve

REGEXES = {  # Axolotl's examples write targets so: a regex, and the layers of Llama's blocks that it means
    r"model.layers.[\d]+.(mlp|self_attn).(up|down|q)_proj": ({"mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"}, 16),
    r"model\.layers\.(2|3)\.self_attn\.v_proj": ({"self_attn.v_proj"}, 2),
    r".*\.layers\.\d{1,1}\..*gate_proj": ({"mlp.gate_proj"}, 10),
}


@pytest.mark.parametrize("regex", REGEXES)
def test_targets_may_be_a_regex_of_whole_paths(tmp_path: Path, regex: str) -> None:
    """PEFT compares it with a layer's whole path, its block's number included."""
    names, blocks = REGEXES[regex]
    text = "base_model: llama-3.2-1b\nmicro_batch_size: 1\nadapter: lora\nlora_r: 4\n"
    (tmp_path / "config.yml").write_text(text + f"lora_target_modules: '{regex}'")
    found = read(tmp_path / "config.yml")
    assert found.method is not None
    p = predict("llama-3.2-1b", found.method, seq=16)
    assert methods.parse(p.method).spec() == p.method
    assert p.step is not None
    adapted = [q.name for q in p.step.parameters if q.requires_grad for _ in range(q.count)]
    assert len(adapted) == 2 * len(names) * blocks
    assert {re.sub(r"^model\.layers\.\d+\.|\.lora_[AB]\.weight$", "", name) for name in adapted} == names


@pytest.mark.parametrize(
    ("name", "text", "niter"),
    [
        ("a.json", '{"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}', 4),
        ("a.json", '{"peft_type": "LORA", "init_lora_weights": "pissa"}', 0),
        (
            "a.yml",
            "base_model: gpt2\nadapter: lora\nlora_target_linear: true\npeft_init_lora_weights: pissa_niter_4",
            4,
        ),
        ("a.yaml", "model_name_or_path: gpt2\nfinetuning_type: lora\npissa_init: true", 16),
        ("a.yaml", "model_name_or_path: gpt2\nfinetuning_type: lora\npissa_init: true\npissa_iter: -1", 0),
    ],
)
def test_pissa_starts_as_the_file_says(tmp_path: Path, name: str, text: str, niter: int) -> None:
    """A whole SVD of every target takes minutes, a randomised one a second; LLaMA-Factory's is randomised."""
    (tmp_path / name).write_text(text)
    method = methods.parse(str(read(tmp_path / name).method))
    assert isinstance(method, Pissa)
    assert method.niter == niter


def test_a_regex_that_matches_nothing_is_refused() -> None:
    """PEFT does so too, and the complaint shows how paths look."""
    with pytest.raises(UserError, match=r"matches no linear layer of .*, whose paths are like"):
        resolve("llama-3.2-1b", "lora:targets=/q_proj/")
    with pytest.raises(UserError, match="is no regex"):
        resolve("llama-3.2-1b", "lora:targets=/(q_proj/")


@pytest.mark.parametrize("regex", ["(.*a)+b", "(q|v_)*proj", "(?:x+)+", "((a|aa){9})?b", "(?!(.+)+x).*q_proj"])
def test_a_regex_that_could_take_for_ever_is_refused(regex: str) -> None:
    """It stands in a stranger's file, and a path of thirty letters would keep a processor busy for days."""
    with pytest.raises(UserError, match="it could take hours"):
        resolve("llama-3.2-1b", f"lora:targets=/{regex}/")


@pytest.mark.parametrize("regex", [r".*\.(q|v)_proj", r"model\.layers\.(1\d|[2-9])\..*q_proj", "(?!.*mlp).*q_proj"])
def test_regexes_as_people_write_them_are_taken(regex: str) -> None:
    """Choices and repeats that follow one another are harmless."""
    resolve("llama-3.2-1b", f"lora:targets=/{regex}/")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"peft_type": "WAVEFT"}, "peft_type 'WAVEFT' has no built-in form: add --traced"),
        ({"peft_type": "LORA", "bias": "all"}, "bias 'all' has no built-in form"),
        ({"peft_type": "LORA", "kasa_config": {"beta": 1}}, "kasa_config has no built-in form"),
        ({"peft_type": "LORA", "use_bdlora": {"nblocks": 2}}, "use_bdlora has no built-in form"),
        (
            {"peft_type": "LORA", "modules_to_save": ["wte"], "ensure_weight_tying": True},
            "ensure_weight_tying has no built-in form",
        ),
        ({"peft_type": "LORA", "rank_pattern": {"q": 2}}, "rank_pattern has no built-in form"),
        ({"peft_type": "LORA", "init_lora_weights": "mica"}, "init_lora_weights 'mica' has no built-in form"),
        ({"peft_type": "OFT", "oft_block_size": 32, "use_cayley_neumann": False}, "use_cayley_neumann has no"),
        ({"peft_type": "MISS", "init_weights": "bat"}, "init_weights 'bat' has no built-in form"),
    ],
)
def test_an_adapter_without_built_in_form_is_left_to_a_trace(tmp_path: Path, values: dict[str, Any], why: str) -> None:
    """Never the nearest built-in method; the complaint names the way that works."""
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**values, "base_model_name_or_path": "gpt2"}))
    found = read(path)
    assert (found.method, found.adapter) == (None, path)
    assert found.why_traced is not None
    assert re.search(why, found.why_traced)
    command = ["--config", str(path), "--device", "l40s"]
    for asked in (["predict"], ["compare"]):
        assert re.search(why, CliRunner().invoke(main, [*asked, *command]).stderr)
    assert CliRunner().invoke(main, ["predict", *command, "--method", "lora:r=2", "--seq", "16"]).exit_code == 0


@pytest.mark.parametrize(
    ("asked", "saved"),
    [
        ("", ""),
        ("add_tokens: [<|mine|>]", "embed_tokens+lm_head"),
        ("resize_vocab: true\nadditional_target: lm_head", "lm_head"),
        ("pure_bf16: true\nadditional_target: lm_head", "lm_head"),
    ],
)
def test_new_rows_of_a_vocabulary_train_beside_adapters(tmp_path: Path, asked: str, saved: str) -> None:
    """LLaMA-Factory copies embedding and head then: on a small model they are most of what trains."""
    (tmp_path / "c.yaml").write_text("model_name_or_path: llama-3.2-1b\nfinetuning_type: lora\n" + asked)
    found = read(tmp_path / "c.yaml")
    method = methods.parse(str(found.method))
    assert isinstance(method, Lora)
    assert "+".join(method.modules_to_save) == saved
    assert ("not in fp32" in found.first_line) == (saved != "" and "pure_bf16" not in asked)


def test_a_trace_of_boft_is_that_without_its_extension(tmp_path: Path) -> None:
    """Without the CUDA extension PEFT sets the butterfly factor to 1: half the rotations that the file asks for."""
    file = tmp_path / "adapter_config.json"
    for factor, told in ((1, False), (2, True)):
        asked = {"peft_type": "BOFT", "boft_n_butterfly_factor": factor, "bias": "all"}  # no built-in form
        file.write_text(json.dumps(asked))
        assert ("boft_n_butterfly_factor" in read(file).first_line) == told


@pytest.mark.parametrize(("kind", "told"), [("OSF", True), ("PSOFT", True), ("PVERA", False)])
def test_what_a_trace_leaves_out_of_memory_is_told(tmp_path: Path, kind: str, told: bool) -> None:
    """A trace counts parameters: OSF's factors are buffers, 9.5 GB beside the 6.4 GB of a Llama-3.2-3B."""
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": kind}))
    assert ("frozen factors" in read(file).first_line) == told


def test_an_experiment_of_pefts_comparison_is_read_with_its_training(tmp_path: Path) -> None:
    """Its adapter names no model: the parameters above it do, and what lies beside it wins over them."""
    folder = tmp_path / "experiments" / "lora" / "mine"
    folder.mkdir(parents=True)
    defaults = {"model_id": "gpt2", "batch_size": 4, "max_seq_length": 768, "dtype": "bfloat16", "use_gc": False}
    (tmp_path / "default_training_params.json").write_text(json.dumps(defaults))
    (folder / "training_params.json").write_text('{"optimizer_type": "lora-fa", "autocast_adapter_dtype": false}')
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}')
    found = read(folder / "adapter_config.json")
    assert (found.model, found.method) == ("gpt2", "lora_fa:r=2,targets=c_attn,adapter_dtype=bf16")
    assert (found.setup["batch"], found.setup["seq"], found.setup["dtype"]) == (4, 768, "bf16")
    assert found.setup["group_by_length"], "its batches come from buckets sorted by length"
    (folder / "adapter_config.json").unlink()
    assert read(folder / "training_params.json").method == "full"


@pytest.mark.parametrize(("kind", "told"), [("BOFT", True), ("LORA", False)])
def test_a_buffer_that_stays_on_the_host_is_told(tmp_path: Path, kind: str, told: bool) -> None:
    """PEFT measured 0.66 s a step of BOFT on an L40S where 0.37 s are predicted: 2.1 GB come from the host."""
    folder = tmp_path / "experiments" / "boft" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "default_training_params.json").write_text('{"model_id": "gpt2"}')
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "target_modules": ["c_attn"]}))
    assert ("from the host" in read(folder / "adapter_config.json").first_line) == told


@pytest.mark.parametrize(("more", "told"), [({"resolution": 512, "dino_model_id": "facebook/dinov2-base"}, 1), ({}, 0)])
def test_what_lies_beside_a_model_of_images_is_told(tmp_path: Path, more: dict[str, Any], told: int) -> None:
    """PEFT's image benchmark keeps the model that it evaluates with on the GPU: half a GB on top of nine."""
    folder = tmp_path / "experiments" / "lora" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "default_training_params.json").write_text(json.dumps({"model_id": "gpt2", **more}))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}')
    assert read(folder / "adapter_config.json").first_line.count("DINOv2") == told


@pytest.mark.parametrize(
    ("tuner", "more", "told"),
    [
        ("LORA", {}, [NEVER_EMPTIED, NOT_CACHED]),
        ("LORA", {"use_gc": True}, [NEVER_EMPTIED]),
        ("PREFIX_TUNING", {}, [NEVER_EMPTIED]),
        ("LORA", {"resolution": 512}, []),
        ("FROD", {"resolution": 512}, [NOT_FACTORED]),
    ],
)
def test_what_the_loop_of_pefts_comparison_does_by_itself_is_told(
    tmp_path: Path, tuner: str, more: dict[str, Any], told: list[str]
) -> None:
    """It is no Trainer: the model fills its cache while it trains, and the allocator's is emptied now and then."""
    folder = tmp_path / "experiments" / "any" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "default_training_params.json").write_text(json.dumps({"model_id": "gpt2", **more}))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": tuner, "num_virtual_tokens": 4}))
    assert read(folder / "adapter_config.json").differences == told


@pytest.mark.parametrize(
    ("options", "told"),
    [({"lr": 1e-4, "weight_decay": 0.1, "foreach": None}, False), ({"fused": True}, True), ({"foreach": False}, True)],
)
def test_a_form_of_adamw_that_an_experiment_asks_for_is_told(
    tmp_path: Path, options: dict[str, Any], told: bool
) -> None:
    """A fused update is one kernel, and a loop many: all arguments of PyTorch's class are taken."""
    folder = tmp_path / "experiments" / "lora" / "one"
    folder.mkdir(parents=True)
    (tmp_path / "default_training_params.json").write_text(json.dumps({"model_id": "gpt2"}))
    (folder / "training_params.json").write_text(json.dumps({"optimizer_kwargs": options}))
    differences = read(folder / "training_params.json").differences
    assert (f"{BY_DEFAULT} (optimizer_kwargs)" in differences) == told


def test_compiled_batches_of_pefts_comparison_are_of_any_shape(tmp_path: Path) -> None:
    """Its loop compiles for shapes that change, as its batches do; a graph of one shape is what is modelled."""
    folder = tmp_path / "experiments" / "any" / "mine"
    folder.mkdir(parents=True)
    values = {"model_id": "gpt2", "resolution": 512, "compile": True}
    (tmp_path / "default_training_params.json").write_text(json.dumps(values))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    found = read(folder / "adapter_config.json")
    assert (found.setup["compile"], found.differences) == ("default", [f"{ONE_SHAPE} (compile)"])


@pytest.mark.parametrize(
    ("dtype", "amp", "told"),
    [("float32", "fp16", []), ("bfloat16", "bf16", ["products in bf16, not in fp16 under autocast (use_amp)"])],
)
def test_autocast_of_pefts_comparison_is_fp16s(tmp_path: Path, dtype: str, amp: str, told: list[str]) -> None:
    """Its loop names no dtype, so that PyTorch's own for GPUs counts, in fp32 too, and it scales losses in any case."""
    folder = tmp_path / "experiments" / "any" / "mine"
    folder.mkdir(parents=True)
    values = {"model_id": "gpt2", "resolution": 512, "dtype": dtype, "use_amp": True}
    (tmp_path / "default_training_params.json").write_text(json.dumps(values))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    found = read(folder / "adapter_config.json")
    assert (found.setup["amp"], found.differences) == (amp, [UNSCALED, *told])


def test_an_adapter_of_pefts_benchmark_of_generation_is_trained_on_its_model(tmp_path: Path) -> None:
    """The benchmark trains nothing, which the first line has to say; a model of the file's own wins."""
    folder = tmp_path / "experiments" / "lora" / "mine"
    folder.mkdir(parents=True)
    (tmp_path / "default_benchmark_params.json").write_text('{"model_id": "gpt2", "dtype": "float16"}')
    values = {"peft_type": "LORA", "r": 2, "target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    found = read(folder / "adapter_config.json")
    assert (found.model, found.method, found.setup["dtype"]) == ("gpt2", "lora:r=2,targets=c_attn", "fp16")
    assert "only generates" in found.first_line
    (folder / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": "distilgpt2"}))
    own = read(folder / "adapter_config.json")
    assert (own.model, own.first_line) == ("distilgpt2", "")


@pytest.mark.parametrize(
    ("listed", "targets"),
    [
        ("[q_proj]", "/q_proj/"), ("[q_proj, q_proj]", "q_proj"), ("[all-linear]", "all-linear"),
        ("['.*k_proj']", "/.*k_proj/"),
    ],
)  # fmt: skip
def test_the_only_target_of_a_list_is_a_regex_to_trl(tmp_path: Path, listed: str, targets: str) -> None:
    """TRL takes it out of its list; PEFT ends where a regex matches no whole path."""
    text = "model_name_or_path: llama-3.2-1b\nuse_peft: true\nlora_dropout: 0\nmax_length: 16\n"
    (tmp_path / "config.yml").write_text(text + f"lora_target_modules: {listed}")
    found = read(tmp_path / "config.yml")
    assert found.method == f"lora:r=16,targets={targets}"
    if targets == "/q_proj/":
        with pytest.raises(UserError, match="/q_proj/ matches no linear layer"):
            predict("llama-3.2-1b", found.method, seq=16)


@pytest.mark.parametrize("model", ["mistralai/Mixtral-8x7B-v0.1", "Qwen/Qwen3-30B-A3B"])
def test_weights_of_experts_alone_bring_no_default_layers(tmp_path: Path, model: str) -> None:
    """Axolotl hands in an empty list of layers, where PEFT would take its default for none."""
    text = f"base_model: {model}\nadapter: lora\nmicro_batch_size: 1\nsequence_len: 64\n"
    (tmp_path / "config.yml").write_text(f"{text}lora_target_parameters: [mlp.experts.gate_up_proj]")
    found = read(tmp_path / "config.yml")
    assert found.model is not None
    assert found.method is not None
    step = predict(found.model, found.method, seq=16).step
    assert step is not None
    assert all(".experts." in p.name for p in step.parameters if p.requires_grad)
    (tmp_path / "config.yml").write_text(text)
    with pytest.raises(UserError, match="no lora_target_modules"):
        read(tmp_path / "config.yml")


def test_nothing_is_said_of_a_files_method_beside_another_one(tmp_path: Path) -> None:
    """What full fine-tuning does has nothing to do with which adapters Axolotl freezes again."""
    path = tmp_path / "axolotl.yaml"
    path.write_text(
        "base_model: NousResearch/Llama-3.2-1B\nadapter: lora\nlora_target_linear: true\nsequence_len: 512\n"
        "micro_batch_size: 1\nunfrozen_parameters: [lm_head]\npeft_layers_to_transform: [4, 5]\n"
        "ray_num_workers: 2\n"
    )
    asked = ["predict", "--device", "h100-sxm", "--config", str(path)]
    its, another = (
        CliRunner().invoke(main, [*asked, *typed]).stdout.splitlines()[0] for typed in ((), ("--method", "full"))
    )
    assert "unfrozen_parameters" in its
    assert "peft_layers_to_transform" in its
    assert another.endswith("one GPU (ray_num_workers); --gpus N beside it answers for N")
    assert "unfrozen_parameters" not in another
    assert "peft_layers_to_transform" not in another
