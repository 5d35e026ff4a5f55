"""`perfmodel validate measure`: real steps become records, whatever happens to the process that writes them."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from campaigns import TINY
from click.testing import CliRunner

pytest.importorskip("peft")

from perfmodel.architectures import Config
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.prediction.predict import predict
from perfmodel.setup import Setup
from perfmodel.tracing.programs import references
from validate.measuring import allocator, cells, isolate, records, run, visit

GRID = (
    "rounds = 2"
    + TINY
    + """[[cells]]
models = ["tiny"]
methods = ["full", "lora:r=4,targets=all-linear"]
setups = [{ batch = 2, seq = 16, dtype = "fp32" }]
"""
)


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(GRID)
    return path


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, each line of which must be JSON and end in a newline."""
    text = path.read_text() if path.exists() else ""
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def pretended_visit(plan: run.MeasuringPlan, cell: cells.Cell, number: int, team: None) -> dict[str, Any]:
    """A visit that takes a moment and leaves a record of many pages."""
    time.sleep(0.004)
    return {"status": "oom", "message": "x" * 50_000}


def wait_for(path: Path, number: int, limit: float = 20.0) -> None:
    """Wait until a file holds so many lines."""
    until = time.monotonic() + limit
    while time.monotonic() < until and len(whole_lines(path)) < number:
        time.sleep(0.001)


