"""GPUs that share sequences, as accelerate's `parallelism_config` asks for them, and as other tools do."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.imports import read
from perfmodel.imports.accelerate import read_launch
from perfmodel.imports.mesh import MASK_DROPPED, NOT_LIGER, ONE_GROUP, OWN, WITHOUT_CP

AXOLOTL = {"base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 64, "bf16": True}
TRL = {"model_name_or_path": "tinyllama-1.1b", "max_length": 2048, "packing": False, "per_device_train_batch_size": 1}
SHARED = {"gpus": 4, "parallel": "fsdp2", "cp": 2, "cp_rotate": "alltoall", "packing": "none"}


def sharing(cp: int, gpus: int = 8, **more: Any) -> dict[str, Any]:
    """accelerate's file of GPUs that share sequences over FSDP2."""
    mesh = {"parallelism_config_dp_shard_size": 1, "parallelism_config_cp_size": cp}
    mesh |= {f"parallelism_config_{key}": value for key, value in more.items()}
    fsdp = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    return {
        "compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": gpus, "mixed_precision": "bf16",
        "distributed_type": "FSDP", "fsdp_config": fsdp, "parallelism_config": mesh,
    }  # fmt: skip


def written(folder: Path, name: str, values: Any) -> str:
    """A file with these values; returns its path."""
    (folder / name).write_text(yaml.safe_dump(values))
    return str(folder / name)


def ask(*args: str) -> Result:
    """A quick question with these options."""
    return CliRunner().invoke(main, ["predict", "--device", "h100-sxm", *args])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (sharing(4, gpus=8), "cp_size 4 are 4 GPUs, and num_processes says 8"),
        (sharing(1), "FSDP has no GPUs to shard over: give dp_shard_size"),
        (sharing(8, cp_backend="deepspeed"), "cp_backend 'deepspeed' is unknown"),
        (sharing(8, cp_comm_strategy="ring"), "cp_comm_strategy 'ring' is unknown"),
        (sharing(4, sp_size=2), "cp_size and sp_size exclude each other"),
        (sharing(4, dp_replicate_size=2), "dp_replicate_size beside tp_size or cp_size needs a dp_shard_size"),
        (sharing(0), "cp_size must be a positive integer"),
        ({**sharing(8), "parallelism_config": [8]}, "parallelism_config: keys and values are expected"),
        ({**sharing(8), "distributed_type": "MULTI_GPU"}, "not modelled with parallel ddp; use --parallel fsdp2"),
    ],
)
def test_what_accelerate_refuses_is_refused_in_a_line(tmp_path: Path, values: Any, told: str) -> None:
    """Whoever is answered for a mesh that does not start plans for nothing."""
    result = ask("--accelerate", written(tmp_path, "launch.yaml", values), "--model", "gpt2")
    complaints = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    assert (result.exit_code, len(complaints)) == (2, 1)
    assert told in complaints[0]


@pytest.mark.parametrize(
    ("values", "typed", "expected", "said"),
    [
        ({}, (), SHARED, []),
        ({"packing": True, "packing_strategy": "wrapped"}, (), SHARED, []),
        ({"packing": True}, (), SHARED, [f"{MASK_DROPPED} (cp_size)"]),
        ({"use_liger_kernel": True}, (), {**SHARED, "kernels": "torch"}, [f"{NOT_LIGER} (cp_size)"]),
        ({"packing": True, "per_device_train_batch_size": 2}, (), {"cp": 1, "packing": "varlen"},
         [f"{WITHOUT_CP} (cp_size)"]),
        ({"packing": True}, ("--cp", "1"), {"gpus": 4, "cp": 1, "packing": "varlen"}, []),
        ({"packing": True}, ("--gpus", "1"), {"gpus": 1, "cp": 1, "packing": "varlen"}, []),
        ({}, ("--gpus", "8"), {"gpus": 8, "cp": 2}, []),
    ],
)  # fmt: skip
def test_gpus_share_sequences_as_accelerate_has_it(
    tmp_path: Path, values: dict[str, Any], typed: tuple[str, ...], expected: dict[str, Any], said: list[str]
) -> None:
    """`cp_size` over FSDP2, whose hooks take every mask away; what is not modelled beside it is told."""
    launch = sharing(2, gpus=4, cp_comm_strategy="alltoall")
    launch["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    files = ["--config", written(tmp_path, "c.yml", {**TRL, **values})]
    files += ["--accelerate", written(tmp_path, "l.yml", launch)]
    answer = json.loads(ask(*files, *typed, "--json").stdout)
    assert {name: answer["setup"][name] for name in expected} == expected
    told = [words for words in answer["differs_from_config"] if "cp_size" in words or words.startswith("Liger")]
    assert told == said


def test_a_tool_that_shares_sequences_itself_is_not_given_accelerates(tmp_path: Path) -> None:
    """Axolotl's own attention takes the place of what accelerate would do (monkeypatch/accelerate)."""
    values = {**AXOLOTL, "context_parallel_size": 2, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
    launch = read_launch(Path(written(tmp_path, "l.yml", sharing(8))))
    found = launch.of(read(written(tmp_path, "c.yml", values)), several=True)
    assert "cp" not in found.setup
    assert f"{OWN['context_parallel_size']} (context_parallel_size)" in found.differences


def test_the_trainers_own_section_is_read_like_the_launchers(tmp_path: Path) -> None:
    """Its scripts hand `ParallelismConfig` over in Python; who writes it in a file means that."""
    values = {**TRL, "fsdp": True, "parallelism_config": {"cp_size": 2, "cp_comm_strategy": "alltoall"}}
    answer = json.loads(ask("--config", written(tmp_path, "c.yml", values), "--gpus", "4", "--json").stdout)
    assert {name: answer["setup"][name] for name in SHARED} == SHARED


def test_llama_factory_v1_knows_ulysses_alone(tmp_path: Path) -> None:
    """Another `cp_mode` ends in an error there, so that there is nothing to answer in its place."""
    values = {"model": "gpt2", "model_class": "llm", "cp_size": 2, "cp_mode": "ring"}
    with pytest.raises(UserError, match="cp_mode 'ring' is unknown"):
        read(written(tmp_path, "c.yml", values)).asks()
    assert read(written(tmp_path, "c.yml", values | {"cp_size": 1})).asks().on_mesh == ()


@pytest.mark.parametrize(
    ("sizes", "gpus", "group", "told"),
    [
        ({"dp_shard_size": 4}, "4", 4, False),
        ({"dp_shard_size": 4}, "8", 4, False),
        ({"dp_shard_size": 4, "context_parallel_size": 2}, "8", None, False),
        ({"dp_shard_size": 4, "context_parallel_size": 2}, "16", None, True),
        ({"dp_shard_size": 4, "dp_replicate_size": 2}, "8", 4, False),
        ({"dp_replicate_size": 2}, "8", None, True),
        ({"context_parallel_size": 2}, "8", None, False),
        ({}, "8", None, False),
    ],
)
def test_axolotl_shards_in_groups_where_there_are_more_gpus(
    tmp_path: Path, sizes: dict[str, int], gpus: str, group: int | None, told: bool
) -> None:
    """What its `dp_shard_size` leaves over are replicas; what of them is not modelled is said."""
    values = {**AXOLOTL, **sizes, "fsdp_version": 2, "fsdp_config": {"reshard_after_forward": True}}
    answer = json.loads(ask("--config", written(tmp_path, "c.yml", values), "--gpus", gpus, "--json").stdout)
    assert answer["setup"]["shard_group"] == group
    assert any(words.startswith(ONE_GROUP) for words in answer["differs_from_config"]) == told
