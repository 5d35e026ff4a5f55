"""How FSDP shards, as training configs and their launchers' say it."""

from pathlib import Path
from typing import Any

import pytest
from test_launches import AXOLOTL, EIGHT, FACTORY, FSDP_2, ONE_GROUP, TRL, V1, ask, written

from perfmodel import Setup
from perfmodel.imports import read
from perfmodel.imports.accelerate import read_launch


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({**AXOLOTL, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}, False),
        ({**AXOLOTL, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": False}}, True),
        ({**AXOLOTL, "fsdp_config": {"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}}, True),
        ({**TRL, "fsdp": "shard_grad_op auto_wrap"}, True),
        ({**TRL, "fsdp": True, "fsdp_config": {"version": 1, "reshard_after_forward": "FULL_SHARD"}}, False),
        ({**FACTORY, "fsdp": True, "fsdp_config": {"reshard_after_forward": False}}, True),
        ({**FACTORY, "fsdp": "no_shard"}, False),
        ({**V1, "dist_config": {"name": "fsdp2", "reshard_after_forward": False}}, True),
    ],
)
def test_weights_stay_gathered_where_a_file_asks_for_it(tmp_path: Path, values: dict[str, Any], kept: bool) -> None:
    """By its older names and numbers too; of a form that is typed in its place nothing of that is left."""
    found = read(written(tmp_path, "config.yml", values))
    assert Setup(**found.on_several(found.asks()).setup, gpus=8).reshard != kept
    assert Setup(**found.on_several(found.asks().as_typed("zero3")).setup, gpus=8).reshard


@pytest.mark.parametrize(
    "said", [{"fsdp_version": 1, "fsdp_sharding_strategy": 2}, {"fsdp_reshard_after_forward": False}]
)
def test_a_launcher_keeps_weights_gathered(tmp_path: Path, said: dict[str, Any]) -> None:
    """accelerate's file, alone and for a training config that names no form."""
    launch = written(tmp_path, "launch.yaml", {**EIGHT, "distributed_type": "FSDP", "fsdp_config": {**FSDP_2, **said}})
    config = written(tmp_path, "config.yml", AXOLOTL)
    for named in (("--model", "gpt2", "--method", "full"), ("--config", config)):
        found = ask(*named, "--accelerate", launch)
        assert found.exit_code == 0, found.output
        assert "weights kept gathered" in found.stdout


HYBRID: dict[str, Any] = {**AXOLOTL, "fsdp_config": {"version": 2}, "dp_replicate_size": 2}


@pytest.mark.parametrize(
    ("values", "group", "said"),
    [
        ({**HYBRID, "dp_shard_size": 4}, 4, False),
        ({**V1, "dist_config": {"name": "fsdp2"}, "mp_replicate_size": 4, "mp_shard_size": 2}, 2, False),
        (HYBRID, None, True),  # the rest of however many there are
        ({**HYBRID, "dp_shard_size": 2, "tensor_parallel_size": 2}, 2, False),
        ({**HYBRID, "dp_shard_size": 4, "rl": "dpo"}, 4, False),
        ({**HYBRID, "dp_shard_size": 2, "tensor_parallel_size": 2, "rl": "dpo"}, None, True),
        ({**AXOLOTL, "dp_replicate_size": 2}, None, False),  # DDP
        ({**AXOLOTL, "dp_shard_size": 8, "fsdp_config": {"version": 2}}, 8, False),
    ],
)
def test_shards_lie_over_groups_as_a_mesh_has_them(
    tmp_path: Path, values: dict[str, Any], group: int | None, said: bool
) -> None:
    """Where the mesh says how large its groups are, and nothing else shares the ranks; else the answer differs."""
    found = read(written(tmp_path, "config.yml", values))
    several = found.on_several(found.asks()).over((8,))
    assert Setup(**several.setup, gpus=8).shard_group == group
    assert any(words.startswith(ONE_GROUP) for words in several.differences) == said
    assert found.on_several(found.asks().as_typed("zero3")).setup["shard_group"] is None


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"dp_shard_size": 4}, "fsdp2, shards in groups of 4"),
        ({"dp_shard_size": 2, "cp_size": 2}, "fsdp2, shards in groups of 4, context parallel 2"),
        ({"dp_shard_size": 2, "tp_size": 2}, "fsdp2, shards in groups of 2, tensor parallel 2"),
    ],
)
def test_a_launcher_has_groups_of_shards(tmp_path: Path, sizes: dict[str, int], told: str) -> None:
    """accelerate's `ParallelismConfig`: those that share a sequence have shards of their own, those of a layer none."""
    mesh = {f"parallelism_config_{name}": n for name, n in {"dp_replicate_size": 2, **sizes}.items()}
    values = {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2, "parallelism_config": mesh}
    launch = written(tmp_path, "launch.yaml", values)
    found = ask("--model", "llama-3.1-8b", "--method", "full", "--accelerate", launch)
    assert found.exit_code == 0, found.output
    assert told in " ".join(found.stdout.split())
    assert ONE_GROUP not in found.stdout