@pytest.mark.skipif(not isolate.can_fork(), reason="no fork")
def test_killing_at_random_times_loses_at_most_the_running_cell(
    tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A measurement of hours is killed now and then: records must stay whole, and none be made twice."""
    monkeypatch.setattr(run, "_visit", pretended_visit)
    monkeypatch.setattr(run, "load_modules", lambda cells: None)
    monkeypatch.setattr(run, "_environment", lambda plan, output, before: "here")
    plan, output = run.plan(str(grid), "cpu", threads=1, rounds=10), tmp_path / "records.jsonl"
    wanted = {(number, cell.id) for number, cell in plan.visits()}
    dice, before, kills = random.Random(5), [], 0
    while len(before) < len(wanted) - 3:
        child = os.fork()
        if child == 0:
            try:
                run.measure_cells(plan, output)
            finally:
                os._exit(0)
        wait_for(output, len(before) + dice.choice((0, 1, 1, 2)))
        time.sleep(dice.uniform(0, 0.02))  # into the next visit, or into the writing of its record
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = whole_lines(output)
        assert found[: len(before)] == before, "a record that was there is gone or changed"
        before, kills = found, kills + 1
    run.measure_cells(plan, output)
    visits = [(r["round"], r["id"]) for r in whole_lines(output)]
    assert kills >= 5
    assert sorted(visits) == sorted(wanted), "a visit is missing or was made twice"


def test_a_record_says_when_it_began_and_how_long_it_took(
    tmp_path: Path, grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Budgets are planned by what visits took, and a tiny one takes a few hundredths of a second."""
    now = iter(1000.04 + 0.17 * i for i in range(100))
    monkeypatch.setattr(run, "time", SimpleNamespace(time=lambda: next(now)))
    monkeypatch.setattr(run, "_visit", pretended_visit)
    monkeypatch.setattr(run, "load_modules", lambda cells: None)
    monkeypatch.setattr(run, "_environment", lambda plan, output, before: "here")
    monkeypatch.setattr(isolate, "can_fork", lambda: False)
    first = run.measure_cells(run.plan(str(grid), "cpu", threads=1), tmp_path / "records.jsonl")[0]
    assert (first["started"], first["elapsed_s"]) == (1000.0, 0.17)


def command(grid: Path, output: Path, python: Sequence[str]) -> list[str]:
    """A measurement that prints first which process it is."""
    code = "import os; print(os.getpid(), flush=True); from perfmodel.cli import main; main()"
    words = ["validate", "measure", "--device", "cpu", "--grid", str(grid), "--output", str(output), "--threads", "1"]
    return [*python, "-c", code, *words]


def test_a_killed_run_of_real_steps_resumes_to_the_same_cells(tmp_path: Path, grid: Path, ready: list[str]) -> None:
    """The whole path on real programs: their calls are those of the tape, their peak memory that of the prediction."""
    output = tmp_path / "records.jsonl"
    with subprocess.Popen(command(grid, output, ready), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
        assert first.stdout is not None
        process = int(first.stdout.readline())
        while not any(r["kind"] == "visit" for r in whole_lines(output)) and first.poll() is None:
            time.sleep(0.05)
        os.kill(process, signal.SIGKILL)
        first.stdout.read()
    kept = whole_lines(output)
    done = subprocess.run(command(grid, output, ready), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = whole_lines(output)
    assert found[: len(kept)] == kept
    visits = [r for r in found if r["kind"] == "visit"]
    assert len(visits) == 4
    assert {r["status"] for r in visits} == {"ok"}
    for r in visits:
        cell = cells.Cell.from_dict(r["cell"])
        p = predict(cell.config, cell.method, cell.setup, device="cpu-epyc-genoa-2c")
        assert r["memory"]["peak"] == pytest.approx(p.memory.peak, rel=0.05)
        assert r["params"] == {"total": p.total_params, "trainable": p.trainable_params}
        assert r["median_s"]["step"] == pytest.approx(
            sum(r["seconds"][phase][0] for phase in ("forward", "backward", "optimizer")), rel=0.9
        )
        if r["round"] == 0:
            assert r["dispatches"] == {k: v for k, v in p.dispatches.items() if k != "total"}
            assert set(r["profile"]["kernels"]) >= {"forward", "backward", "optimizer"}


def test_a_record_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, grid: Path) -> None:
    """Whether a step fits is an answer: neither a refused allocation nor a kill by the kernel may end the run."""

    def refused() -> dict[str, Any]:
        import torch

        monkeypatch.setattr(visit, "TrainingLoop", lambda cell, device, team: torch.empty(2**60))
        plan = run.plan(str(grid), "cpu", threads=1)
        return visit.visit(plan.grid.cells[0], "cpu", threads=1, warm_up=0, steps=1)

    def killed() -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    assert refused()["status"] == "oom"
    if isolate.can_fork():
        assert isolate.run_forked(killed)["status"] == "oom"
        assert isolate.run_forked(lambda: {"status": "ok"}) == {"status": "ok"}


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (1, 1), (300, 1)])
def test_the_exit_code_of_measure_says_whether_cells_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failed: int, code: int
) -> None:
    """A script that goes on to fit must not do so with half a file of records."""
    monkeypatch.setattr("validate.measuring.show.show_measure", lambda *of, **options: failed)
    done = CliRunner().invoke(main, ["validate", "measure", "--device", "cpu", "--output", str(tmp_path / "r.jsonl")])
    assert done.exit_code == code, done.output


def test_rounds_are_shuffled_alike_for_a_seed() -> None:
    """Drift must not favour a method, and a resumed run must go on in the order that it had."""
    plans = [run.plan("small", "cpu", threads=1, rounds=3, seed=s) for s in (1, 1, 2)]
    one, same, other = ([(number, cell.id) for number, cell in plan.visits()] for plan in plans)
    assert one == same != other
    rounds = [[name for number, name in one if number == n] for n in range(3)]
    assert rounds[0] != rounds[1]
    assert sorted(rounds[0]) == sorted(rounds[1]) == sorted(rounds[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rounds = 0", "rounds must be a whole number from 1"),
        ("round = 2", "did you mean 'rounds'"),
        ('[[cells]]\nmodels = ["tiny"]\nmethods = ["lore"]\nsetups = [{ batch = 1 }]', "unknown method 'lore'"),
        ('[[cells]]\nmodels = ["tiny"]\nmethods = ["full"]\nsetups = [{ bach = 1 }]', "batch"),
        (
            '[[cells]]\nmodels = ["tiny"]\nmethods = ["full"]\nsetups = [{ gpus = 2 }]',
            "that of one process, got gpus = 2",
        ),
        ('[[cells]]\nmodels = ["tiny"]\nmethods = ["full"]\nsetups = 3', "setups of [[cells]] must be a list"),
        ('[[cells]]\nmodel = ["tiny"]', "did you mean 'models'"),
        (
            '[[cells]]\nmodels = ["tiny"]\nmethods = ["full"]\nsetups = [{ batch = 1 }]\nround = 3',
            "unknown key 'round' in [[cells]]",
        ),
        ("rounds = [", "not valid TOML"),
    ],
)
def test_a_grid_that_is_wrong_is_refused_in_one_line(tmp_path: Path, change: str, message: str) -> None:
    """A typing error must not cost an hour of measuring the wrong thing."""
    path = tmp_path / "grid.toml"
    text = GRID.replace("rounds = 2", change) if change.startswith(("rounds", "round ")) else GRID + change
    path.write_text(text)
    with pytest.raises(UserError) as error:
        cells.load_grid(str(path), "cpu")
    assert message in str(error.value)


