"""`perfmodel validate measure --parallel`: steps that two processes share, on a CPU with gloo."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from campaigns import TINY
from documented import typed
from made_up_node import cpu_node

pytest.importorskip("peft")

import torch
import torch.distributed as dist

from perfmodel.errors import UserError
from perfmodel.program.installed import unmirrored
from validate.checking.check import check_records
from validate.measuring import names, team

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

FP32 = 4  # bytes
GRID = (
    "rounds = 1"
    + TINY
    + """tie_word_embeddings = false
[[cells]]
models = ["tiny"]
methods = ["full", "lora:r=4"]
setups = [{ batch = 2, seq = 16, dtype = "fp32" }]
[[cells]]
models = ["tiny"]
methods = ["lora:r=2"]
setups = [{ batch = 2, seq = 16, dtype = "bf16", amp = "bf16", grad_accum = 2 }]
"""
)
METHODS = ("full", "lora:r=4", "lora:r=2")
# The embedding, two blocks, and the last norm with the head; under PEFT accelerate finds no last norm
GATHERED = {"full": 4, "lora:r=4": 5}


@pytest.fixture(scope="module")
def records(site: Path, ready: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave; both ways of sharing write to one file."""
    folder = tmp_path_factory.mktemp("team")
    output = folder / "records.jsonl"
    (folder / "grid.toml").write_text(GRID)
    torchrun = "OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2"
    as_module = "import runpy; runpy.run_module('perfmodel', run_name='__main__', alter_sys=True)"
    perfmodel = shlex.join([*ready, "-c", as_module])  # what `-m perfmodel` runs, with PyTorch loaded
    measure = "validate measure --device cpu --grid grid.toml --parallel"
    for kind in team.KINDS:
        done = typed(f"{torchrun} --no-python {perfmodel} {measure} {kind}", site, folder)
        assert done.returncode == 0, done.stderr[-2000:]
    return output


@pytest.fixture
def visits(records: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(way of sharing, method) -> its record."""
    found = [json.loads(line) for line in records.read_text().splitlines()]
    return {(r["parallel"]["kind"], r["cell"]["method"]): r for r in found if r["kind"] == "visit"}


def test_what_was_measured_is_what_the_tape_says(records: Path, tmp_path: Path) -> None:
    """From torchrun to the check: every call, collective and byte of a rank, and its memory within 1 %.

    (Under autocast oneDNN's own memory for a product is a twentieth of so small a model's.)
    """
    if unmirrored():
        pytest.skip("other versions than the tape mirrors")
    (tmp_path / "r.jsonl").write_text(records.read_text().replace('"cores": 1}', '"cores": 2}'))  # as on two
    found = check_records([tmp_path / "r.jsonl"], device="cpu-epyc-genoa-1t", node=cpu_node(tmp_path / "node.toml"))
    assert len(found.shared) == len(team.KINDS) * len(METHODS)
    for o in found.shared:
        assert o.differences == []
        assert abs(o.memory_error) < (0.01 if o.measured.cell.setup.amp is None else 0.07)


def test_two_processes_leave_one_record_a_cell(visits: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Two writers, or a process that works on another cell, would spoil hours of several GPUs."""
    assert set(visits) == {(kind, method) for kind in team.KINDS for method in METHODS}
    for (kind, _), r in visits.items():
        assert r["status"] == "ok"
        assert r["parallel"].pop("cores") >= 1
        assert r["parallel"] == {"kind": kind, "processes": 2, "nodes": 1, "backend": "gloo"}
        assert 0 < r["profile"]["communication_share"] <= 1
        assert len(r["step_of_each"]) == 2
        assert r["clock"] == "wall"


def test_messages_are_those_of_the_way_of_sharing(visits: dict[tuple[str, str], dict[str, Any]]) -> None:
    """By hand: DDP reduces every trained gradient once; FSDP2 gathers all weights and scatters trained gradients."""
    for method in ("full", "lora:r=4"):
        r = visits["ddp", method]
        assert r["messages"]["backward"]["allreduce"][1] == r["params"]["trainable"] * FP32
        r = visits["fsdp2", method]
        assert r["messages"]["forward"]["allgather"] == [GATHERED[method], r["params"]["total"] * FP32]
        assert r["messages"]["backward"]["reducescatter"][1] == r["params"]["trainable"] * FP32
        assert r["messages"]["optimizer"].keys() == {"allreduce"}  # the norm of the gradients


def test_micro_batches_but_the_last_exchange_no_gradients(visits: dict[tuple[str, str], dict[str, Any]]) -> None:
    """accelerate's no_sync: without it accumulation would be measured with traffic that nobody's program has."""
    for kind, reducing in (("ddp", "allreduce"), ("fsdp2", "reducescatter")):
        r = visits[kind, "lora:r=2"]
        trained = r["params"]["trainable"] * (FP32 if kind == "ddp" else FP32 // 2)  # FSDP2 casts to the autocast dtype
        assert r["messages"]["backward"][reducing][1] == trained


def test_fsdp2_holds_half_of_what_ddp_holds(visits: dict[tuple[str, str], dict[str, Any]]) -> None:
    """What is spread must not be counted whole, or the memory of a large model would look out of reach.

    DDP also keeps its buckets.
    """
    held = {kind: visits[kind, "full"]["memory"]["held"] for kind in team.KINDS}
    buckets = visits["ddp", "full"]["params"]["trainable"] * FP32
    assert held["fsdp2"] == pytest.approx((held["ddp"] - buckets) / 2, rel=0.02)


def test_alone_it_is_refused_in_one_line() -> None:
    """Without torchrun the process would wait for others that never come."""
    if team.under_torchrun():
        pytest.skip("the tests themselves run under torchrun")
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        team.join("ddp", "cpu")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (torch.ops.c10d.allreduce_.default, "allreduce"),
        (torch.ops.c10d._allgather_base_.default, "allgather"),
        (torch.ops.c10d._reduce_scatter_base_.default, "reducescatter"),
        (torch.ops._c10d_functional.all_gather_into_tensor.default, "allgather"),
        (torch.ops._c10d_functional.reduce_scatter_tensor.default, "reducescatter"),
    ],
)
def test_collectives_have_one_name(call: Any, name: str) -> None:
    """The eager and the functional form of a collective move the same bytes."""
    assert names.plain_collective(call._schema.name) == name
