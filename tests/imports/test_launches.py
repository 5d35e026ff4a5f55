"""What several GPUs do, as training configs and their launchers' say it: DeepSpeed's stages, FSDP, tensor parallel."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from perfmodel import Setup
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.imports import DIFFERS, read
from perfmodel.imports.accelerate import read_launch
from perfmodel.imports.fields import UNSCALED
from perfmodel.imports.forms import CHECKED, OF_MASTERS, OVERLAPPED, PREFETCHED, SUMMED
from perfmodel.imports.llama_factory_v1 import BESIDE_BLOCKS
from perfmodel.imports.mesh import CUT_WHEN_LOADED, ONE_GROUP, WITHOUT_ULYSSES
from perfmodel.imports.read import ASK, NOT_CAST

AXOLOTL = {"base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 64, "bf16": True, "lora_target_linear": True}
FACTORY = {"model_name_or_path": "gpt2", "cutoff_len": 64, "finetuning_type": "full", "bf16": True}
TRL = {"model_name_or_path": "gpt2", "max_length": 64, "packing": False}
V1 = {"model": "gpt2", "model_class": "llm"}
ZERO_2 = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}, "gradient_clipping": "auto",
}  # fmt: skip
FSDP_2 = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_offload_params": False}
BUCKETS = "buckets of the hidden size squared"
OWN_SAMPLES = "samples of its own for every GPU"
RING_FLASH = f"{OWN_SAMPLES}, not ring-flash-attn's attention over sequences that they share"
MASTERS = "weights kept in fp32; Axolotl keeps them in 16 bit under FSDP 2"

FORMS: list[tuple[dict[str, Any], str, int, list[str]]] = [  # file, parallel, tp, how its several GPUs differ
    (AXOLOTL, "ddp", 1, []),
    ({**AXOLOTL, "ddp_bucket_cap_mb": 25, "ddp_broadcast_buffers": True}, "ddp", 1, []),
    ({**TRL, "ddp_backend": "nccl"}, "ddp", 1, []),
    ({**TRL, "ddp_backend": "gloo"}, "ddp", 1, ["collectives of NCCL (ddp_backend)"]),
    (
        {**AXOLOTL, "ddp_bucket_cap_mb": 50, "ddp_broadcast_buffers": False}, "ddp", 1,
        ["buckets of 25 MiB (ddp_bucket_cap_mb)", "buffers broadcast before forward passes (ddp_broadcast_buffers)"],
    ),
    ({**TRL, "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}, "ddp", 1, []),
    ({**TRL, "accelerator_config": {"split_batches": True, "gradient_accumulation_kwargs": None}}, "ddp", 1, []),
    ({**TRL, "deepspeed": ZERO_2}, "zero2", 1, []),
    (
        {**TRL, "deepspeed": {**ZERO_2, "wall_clock_breakdown": True}}, "zero2", 1,
        ["without the waits for the GPU that DeepSpeed's timers make (wall_clock_breakdown)"],
    ),
    (
        {**FACTORY, "deepspeed": "examples/deepspeed/ds_z3_offload_config.json"}, "zero3", 1,
        ["ZeRO-3 as the file's name says, its other options as usual (deepspeed)"],
    ),
    (
        {**AXOLOTL, "deepspeed": "ds.json"}, "ddp", 1,
        ["DDP, not DeepSpeed, whose config is not here and whose name says no stage (deepspeed)"],
    ),
    (
        {**TRL, "deepspeed": {"zero_optimization": {"stage": 0}, "gradient_clipping": "auto"}}, "ddp", 1,
        ["DDP, not DeepSpeed's own exchange of gradients (stage 0)"],
    ),
    (
        {**TRL, "deepspeed": {"zero_optimization": {"stage": 1, "overlap_comm": False, "contiguous_gradients": False},
         "gradient_clipping": "auto"}},
        "zero1", 1,
        [f"{BUCKETS}, not DeepSpeed's 500,000,000 elements",
         "gradients copied into buckets to be exchanged (zero_optimization.contiguous_gradients)",
         "gradients exchanged beside backward (zero_optimization.overlap_comm)"],
    ),
    (
        {**TRL, "deepspeed": {**ZERO_2, "tensor_parallel": {"autotp_size": 2}}}, "zero2", 2,
        ["layers cut as PyTorch does it, not by DeepSpeed's AutoTP (tensor_parallel)"],
    ),
    (
        {**TRL, "deepspeed": {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}, "gradient_clipping": 1}},
        "zero1", 1, [OVERLAPPED],
    ),
    (
        {**TRL, "deepspeed": {**ZERO_2, "bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True,
         "check_grad_overflow": False}, "data_types": {"grad_accum_dtype": "fp32"}}},
        "zero2", 1, [f"{OF_MASTERS} (bf16)", f"{CHECKED} (bf16)", f"{SUMMED} (data_types)"],
    ),
    ({**TRL, "deepspeed": {**ZERO_2, "data_types": {"grad_accum_dtype": "bf16"}}}, "zero2", 1, []),
    (
        {**AXOLOTL, "fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"fsdp_offload_params": False}}, "fsdp1", 1,
        [PREFETCHED],
    ),
    (
        {**AXOLOTL, "fsdp": ["auto_wrap"],
         "fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP", "backward_prefetch": "BACKWARD_PRE"}},
        "fsdp1", 1, [PREFETCHED],
    ),
    ({**TRL, "fsdp": True, "fsdp_config": {"version": 1, "backward_prefetch": "BACKWARD_PRE"}}, "fsdp1", 1, []),
    ({**AXOLOTL, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, "fsdp2", 1, []),
    ({**AXOLOTL, "bf16": False, "fp16": True, "fsdp_config": {"fsdp_version": 2}}, "fsdp2", 1, [MASTERS]),
    ({**AXOLOTL, "adapter": "lora", "fsdp_config": {"fsdp_version": 2}}, "fsdp2", 1, []),
    (
        {**TRL, "fsdp": "shard_grad_op auto_wrap offload"}, "fsdp2", 1, [],
    ),
    ({**TRL, "fsdp": "hybrid_shard", "fsdp_config": {"version": 1}}, "fsdp1", 1, [ONE_GROUP, PREFETCHED]),
    ({**FACTORY, "fsdp": True, "fsdp_config": {"cpu_offload": True}}, "fsdp2", 1, []),
    (
        {**AXOLOTL, "fsdp_config": {"fsdp_transformer_layer_cls_to_wrap": "MixtralSparseMoeBlock"}}, "fsdp1", 1,
        [PREFETCHED, "wrapped block by block (transformer_layer_cls_to_wrap)"],
    ),
    ({**TRL, "fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["GPT2Block", "ABlock"]}}, "fsdp2", 1, []),
    ({**AXOLOTL, "fsdp": ["no_shard"]}, "ddp", 1, ["DDP, not FSDP's no_shard"]),
    ({**AXOLOTL, "fsdp_config": {"a": "b"}}, "fsdp1", 1, [PREFETCHED, "keys that are unknown here (a)"]),
    (
        {**AXOLOTL, "tensor_parallel_size": 2, "context_parallel_size": 2, "dp_replicate_size": 2,
         "fsdp_config": {"version": 2, "activation_checkpointing": True}},
        "fsdp2", 2, [f"{RING_FLASH} (context_parallel_size)", f"{ONE_GROUP} (dp_replicate_size)"],
    ),
    (
        {**V1, "dist_config": {"name": "fsdp2", "dcp_path": None}, "cp_size": 2}, "fsdp2", 1,
        [BESIDE_BLOCKS, f"{WITHOUT_ULYSSES} (cp_size)"],
    ),
    (
        {**V1, "dist_config": {"name": "fsdp2"}, "bf16": False, "peft_config": {"name": "lora"}}, "fsdp2", 1,
        [BESIDE_BLOCKS],
    ),
    ({**V1, "dist_config": {"name": "fsdpturbo"}}, "fsdp2", 1, ["FSDP2, not FSDPTurbo"]),
    (
        {**V1, "dist_config": {"name": "deepspeed", "config_file": "ds_z3_config.json"}}, "zero3", 1,
        ["ZeRO-3 as the file's name says, its other options as usual (deepspeed)"],
    ),
]  # fmt: skip


def written(folder: Path, name: str, values: Any) -> str:
    """A file with these values; returns its path."""
    (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / name)


def ask(*args: str) -> Result:
    """A quick question with these options."""
    return CliRunner().invoke(main, ["predict", "--device", "h100-sxm", *args])


@pytest.mark.parametrize(("values", "parallel", "tp", "said"), FORMS)
def test_a_training_config_names_its_form(
    tmp_path: Path, values: dict[str, Any], parallel: str, tp: int, said: list[str]
) -> None:
    """What the file asks of several GPUs is what is answered for them, and what of it is not modelled is said."""
    found = read(written(tmp_path, "config.yml", values))
    form = found.asks()
    several = found.on_several(form)
    setup = Setup(**several.setup, gpus=8)
    assert (setup.parallel, setup.tp) == (parallel, tp)
    assert [*form.unlike, *form.besides, *form.on_mesh] == said
    assert set(said) <= set(several.differences)
    assert not [words for words in several.differences if words.startswith("one GPU") or "the place of" in words]


def test_gpus_take_the_place_of_the_words_on_one(tmp_path: Path) -> None:
    """The first line of an answer for one GPU says how to ask for more; one for more no longer speaks of one."""
    config = written(tmp_path, "config.yml", {**AXOLOTL, "fsdp_config": {"offload_params": True}})
    alone, several = (ask("--config", config, *gpus) for gpus in ((), ("--gpus", "4")))
    assert alone.stdout.startswith(f"{DIFFERS}one GPU, without FSDP and its offloading (fsdp_config)")
    assert f"; {ASK}\n" in alone.stdout
    first, _, answer = several.stdout.partition("\n")
    assert "one GPU" not in first
    assert "offloading" not in first
    assert ASK not in first
    assert "4 x h100-sxm" in answer
    assert "fsdp1, weights and optimizer offloaded" in answer


def test_a_step_that_several_cannot_run_is_not_offered_to_them(tmp_path: Path) -> None:
    """A hint that ends in a refusal is worse than none."""
    config = written(tmp_path, "config.yml", {**AXOLOTL, "deepspeed": "zero2.json", "torch_compile": True})
    assert ASK not in read(config).first_line
    assert ask("--config", config, "--gpus", "2").stderr.splitlines()[-1].endswith("use --parallel ddp or fsdp2")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ((), {"gpus": 1, "parallel": "ddp", "engine": "deepspeed-zero3"}),
        (("--gpus", "4"), {"gpus": 4, "parallel": "zero3", "tp": 1, "engine": "deepspeed-zero3"}),
        (("--gpus", "4", "--parallel", "fsdp2"), {"gpus": 4, "parallel": "fsdp2", "engine": "torch"}),
        (("--gpus", "4", "--tp", "2"), {"gpus": 4, "parallel": "zero3", "tp": 2, "engine": "deepspeed-zero3"}),
    ],
)
def test_what_is_typed_wins_over_the_files_form(
    tmp_path: Path, typed: tuple[str, ...], expected: dict[str, Any]
) -> None:
    """Beside `--parallel fsdp2` nothing of the file's DeepSpeed is left, neither its engine nor what is said of it."""
    zero = {"stage": 3, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": "auto"}
    model = {"model_name_or_path": "tinyllama-1.1b"}
    config = written(tmp_path, "trl.yaml", {**TRL, **model, "deepspeed": {"zero_optimization": zero}})
    answer = json.loads(ask("--config", config, *typed, "--json").stdout)
    assert {name: answer["setup"][name] for name in expected} == expected
    said = any(words.startswith(BUCKETS) for words in answer["differs_from_config"])
    assert said == (expected["engine"] == "deepspeed-zero3")


LOCAL = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "mixed_precision": "bf16", "use_cpu": False}
EIGHT = {**LOCAL, "num_processes": 8}
DDP = {**EIGHT, "distributed_type": "MULTI_GPU"}
SHORT = {"zero_stage": 3, "zero3_init_flag": True, "offload_optimizer_device": "none"}
WHOLE = [f"{BUCKETS}, not DeepSpeed's 500,000,000 elements",
         "weights up to ten hidden sizes stay whole, not DeepSpeed's 100,000 elements"]  # fmt: skip