def test_a_method_without_a_program_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour later its cell would fail, after all the others."""
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace('methods = ["full",', 'methods = ["full", "paca:r=4",'))
    assert any(c.method == "paca:r=4" for c in run.plan(str(path), "cpu").grid.cells)
    monkeypatch.setattr(references, "PROGRAMS", {})
    with pytest.raises(UserError, match="method paca: neither peft"):
        run.plan(str(path), "cpu")


@pytest.mark.parametrize(
    ("text", "changed", "said"),
    [
        ("batch = 2", 'kernels = "liger", batch = 2', "kernels liger of tiny: not measured, only predicted"),
        ("batch = 2", 'lengths = "10:14", batch = 2', "lengths 10:14 of"),
        ("batch = 2", "padded = true, batch = 2", "padded True of"),
        ("batch = 2", 'fp8 = "rowwise", batch = 2', "fp8 rowwise of"),
        ('["full",', '["full", "lora:r=4,implementation=unsloth",', "kernels of unsloth are not measured"),
    ],
)
def test_what_the_loop_does_not_run_is_refused(tmp_path: Path, text: str, changed: str, said: str) -> None:
    """It was run as if nothing had been asked for, and the prediction of another program was held against it."""
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace(text, changed))
    with pytest.raises(UserError, match=said):
        run.plan(str(path), "cpu")


@pytest.mark.parametrize("method", ["paca:r=4", "runlora:r=4,targets=all-linear", "lisa:gamma=1"])
def test_references_run_as_predicted_where_peft_has_no_program(method: str) -> None:
    """The remedies of the literature must be measurable like LoRA: same calls, same memory, on real data."""
    config = cells.parse_grid(tomllib.loads(GRID), "tiny", "tiny").cells[0].config
    cell = cells.Cell(config, method, Setup(batch=2, seq=16, dtype="fp32"))
    found = visit.visit(cell, "cpu", threads=1, warm_up=1, steps=1)
    assert found["status"] == "ok", found
    p = predict(config, method, cell.setup, device="cpu-epyc-genoa-2c")
    assert found["dispatches"] == {k: v for k, v in p.dispatches.items() if k != "total"}
    assert found["memory"]["peak"] == pytest.approx(p.memory.peak, rel=0.05)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForSequenceClassification"])
def test_a_classifier_is_measured_with_classes_for_labels(head: str) -> None:
    """Token ids are none: each cell of one ended in an IndexError."""
    known = cells.parse_grid(tomllib.loads(GRID), "tiny", "tiny").cells[0].config
    values = {**known.values, "architectures": [f"Llama{head}"], "pad_token_id": 0}
    cell = cells.Cell(Config(values, known.name, known.origin), "full", Setup(batch=2, seq=16, dtype="fp32"))
    found = visit.visit(cell, "cpu", threads=1, warm_up=1, steps=1)
    assert found["status"] == "ok", found
    p = predict(cell.config, "full", cell.setup, device="cpu-epyc-genoa-2c")
    assert found["dispatches"] == {k: v for k, v in p.dispatches.items() if k != "total"}


def test_bundled_grids_hold_what_they_promise() -> None:
    """At least 48 cells on a CPU, bf16 or not; on a GPU both adapter dtypes, checkpointing on and off."""
    cpu, cuda = cells.load_grid("standard", "cpu").cells, cells.load_grid("standard", "cuda").cells
    assert len([c for c in cpu if c.setup.dtype == "fp32"]) >= 48
    assert len({c.config.name for c in cpu}) >= 4
    assert {c.method.partition(":")[0] for c in cpu} == {"full", "lora", "dora", "ia3", "top_k"}
    assert {c.setup.checkpoint for c in cuda} == {"none", "block"}
    assert any("adapter_dtype=bf16" in c.method for c in cuda)
    assert all(cells.Cell.from_dict(json.loads(json.dumps(c.as_dict()))).id == c.id for c in (*cpu, *cuda))


def measured_twice(path: Path) -> dict[str, Any]:
    with records.only_writer(path):
        return {"status": "ok", "message": "two writers"}


def test_a_file_of_records_has_one_writer_and_known_lines(tmp_path: Path) -> None:
    """Two measurements into one file, or a file of something else, must be refused before hours are lost."""
    path = tmp_path / "records.jsonl"
    records.append_records(path, {"kind": "environment", "id": "a", "device": "cpu", "host": {}})
    if isolate.can_fork():
        with records.only_writer(path):
            refused = isolate.run_forked(lambda: measured_twice(path))
        assert "another measurement is writing" in refused["message"]
    path.write_text(path.read_text() + '{"half')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        records.read_records(path)
    path.write_text('{"schema": 99}\n')
    with pytest.raises(UserError, match="not a record of schema 1"):
        records.read_records(path)


def test_cell_ids_tell_programs_apart() -> None:
    """Resuming goes by the id: two programs with one id would lose one of them."""
    grid = cells.load_grid("small", "cpu")
    first = grid.cells[0]
    others = [
        cells.Cell(first.config, first.method, Setup(batch=2, seq=64, dtype="fp32", checkpoint="block")),
        cells.Cell(grid.cells[3].config, first.method, first.setup),
        cells.Cell(first.config, "ia3", first.setup),
    ]
    assert len({c.id for c in (first, *others)}) == 4


def test_a_group_does_not_hang_on_the_order_of_a_config() -> None:
    """Records keep a config in its file's order: written anew, it would lose the baseline of its speed-ups."""
    cell = cells.load_grid("small", "cpu").cells[0]
    config = Config(dict(reversed(cell.config.values.items())), cell.config.name, cell.config.origin)
    assert [*config.values] != [*cell.config.values]
    assert cells.Cell(config, cell.method, cell.setup).group == cell.group


