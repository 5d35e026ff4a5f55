"""A job in partitions gives the rows of one process, whoever dies on the way; those of two questions never mix."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from perfmodel import partitions, sweep
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.partitions import Partitions, Workers, answered
from perfmodel.questions import sweeps
from perfmodel.questions.plan import apart, planning

pytest.importorskip("pyarrow")

SWEEP = shlex.split("sweep --model smollm2-135m --methods full lora --batch 1+4 --seq 64-256:64 --device l40s l4 t4")
PLAN = shlex.split("plan --model smollm2-135m --methods full lora --samples 1000 --seq 4096 --batch 64 --json")


def answer(words: list[str], *more: str) -> str:
    done = CliRunner().invoke(main, [*words, *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(words: list[str], *more: str) -> str:
    """The line of a command that ends in one."""
    done = CliRunner().invoke(main, [*words, *more])
    assert done.exit_code == 2, done.output
    assert done.output.count("\n") == 1
    return done.output


def rows(blocks: list[dict[str, np.ndarray]]) -> list[bytes]:
    """Every row as bytes, sorted."""
    found = (repr(row).encode() for block in blocks for row in zip(*(c.tolist() for c in block.values()), strict=True))
    return sorted(found)


def test_a_killed_worker_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job of hours some machine dies: its partitions are computed elsewhere, and the rows are those of one process
    to the last bit. What a worker cannot answer is one line here."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(sweeps, "BLOCK", 1024)
    axes = {"batch": range(1, 33), "seq": range(32, 8192, 32)}
    grid = sweep("smollm2-135m", ["full", "lora"], device="l40s", **axes)
    wide = sweep("smollm2-135m", ["full", "lora"], device="l40s", rank=10**6)
    quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, **quiet) as cluster:
        with distributed.Client(cluster) as client:
            first, *_ = client.run(os.getpid).values()
        kept = Partitions(tmp_path / "parts", grid.question(), Workers(address=cluster.scheduler_address))
        told: list[int] = []

        def kill(number: int) -> None:
            if not told:
                os.kill(first, signal.SIGKILL)
            told.append(number)

        kept.fill(grid.parts(), kill)
        assert sorted(told) == list(range(8))
        with distributed.Client(cluster) as client:
            assert first not in client.run(os.getpid).values()
        with pytest.raises(UserError, match="exceeds the width"):
            list(answered(enumerate(wide.parts()), kept.workers))
    assert rows([kept.columns(*place) for place in grid.order()]) == rows(list(grid.blocks()))


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    """The command by the hand of a user: killed, typed again, and its file is that of a run that nothing befell."""
    folder = tmp_path / "parts"
    words = [*SWEEP, "a30", "--rank", "1-16"]
    with subprocess.Popen([sys.executable, "-m", "perfmodel", *words, "--partitions", str(folder)]) as begun:
        while begun.poll() is None and not list(folder.glob("part-*")):
            time.sleep(0.002)
        begun.kill()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert 0 < len(before) < 4
    answer(words, "-o", str(tmp_path / "again.parquet"), "--partitions", str(folder))
    assert len(list(folder.glob("part-*"))) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    answer(words, "-o", str(tmp_path / "one.parquet"))
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "one.parquet").read_bytes()


def test_partitions_beside_a_file_go_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder of one's own a killed command goes on all the same, and a finished one leaves one file."""
    pytest.importorskip("distributed")
    output, count = tmp_path / "rows.csv", 0

    def begun(tasks: Any, workers: Workers) -> Any:
        assert workers.count == 2
        for number, found in answered(tasks, Workers()):
            nonlocal count
            count += 1
            if count == 2:
                raise UserError("lost")
            yield number, found

    monkeypatch.setattr(partitions, "answered", begun)
    assert "lost" in refused(SWEEP, "-o", str(output), "--workers", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv.partitions"]
    answer(SWEEP, "-o", str(output), "--workers", "2")
    assert count == 4, "one of three was there"
    assert list(tmp_path.iterdir()) == [output]


def test_parts_are_put_back_in_the_order_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More methods and ranks than a part takes, more points than a block: the columns are those of `table`."""
    monkeypatch.setattr(sweeps, "BLOCK", 7)
    monkeypatch.setattr(sweeps, "TOGETHER", 3)
    axes = {"batch": (1, 2), "seq": range(16, 96, 16), "rank": (2, 4)}
    grid = sweep("gpt2", ["lora", "full", "ia3"], device=["l4", "t4"], **axes)
    kept = Partitions(tmp_path, grid.question(), Workers())
    kept.fill(grid.parts(), lambda _: None)
    found = [kept.columns(*place) for place in grid.order()]
    for name, values in grid.table().items():
        np.testing.assert_array_equal(np.concatenate([block[name] for block in found]), values)


def test_a_plan_in_partitions_is_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits, what is given up, what is refused and why: found by others, told the same."""
    monkeypatch.setattr(planning, "TOGETHER", 2)
    monkeypatch.setattr(apart, "TOGETHER", 2)
    words = [*PLAN, "--device", "l40s", "t4", "p100", "--fp8", "tensorwise"]
    whole = answer(words)
    assert {"why", "runs"} < {*re.findall(r'"(why|runs|given_up)"', whole)}
    assert answer(words, "--partitions", str(tmp_path / "parts")) == whole
    assert answer(words, "--workers", "2") == whole
    monkeypatch.setattr(planning.Planner, "outcomes", None)
    assert answer(words, "--partitions", str(tmp_path / "parts"), "--price", "2") != whole, "prices are no part of it"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Partitions of `SWEEP`."""
    folder = tmp_path_factory.mktemp("swept") / "parts"
    answer(SWEEP, "--partitions", str(folder))
    return folder


def broken(folder: Path) -> None:
    part = folder / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-100])


def overwritten(folder: Path) -> None:
    part = folder / "part-000001.parquet"
    content = bytearray(part.read_bytes())
    content[300:400] = bytes(100)
    part.write_bytes(content)


def renumbered(folder: Path) -> None:
    shutil.copy(folder / "part-000000.parquet", folder / "part-000001.parquet")


def foreign(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "thesis.tex").touch()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def unreadable(folder: Path) -> None:
    (folder / "_question.json").write_text("{")


def older(folder: Path) -> None:
    question = json.loads((folder / "_question.json").read_text())
    (folder / "_question.json").write_text(json.dumps({**question, "program": "0"}))


def as_it_is(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("happens", "more", "says"),
    [
        (broken, (), "part-000001.parquet: broken"),
        (overwritten, (), "part-000001.parquet: broken"),
        (renumbered, (), "part-000001.parquet: a partition of another question"),
        (foreign, (), "holds no partitions but 'thesis.tex'"),
        (a_file, (), "is a file"),
        (as_it_is, ("--partitions", "/dev/null/parts"), "cannot hold partitions (Not a directory)"),
        (unreadable, (), "_question.json: not valid JSON"),
        (older, (), 'whose program is "0" and not'),
        (as_it_is, ("--seq", "64"), "whose seq is [64, 128, 192, 256] and not [64]"),
        (as_it_is, ("--dtype", "fp32"), 'whose dtype is "bf16" and not "fp32"'),
        (as_it_is, ("--workers", "2", "--dask", "tcp://127.0.0.1:1"), "not both"),
    ],
)
def test_what_is_no_folder_of_this_question_is_one_line(
    swept: Path, tmp_path: Path, happens: Callable[[Path], None], more: tuple[str, ...], says: str
) -> None:
    """Rows of two questions in one table are worse than none, and a traceback helps nobody."""
    folder = shutil.copytree(swept, tmp_path / "parts")
    happens(folder)
    assert says in refused(SWEEP, "--partitions", str(folder), *more)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("tcp://127.0.0.1:1", "no Dask cluster that computes"),
        ("gopher://x:1", "unknown address"),
        ("", "is empty"),
        ("host", "missing port"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str, says: str) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(partitions, "PATIENCE", 0.3)
    assert says in refused(SWEEP, "--dask", address)


@pytest.mark.parametrize("package", ["distributed", "pyarrow.parquet"])
def test_without_its_packages_a_line_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'perfmodel[cluster]'" in refused(SWEEP, "--workers", "2")


def test_another_program_on_the_workers_is_noticed() -> None:
    """Rows of two versions would be mixed in silence."""
    with pytest.raises(UserError, match="another perfmodel"):
        partitions._same_program(partial(print, "never"), "0")