@pytest.mark.parametrize(
    ("strategy", "sizes", "group"),
    [
        ("HYBRID_SHARD", {"num_processes": 16, "num_machines": 2}, 8),
        (5, {"num_processes": 8, "num_machines": 2}, 4),  # the zero2 form of it
        ("HYBRID_SHARD", {"num_processes": 8}, 8),
        ("HYBRID_SHARD", {"num_processes": 2, "num_machines": 2}, None),
        ("FULL_SHARD", {"num_processes": 16, "num_machines": 2}, None),
    ],
)
def test_hybrid_shards_lie_in_nodes(
    tmp_path: Path, strategy: str | int, sizes: dict[str, int], group: int | None
) -> None:
    """FSDP1 makes a group of every node's GPUs; a launcher's file says how many that are."""
    options = {**FSDP_2, "fsdp_version": 1, "fsdp_sharding_strategy": strategy}
    values = {**EIGHT, "distributed_type": "FSDP", "fsdp_config": options, **sizes}
    form = read_launch(Path(written(tmp_path, "launch.yaml", values))).form
    assert (form.parallel, form.shard_group, form.reshard) == ("fsdp1", group, strategy != 5)
    assert (ONE_GROUP in form.unlike) == (group is None and strategy == "HYBRID_SHARD")


IN_4_BITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({**AXOLOTL, "adapter": "qlora", "load_in_4bit": True, "lora_target_linear": True}, {}, "bf16"),
    ({**FACTORY, "finetuning_type": "lora", "quantization_bit": 4, "fp16": True}, {"bf16": False}, "fp16"),
]


@pytest.mark.parametrize(("values", "changes", "held"), IN_4_BITS)
def test_tools_hold_weights_of_4_bits_in_floats_that_shards_can_cut(
    tmp_path: Path, values: dict[str, Any], changes: dict[str, Any], held: str
) -> None:
    """In bytes every GPU would have all of them: 35.9 GB of a 70B model, where eight GPUs have 5.9 each."""
    config = written(tmp_path, "config.yml", {**values, **changes})
    found = read(config)
    assert "quant_storage" not in str(found.method)
    for form in ("fsdp1", "fsdp2", "zero3"):
        method = found.on_several(found.asks().as_typed(form)).method
        assert str(method).endswith(f"quant_storage={held}")
    assert "quant_storage" not in str(found.on_several(found.asks().as_typed("ddp")).method)
    launch = written(tmp_path, "launch.yaml", {**EIGHT, "distributed_type": "FSDP", "fsdp_config": FSDP_2})
    named = ("--config", config, "--accelerate", launch, "--model", "llama-3.2-1b", "--device", "l40s")
    assert f"quant_storage={held}" in ask(*named, "--json").output
    typed = ask(*named, "--method", "qlora:r=4", "--json").output
    assert "qlora:r=4" in typed
    assert f"quant_storage={held}" not in typed.split("differs_from_config")[0]


@pytest.mark.parametrize(("said", "held"), [("bfloat16", "bf16"), ("uint8", None), (None, None)])
def test_trl_names_what_holds_weights_of_4_bits(tmp_path: Path, said: str | None, held: str | None) -> None:
    values = {**TRL, "use_peft": True, "load_in_4bit": True, **({"bnb_4bit_quant_storage": said} if said else {})}
    method = str(read(written(tmp_path, "config.yml", values)).method)
    assert method.partition("quant_storage=")[2] == (held or "")
