"""`perfmodel calibrate --network`: two processes on a CPU leave one node file that answers."""

import json
import shlex
from itertools import product
from pathlib import Path

import pytest
from click.testing import CliRunner
from documented import typed

pytest.importorskip("peft")

import pandas as pd
import torch.distributed as dist

from perfmodel import Node
from perfmodel.cli import main
from perfmodel.network import files
from validate.calibration.network import node_text
from validate.fitting.collectives.rows import grouped_rows


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_write_a_node(site: Path, ready: list[str], tmp_path: Path) -> None:
    """What torchrun starts on every GPU of a rented machine must end in one file, which the next command finds."""
    torchrun = f"PERFMODEL_HOME={tmp_path} OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2"
    as_module = "import runpy; runpy.run_module('perfmodel', run_name='__main__', alter_sys=True)"
    perfmodel = shlex.join([*ready, "-c", as_module])
    calibrate = "calibrate --network --device cpu --name two --seconds 5 --json"
    done = typed(f"{torchrun} --no-python {perfmodel} {calibrate}", site, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert {"all_reduce", "all_gather", "broadcast", "send_recv"} <= told["blocks"].keys()
    node = Node.load(tmp_path / "nodes" / "two.toml")
    assert node.gpus == 2
    assert node.file.blocks["all_reduce"].origin == "fitted"
    assert 1e-6 < node.collective("all_reduce", 4096) < node.collective("all_reduce", 2**20) < 1.0


def test_nodes_get_their_cards_measured_too() -> None:
    """Over two nodes what passes between them has its own figures: those of known times are found again."""
    known, kinds = Node.load("dgx-h100"), ("all_gather", "all_reduce")
    made = [
        {"node": "here", "kind": kind, "message": float(size), "gpus": float(nodes * n), "nodes": float(nodes),
         "reduces": False, "seconds": known.collective(kind, size, nodes * n, nodes, "i8"), "source": "here",
         "version": "", "launch": "back to back"}
        for kind, size, (n, nodes) in product(kinds, [4**i for i in range(5, 15)], [(2, 1), (4, 1), (8, 1), (8, 2)])
    ]  # fmt: skip
    text, fits = node_text(grouped_rows(pd.DataFrame(made)), 8, "h100-sxm", "cuda", "here")
    assert fits.keys() == {*kinds, "between"}
    found = Node(files.from_table("here", files.tomllib.loads(text), "here"))
    assert found.file.link == "nvswitch"
    assert all(block.origin == "fitted" for kind, block in found.file.blocks.items() if kind in fits)
    for kind, nodes in product(kinds, (1, 2)):
        for size in (2**14, 2**22, 2**28):
            there = known.collective(kind, size, nodes=nodes, dtype="i8")
            assert found.collective(kind, size, nodes=nodes, dtype="i8") == pytest.approx(there, rel=0.2)


@pytest.mark.parametrize(
    ("name", "fault"),
    [("dgx-h100", "is a bundled node"), ("mine", "torchrun --nproc-per-node N -m perfmodel calibrate")],
)
def test_what_cannot_be_measured_is_said(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    shown = CliRunner().invoke(main, ["calibrate", "--network", "--device", "cpu", "--name", name])
    assert shown.exit_code == 2
    assert fault in shown.output