LAUNCHES: list[tuple[dict[str, Any], tuple[int | None, int | None], str, int, list[str]]] = [
    (DDP, (8, 1), "ddp", 1, []),
    ({**EIGHT, "distributed_type": False}, (1, None), "ddp", 1, []),  # NO without quotes
    ({**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2}, (8, 1), "fsdp2", 1, []),
    (
        {**EIGHT, "distributed_type": "FSDP", "num_processes": 16, "num_machines": 2}, (16, 2), "fsdp1", 1,
        [PREFETCHED, "wrapped block by block (auto_wrap_policy)"],
    ),
    (
        {**EIGHT, "distributed_type": "FSDP",
         "fsdp_config": {**FSDP_2, "fsdp_version": 1, "fsdp_sharding_strategy": 2, "fsdp_forward_prefetch": True}},
        (8, 1), "fsdp1", 1,
        [PREFETCHED, "without prefetch in the forward pass (forward_prefetch)"],
    ),
    ({**EIGHT, "distributed_type": "DEEPSPEED", "deepspeed_config": SHORT}, (8, 1), "zero3", 1, WHOLE),
    (
        {**EIGHT, "distributed_type": "DEEPSPEED", "deepspeed_config": {**SHORT, "offload_param_device": "cpu"}},
        (8, 1), "zero3", 1,
        [*WHOLE, "offloaded to page-locked memory (zero_optimization.offload_param)",
         "optimizer states offloaded like the weights"],
    ),
    (
        {**EIGHT, "distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "mine.json"}}, (8, 1),
        "zero2", 1, [],
    ),
    (
        {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2, "parallelism_config": {
            "parallelism_config_dp_shard_size": 2, "parallelism_config_tp_size": 2, "parallelism_config_cp_size": 2}},
        (8, 1), "fsdp2", 2, [f"{CUT_WHEN_LOADED} (tp_size)"],
    ),
    (
        {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2,
         "parallelism_config": {"dp_replicate_size": 2, "dp_shard_size": 2, "cp_size": 2, "mine": 1}},
        (8, 1), "fsdp2", 1, ["keys that are unknown here (mine)"],
    ),
    (
        {**EIGHT, "distributed_type": "DEEPSPEED", "deepspeed_config": {**SHORT, "zero_stage": 2}, "parallelism_config":
         {"parallelism_config_sp_size": 4, "parallelism_config_sp_backend": "deepspeed"}},
        (8, 1), "zero2", 1, [f"{BUCKETS}, not DeepSpeed's 500,000,000 elements", OVERLAPPED],
    ),
    (
        {**LOCAL, "distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "INDUCTOR"}, "mine": 1},
        (None, 1), "ddp", 1, ["without torch.compile (dynamo_config)", "keys that are unknown here (mine)"],
    ),
    (ZERO_2, (None, None), "zero2", 1, []),
    (
        {**ZERO_2, "zero_optimization": {"stage": 3, "reduce_bucket_size": 12845056, "sub_group_size": 0,
                                         "stage3_param_persistence_threshold": "auto"}},
        (None, None), "zero3", 1,
        ["weights updated together, not in sub-groups (zero_optimization.sub_group_size)",
         f"{BUCKETS} (zero_optimization.reduce_bucket_size)"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "sizes", "parallel", "tp", "said"), LAUNCHES)
def test_a_launchers_config_says_what_gpus_do(
    tmp_path: Path, values: Any, sizes: tuple[int | None, int | None], parallel: str, tp: int, said: list[str]
) -> None:
    """accelerate's file, or DeepSpeed's own, which names no number of GPUs."""
    written(tmp_path, "mine.json", ZERO_2)
    (tmp_path / "mine.json").write_text(json.dumps(ZERO_2))
    launch = read_launch(Path(written(tmp_path, "launch.yaml", values)))
    assert ((launch.gpus, launch.nodes), launch.form.parallel, launch.form.tp) == (sizes, parallel, tp)
    assert [*launch.form.unlike, *launch.form.besides, *launch.form.on_mesh] == said


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"a": 1}, "neither accelerate's config nor DeepSpeed's"),
        ({"num_processes": 4, "dataset_name": "x"}, "neither accelerate's config nor DeepSpeed's"),
        ([1], "keys and values are expected"),
        ({**EIGHT, "distributed_type": "MEGATRON_LM"}, "'MEGATRON_LM' is not modelled: MULTI_GPU, FSDP, DEEPSPEED"),
        ({**EIGHT, "distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 3}}, "version must be 1 or 2"),
        ({**EIGHT, "distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "FULL"}}, "full_shard"),
        ({**EIGHT, "distributed_type": "FSDP", "fsdp_config": [1]}, "fsdp_config: keys and values are expected"),
        ({**EIGHT, "distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 4}}, "stage must be 0, 1, 2 or"),
        ({**EIGHT, "num_processes": "many"}, "num_processes must be a positive integer"),
        ({**EIGHT, "num_machines": 3, "distributed_type": "MULTI_GPU"}, "8 do not spread evenly over 3 nodes"),
        ({**EIGHT, "mixed_precision": "int8"}, "mixed_precision must be no, bf16, fp16 or fp8"),
        ({**EIGHT, "use_cpu": True}, "give a CPU as --device"),
        ({**EIGHT, "compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment"),
        ({**ZERO_2, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 exclude each other"),
    ],
)
def test_what_is_no_launch_of_gpus_is_refused_in_a_line(tmp_path: Path, values: Any, told: str) -> None:
    """A file of another kind, or of a program that is not modelled."""
    result = ask("--accelerate", written(tmp_path, "launch.yaml", values), "--model", "gpt2")
    complaints = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert (result.exit_code, len(complaints)) == (2, 1)
    assert told in complaints[0]


@pytest.mark.parametrize(
    ("config", "launch", "typed", "expected", "first"),
    [
        (None, {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2}, (),
         {"gpus": 8, "nodes": 1, "parallel": "fsdp2", "amp": "bf16"}, []),
        (None, DDP, ("--gpus", "16"), {"gpus": 16, "nodes": None}, []),
        (None, {**EIGHT, "distributed_type": "DEEPSPEED", "num_processes": 1, "deepspeed_config": SHORT}, (),
         {"gpus": 1, "engine": "deepspeed-zero3"}, WHOLE),
        (None, {**EIGHT, "distributed_type": "FSDP", "num_processes": 1, "fsdp_config": FSDP_2}, (), {"gpus": 1},
         ["one GPU, without FSDP"]),
        (None, {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "fp16": {"enabled": True}},
         ("--gpus", "2", "--dtype", "fp16"), {"parallel": "zero2", "amp": "fp16", "clip_grad": False},
         [OVERLAPPED, UNSCALED]),
        ({**FACTORY, "bf16": None}, {**DDP, "num_processes": 1, "mixed_precision": "fp16"}, (), {"amp": "fp16"},
         [UNSCALED]),
        ({**FACTORY, "bf16": None, "finetuning_type": "lora"}, {**DDP, "num_processes": 1, "mixed_precision": "fp16"},
         (), {"amp": None, "dtype": "bf16"}, ["products in bf16, not in fp16 under autocast"]),
        (FACTORY, {**EIGHT, "distributed_type": "FSDP", "mixed_precision": "fp16", "fsdp_config": FSDP_2}, (),
         {"gpus": 8, "parallel": "fsdp2", "amp": "bf16", "checkpoint": "block"}, []),  # the config's precision counts
        ({**FACTORY, "bf16": None}, DDP, (), {"amp": "bf16", "dtype": "fp32"}, []),
        ({**AXOLOTL, "bf16": False, "tf32": False}, DDP, (), {"amp": None}, []),
        ({**FACTORY, "deepspeed": ZERO_2}, DDP, (), {"parallel": "zero2"}, []),
        ({**FACTORY, "disable_gradient_checkpointing": True},
         {**EIGHT, "distributed_type": "FSDP", "fsdp_config": {**FSDP_2, "fsdp_activation_checkpointing": True}}, (),
         {"checkpoint": "block"}, []),
        ({**TRL, "use_peft": True, "dtype": "bfloat16"},
         {**EIGHT, "distributed_type": "DEEPSPEED", "deepspeed_config": SHORT}, (),
         {"parallel": "zero3", "checkpoint": "block-reentrant"}, [*WHOLE, NOT_CAST]),
        (FACTORY, {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2}, (), {"checkpoint": "block"}, []),
        (FACTORY, {**EIGHT, "distributed_type": "FSDP", "num_processes": 1, "fsdp_config": FSDP_2}, (),
         {"checkpoint": "block"}, ["one GPU, without FSDP"]),
        (FACTORY, {**EIGHT, "distributed_type": "FSDP", "fsdp_config": {**FSDP_2, "fsdp_version": 1}}, (),
         {"checkpoint": "block-reentrant"}, []),
    ],
)  # fmt: skip
def test_a_launcher_stands_beside_a_training_config_or_typed_options(
    tmp_path: Path, config: Any, launch: Any, typed: tuple[str, ...], expected: dict[str, Any], first: list[str]
) -> None:
    """GPUs, nodes and their form are the launcher's; what the training config says of itself counts before it."""
    model = ["--config", written(tmp_path, "c.yml", config)] if config else ["--model", "gpt2", "--seq", "64"]
    for order in (("a", "b"), ("b", "a")):
        parts = {"a": model, "b": ["--accelerate", written(tmp_path, "launch.yaml", launch)]}
        result = ask(*parts[order[0]], *parts[order[1]], *typed, "--json")
        assert result.exit_code == 0, result.stderr
        answer = json.loads(result.stdout)
        assert {name: answer["setup"][name] for name in expected} == expected
        said = answer["differs_from_config"]
        assert set(first) <= set(said)
        assert config is not None or said == first


@pytest.mark.parametrize(
    "command", [("compare",), ("explain", "full", "lora"), ("plan", "--samples", "100"), ("advise", "--method", "full")]
)
def test_every_question_takes_a_launcher(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Whoever has the file has any of the questions."""
    launch = written(tmp_path, "launch.yaml", {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2})
    where = ["--model", "gpt2", "--seq", "16", "--device", "h100-sxm", "--accelerate", launch]
    result = CliRunner().invoke(main, [*command, *where])
    assert result.exit_code == 0, result.output
    assert "8 x h100-sxm" in " ".join(result.stdout.split())


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    """One of them would be passed over without a word."""
    config = written(tmp_path, "c.yml", {**FACTORY, "deepspeed": ZERO_2})
    launch = written(tmp_path, "l.yaml", {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2})
    result = ask("--config", config, "--accelerate", launch)
    assert result.exit_code == 2
    assert "the training config asks for zero2, the launcher for fsdp2: leave one of them out" in result.stderr
    both = written(tmp_path, "both.yml", {**AXOLOTL, "deepspeed": ZERO_2, "fsdp_config": {"version": 2}})
    with pytest.raises(UserError, match="deepspeed and fsdp_config exclude each other"):
        read(both).asks()


values = st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=5) | st.lists(st.integers(), max_size=2)


@settings(max_examples=60, phases=(Phase.generate,))
@given(place=st.sampled_from(range(len(LAUNCHES))), data=st.data())
def test_a_spoilt_launch_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, data: st.DataObject
) -> None:
    """Whatever stands under a key, of a section too: a launch or a `UserError`, never another exception."""
    spoilt = dict(LAUNCHES[place][0])
    for key in data.draw(st.lists(st.sampled_from(sorted(spoilt)), min_size=1, max_size=2)):
        inner = spoilt[key]
        if isinstance(inner, dict) and inner and data.draw(st.booleans()):
            spoilt[key] = {**inner, data.draw(st.sampled_from(sorted(inner))): data.draw(values)}
        else:
            spoilt[key] = data.draw(values)
    with suppress(UserError):
        launch = read_launch(Path(written(tmp_path_factory.mktemp("spoilt"), "launch.yaml", spoilt)))
        Setup(**launch.of(None, several=True).setup, gpus=8)