@pytest.mark.skipif(not allocator.on_glibc(), reason="only glibc's malloc gives memory back")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_stays_where_it_is_kept(kept: bool) -> None:
    """Else each step of a measurement pays for its pages anew, and its record says that it did not."""
    code = (
        "import ctypes; from validate.measuring.allocator import keep_freed_memory; libc = ctypes.CDLL(None)\n"
        "libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p; libc.free.argtypes = [ctypes.c_void_p]\n"
        f"{'keep_freed_memory()' if kept else ''}\n"
        "before = libc.sbrk(0); libc.free(libc.malloc(64 << 20)); print(libc.sbrk(0) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(run.stdout) > 32 << 20) == kept


HEADER = Path("/usr/include/malloc.h")


@pytest.mark.skipif(not (allocator.on_glibc() and HEADER.exists()), reason="no header of glibc's malloc")
def test_malloc_is_asked_for_what_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options' numbers stand in glibc's header alone: with another, malloc would take no notice, or another's."""
    names = {int(number): name for name, number in re.findall(r"#define (M_\w+)\s+(-\d+)", HEADER.read_text())}
    asked: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *options: asked.append(options))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: libc)
    allocator.keep_freed_memory()
    assert ", ".join(f"{names[option]}={value}" for option, value in asked) in allocator.KEPT
