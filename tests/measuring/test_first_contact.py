"""What a measurement meets on a machine that nobody has seen: slices, other makers, drivers that tell nothing, files
of another machine."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

import torch
from test_measuring import GRID

from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.errors import UserError
from validate.accuracy import Errors
from validate.calibration import calibrate, verify
from validate.campaign.guide import memory_of
from validate.checking import machine
from validate.checking.outcomes import Measured
from validate.checking.summary import promises
from validate.measuring import environment, isolate, kineto, records, run
from validate.measuring.visit import workspaces
from validate.microbench import run as benches
from validate.microbench.designs import MicroCase
from validate.microbench.run import attempt
from validate.microbench.stopwatch import CpuStopwatch

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kineto_two_streams.json"
WHOLE = {"name": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "multi_processor_count": 108, "total_memory": 80e9}
UUID = "2b6f1f52-0000-1111-2222-333344445555"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A made-up GPU's properties, which a test may change; nvidia-smi answers with the question."""
    told = dict(WHOLE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79e9, 80e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**told))
    monkeypatch.setattr(environment, "_nvidia_smi", lambda name, which: f"{name} of {which}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return told


def test_the_gpu_is_the_one_that_pytorch_computes_on(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi counts the GPUs of the machine, PyTorch those that are visible: by number it may be another one."""
    gpu["uuid"] = UUID
    found = environment.gpu()
    assert (found["name"], found["power.limit"]) == (WHOLE["name"], f"power.limit of GPU-{UUID}")
    del gpu["uuid"]
    assert environment.gpu()["power.limit"] == "power.limit of 0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert "power.limit" not in environment.gpu()


@pytest.mark.parametrize(
    ("change", "hip", "message"),
    [
        ({"name": "NVIDIA A100-SXM4-80GB MIG 3g.40gb"}, None, "MIG slices are not modelled; measure a whole GPU"),
        ({"name": "AMD Instinct MI300X"}, "6.2", "AMD cards are not modelled"),
        ({}, None, ""),
    ],
)
def test_what_is_not_modelled_is_refused_before_it_is_measured(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], hip: str | None, message: str
) -> None:
    """A slice would be written with the figures of the whole card, a card of another maker as a Hopper."""
    gpu.update(change)
    monkeypatch.setattr(torch.version, "hip", hip)
    if not message:
        environment.check_device("cuda")
        return
    with pytest.raises(UserError, match=message):
        environment.check_device("cuda")


def test_kernels_that_are_priced_by_a_factor_of_two_are_not_kept() -> None:
    """A GPU's programs judge the host alone: its kernels must be judged themselves."""
    good, bad, none = (SimpleNamespace(errors=Errors.of([error])) for error in (0.1, 0.7, float("nan")))
    fits: Any = {"gemm.bf16": good, "pointwise": bad, "attention": none}
    assert list(verify.poor(fits, "cuda")) == ["pointwise", "attention"]
    assert verify.poor(fits, "cuda")["pointwise"].startswith("kernels of pointwise: off by 70 % on rows left out")
    assert not verify.poor(fits, "cpu")


def test_a_gpu_that_answers_no_more_ends_a_calibration_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every later case would fail as well; what came before is on disk."""
    real, calls = benches.build_call, []

    def third_spoils(case: MicroCase, device: str) -> Any:
        calls.append(case)
        if len(calls) == 2:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")
        if len(calls) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(case, device)

    monkeypatch.setattr(benches, "build_call", third_spoils)
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "home"))
    output = tmp_path / "bench.jsonl"
    with pytest.raises(UserError, match=r"illegal memory access.*answers no more.*what was measured is in"):
        calibrate.calibrate("cpu", "spoilt", threads=1, seconds=1.0, output=output)
    found = records.read_records(output)
    assert [r["kind"] for r in found] == ["environment", "microbench", "unmeasured", "unmeasured"]
    assert calibrate.failed(found)[0].startswith("1 microbenchmarks failed, ")


def test_files_that_cannot_be_written_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default calibration takes minutes, and they were lost."""
    monkeypatch.setattr(calibrate, "microbenchmarks", lambda *args: pytest.fail("measured"))
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match="cannot be written"):
        calibrate.calibrate("cpu", "box", threads=1, output=tmp_path / "none" / "bench.jsonl")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be made"):
        calibrate.calibrate("cpu", "box", threads=1)


def test_cublas_workspaces_are_no_part_of_a_steps_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of 32 MiB were 5 % of a small model's memory on a Hopper."""
    held = [100]
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: held.__setitem__(0, 36), raising=False)
    assert (workspaces(), workspaces()) == (64, 0)


def test_a_gpu_that_others_use_is_told_and_leaves_less_room(gpu: dict[str, Any]) -> None:
    """A neighbour's memory made cells run out of it that fit, and its kernels take from the clock."""
    found = {"device": "cuda", "gpu": environment.gpu()}
    assert (environment.occupied(found), memory_of(found)) == ("", 79e9)
    found["gpu"]["free_memory"] = 30e9
    assert environment.occupied(found).startswith("others hold 50.0 GB of the GPU's 80.0 GB")
    assert memory_of(found) == 30e9
    assert environment.occupied({"device": "cpu"}) == ""
    here = {**found, "host": {}}
    assert environment.identity(here) == environment.identity({**here, "gpu": {**found["gpu"], "free_memory": 1}})


