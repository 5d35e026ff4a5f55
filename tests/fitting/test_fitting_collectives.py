"""Fits of collectives: known figures are found again, and only rows that tell something are taken."""

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("scipy")
pytest.importorskip("pandas")

import pandas as pd

from perfmodel import Node, UserError
from perfmodel.cli import main
from perfmodel.network import files, price
from validate.fitting.collectives import fit, rows

SKEW = rows.SKEW["profiler kernel time"]
SIZES = [2**i for i in range(9, 30)]


def table(system: str, kind: str, **changes: Any) -> Any:
    """Times of a kind as the bundled node has them, in the form of the published table."""
    node = Node.load(rows.WITHIN[system])
    made = pd.DataFrame(
        [
            {"message_bytes": size, "n_gpus": n, "latency_s": node.collective(kind, size, n)}
            for size, n in product(SIZES, (2, 4, 8))
        ]
    )
    return made.assign(**{
        "system": system, "n_nodes": 1, "collective": kind, "library": "nccl", "library_version": "2.29.2",
        "algorithm": "auto", "dtype": "half", "launch": "stream, back to back", "source": "aiconfigurator", **changes,
    })  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """All-gathers of one node, and rows that say nothing about it."""
    good = table("h100_sxm", "all_gather")
    other = table("h100_sxm", "all_gather", library="vllm", latency_s=1.0)
    unknown = table("h100_sxm", "all_gather", latency_s=1.0).assign(system="somewhere")
    forced = table("h100_sxm", "all_gather", algorithm="NVLS off (ring)", latency_s=1.0)
    skewed = table("h100_dgx", "all_reduce", launch="profiler kernel time")
    skewed.loc[skewed.message_bytes < SKEW, "latency_s"] = 1.0
    where = tmp_path / "collectives.parquet"
    pd.concat([good, other, unknown, forced, skewed]).to_parquet(where)
    return where


def test_what_made_the_rows_is_found_again(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that cannot find the figures of its own model would not find those of a machine."""
    nodes = tmp_path / "nodes"
    shutil.copytree(files.NODES, nodes)
    before = {p.name: p.read_bytes() for p in nodes.iterdir()}
    monkeypatch.setattr(fit, "NODES", nodes)
    found = fit.fit_collectives(path, write=True)
    errors = {(r["kind"], r["slice"]): r for r in found}
    gathers = errors["all_gather", fit.HEADLINE]
    assert gathers["rows"] == len(SIZES) * 3, "other libraries, machines and algorithms are left out"
    assert gathers["mean"] < 0.03
    assert gathers["line_mean"] > 0.2, "three protocols are no line"
    reduces = errors["all_reduce", fit.HEADLINE]
    assert reduces["rows"] == 3 * sum(size >= SKEW for size in SIZES)
    assert reduces["mean"] < 0.05
    written = {p.name: p.read_bytes() for p in nodes.iterdir()}
    assert {name for name in before if written[name] != before[name]} == {"dgx-h100.toml"}
    refitted, known = files.load(nodes / "dgx-h100.toml"), Node.load("dgx-h100")
    assert refitted.blocks["all_gather"].origin == "fitted"
    size = np.array(SIZES)
    ratio = Node(refitted).collective("all_gather", size, 8) / known.collective("all_gather", size, 8)
    assert np.abs(np.log(ratio)).max() < 0.1


def test_left_out_sizes_are_unseen(path: Path) -> None:
    """An error is only one on rows that no fit saw: one that all fits see must not change what is predicted for it."""
    own = rows.read_collectives(path)
    own = own[own.kind == "all_gather"]
    links = Node.load("dgx-h100").file.links
    task = fit._task_within(links, fit.USUAL, adding=False)
    spoilt = own.copy()
    chosen = spoilt.octave == spoilt.octave.max()
    spoilt.loc[chosen, "seconds"] *= 7.0
    its = chosen.to_numpy()
    assert fit._left_out(spoilt, task, "octave")[its] == pytest.approx(fit._left_out(own, task, "octave")[its])


def test_a_node_of_which_little_is_known_is_like_others_with_a_switch(tmp_path: Path) -> None:
    """Three messages say little of an A100's node: the rest is what H100s have made of links of another speed."""
    few = table("a100_sxm", "all_gather")
    few = few[few.message_bytes.isin([2**16, 2**20, 2**24]) & (few.n_gpus == 8)]
    where = tmp_path / "collectives.parquet"
    pd.concat([table("h100_sxm", "all_gather"), few]).to_parquet(where)
    read, known = rows.read_collectives(where), Node.load("dgx-a100")
    found = fit._fit_within(read, read[read.node == "dgx-a100"], "dgx-a100", "all_gather").parameters
    size, gpus = np.array(SIZES, dtype=float), np.full(len(SIZES), 8.0)
    seconds = price.within("all_gather", size, gpus, links=known.file.links, parameters=found, reduces=False)
    assert np.abs(np.log(seconds / known.collective("all_gather", size, 8))).mean() < 0.2


def test_the_command_prints_the_table(path: Path) -> None:
    """By GPU and collective, the plain line beside it."""
    arguments = ["validate", "fit", "--collectives", str(path), "--dry-run"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "plain line" in shown.output
    assert "h100-sxm" in shown.output
    told = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).output)
    assert {r["kind"] for r in told} == {"all_gather", "all_reduce"}


def test_a_file_of_something_else_is_said(tmp_path: Path) -> None:
    where = tmp_path / "other.parquet"
    pd.DataFrame({"m": [1]}).to_parquet(where)
    with pytest.raises(UserError, match="not a table of collectives"):
        rows.read_collectives(where)