@pytest.mark.parametrize("words", [["calibrate", "--device", "cpu"], ["validate", "measure", "--device", "cpu"]])
def test_whoever_interrupts_is_told_what_is_left(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "microbenchmarks", interrupted)
    monkeypatch.setattr(run, "measure_cells", interrupted)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 130
    assert "stopped: nothing was written" in done.output or "goes on behind it" in done.output


@pytest.mark.parametrize(("threads", "found"), [(1, "mine"), (4, None)])
def test_a_cpus_profile_predicts_steps_of_as_many_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int, found: str | None
) -> None:
    """One thread's rates are no four threads': the records would look wrong by a factor."""
    on = replace(profile.load("cpu-xeon-2.5ghz-1t"), slug="mine")
    monkeypatch.setattr(profile, "load", lambda name: on)
    monkeypatch.setattr(machine.own, "find", lambda *name: Path("mine.toml"))
    here = {"device": "cpu", "host": {"cpu": on.name, "threads": threads}}
    assert getattr(machine._calibrated(here), "slug", None) == found


def test_of_nested_phases_the_innermost_has_what_it_launched() -> None:
    """An outer annotation had all of it, and the inner one vanished."""
    mark = {"ph": "X", "cat": "user_annotation", "tid": 1}
    events = [
        {**mark, "name": "step", "ts": 0.0, "dur": 100.0},
        {**mark, "name": "inner", "ts": 10.0, "dur": 20.0},
        *({"ph": "X", "cat": "cpu_op", "name": "aten::mm", "tid": 1, "ts": ts, "dur": 5.0} for ts in (2.0, 12.0, 40.0)),
    ]
    found = kineto.parse_trace({"traceEvents": events}, ["step", "inner"])
    assert [call.phase for call in found.calls] == ["step", "inner", "step"]


def test_a_trace_of_nothing_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    done = CliRunner().invoke(main, ["validate", "profile", str(tmp_path / "empty.json")])
    assert (done.exit_code, "holds no call and no work of a device" in done.output) == (2, True)


def test_another_environments_visits_do_not_pass_for_those_of_here() -> None:
    """With other threads or another PyTorch the old times would be shown as the new ones."""
    visits = [{"kind": "visit", "round": 0, "id": "a", "environment": name} for name in ("here", "there")]
    assert records.done(visits[1:], "here") == set()
    assert records.done(visits, "here") == {(0, "a")}


def test_a_check_of_nothing_does_not_pass() -> None:
    """All out of memory: no promise was kept, for none was tried."""
    cell: Any = None
    (_, none) = promises([Measured(cell, "e", "oom")], [])
    assert (none.name, none.holds) == ("cells, none of which came to its end", False)


def test_a_phase_that_the_trace_does_not_have_is_named() -> None:
    result = CliRunner().invoke(main, ["validate", "profile", str(FIXTURE), "--phase", "forwad"])
    assert (result.exit_code, result.stderr) == (
        2, "perfmodel: no annotation 'forwad' is in the trace: did you mean 'forward'?\n"
    )  # fmt: skip


def test_kernels_of_a_trace_without_the_runtimes_calls_are_told(tmp_path: Path) -> None:
    """As if it were a trace of a CPU, no kernel was spoken of."""
    trace = json.loads(FIXTURE.read_text())
    trace["traceEvents"] = [e for e in trace["traceEvents"] if e.get("cat") not in ("cuda_runtime", "cuda_driver")]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace))
    result = CliRunner().invoke(main, ["validate", "profile", str(path)])
    assert result.exit_code == 0
    assert "works of the device without a launch" in result.stdout


def test_a_spoilt_gpu_is_not_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process fails at whatever comes next: it must end, and not take its errors for cases that are too large."""

    def spoilt(case: MicroCase, device: str) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("validate.microbench.run.build_call", spoilt)
    found = attempt(MicroCase("gemm", "mm", "fp32"), "cuda", CpuStopwatch(1))
    assert found["status"] == "error"
    assert environment.spoilt(found)


def test_a_spoilt_gpu_ends_a_measurement_behind_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells behind it would be recorded as failed, and never be tried again."""
    (tmp_path / "grid.toml").write_text(GRID)
    told = {"status": "error", "message": "CUDA error: unspecified launch failure"}
    monkeypatch.setattr(run, "_visit", lambda *visit: told)
    monkeypatch.setattr(run, "load_modules", lambda cells: None)
    monkeypatch.setattr(isolate, "can_fork", lambda: False)
    plan, output = run.plan(str(tmp_path / "grid.toml"), "cpu", threads=1), tmp_path / "records.jsonl"
    for visits in (1, 2):
        with pytest.raises(UserError, match="unspecified launch failure: recorded; run again to go on behind it"):
            run.measure_cells(plan, output)
        assert sum(r["kind"] == "visit" for r in records.read_records(output)) == visits
