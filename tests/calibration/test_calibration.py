"""`perfmodel calibrate`: a fit finds what made the timings, and its files serve as a device and a host."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("scipy")
pytest.importorskip("peft")

import torch
from made_up_box import ATTENTION, BOX, DISPATCH, ENVIRONMENT, GEMM, STREAM, seconds_of

from perfmodel.cli import main
from perfmodel.devices import cpu, host, own, profile
from perfmodel.devices.cpu_work import REGIMES
from perfmodel.errors import UserError
from perfmodel.prediction.predict import predict
from validate.calibration import calibrate, hosts, verify
from validate.fitting import cpu as fit
from validate.measuring import records
from validate.microbench import designs, kernels, run, stopwatch


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """Records of the made-up box: every time comes from the price model, with 2 % of noise."""
    noise = np.random.default_rng(0)
    found: list[dict[str, Any]] = [ENVIRONMENT]
    for cases in designs.design("cpu", ("fp32", "bf16")).values():
        for case in cases[:400]:
            took = DISPATCH + seconds_of(case) * float(np.exp(noise.normal(0.0, 0.02)))
            record = {"kind": "microbench", "environment": "e", "case": case.as_dict(), "clock": "made up"}
            found.append({**record, "seconds": {"least": took, "quartile": took, "median": took}})
    return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for own devices."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    yield tmp_path
    profile.forget()


def test_the_fit_of_products_finds_what_made_the_timings(measured: list[dict[str, Any]]) -> None:
    """Shares of the peak and packing must be told apart, in every regime, or other shapes are priced wrongly."""
    found = fit.fit_gemms(fit.cpu_rows(measured), "fp32", BOX, "")
    p = found.parameters
    assert isinstance(p, cpu.CpuGemmParameters)
    assert dict(p.efficiency) == pytest.approx(dict(GEMM.efficiency), rel=0.15)
    assert all(abs(p.b_passes[k] - GEMM.b_passes[k]) < 0.5 for k in REGIMES)
    assert found.errors.mean < 0.03 < found.errors.roofline_mean


@pytest.mark.parametrize(("products", "kept"), [(0, True), (5, True), (6, False), (20, False)])
def test_a_layout_of_too_few_products_goes_as_the_forward_one(
    measured: list[dict[str, Any]], products: int, kept: bool
) -> None:
    """Six products tell four figures of a layout; fewer would be fitted to their own noise, and are named."""
    rows, nn = [], 0
    for row in fit.cpu_rows(measured):
        gemm = row.case["block"] == "gemm" and row.case["dtype"] == "fp32" and not row.left_out
        if gemm and cpu.regime(row.sizes["m"], row.sizes["n"], row.case["layout"], "fp32") == "nn":
            nn += 1
            if nn > products:
                continue
        rows.append(row)
    assert nn >= 20
    found = fit.fit_gemms(rows, "fp32", BOX, "")
    p = found.parameters
    assert ("nn" in found.caveats.kept) == kept
    assert (p.efficiency["nn"] == p.efficiency["tn"]) == kept
    assert not kept or p.a_passes["nn"] == p.a_passes["tn"]


@pytest.mark.parametrize(("dtype", "made"), ATTENTION.items())
def test_the_fit_of_attention_finds_what_made_the_timings(
    measured: list[dict[str, Any]], dtype: str, made: cpu.CpuAttentionParameters
) -> None:
    """A score's exponential and its products grow alike but for the head size; 16 bits have another library's."""
    found = fit.fit_attention_kernel(fit.cpu_rows(measured), dtype, BOX, "")
    p = found.parameters
    assert isinstance(p, cpu.CpuAttentionParameters)
    names = (
        "block",
        "score",
        "efficiency",
        "aliasing",
        "backward_score",
        "backward_efficiency",
    )
    for name in names:
        assert getattr(p, name) == pytest.approx(getattr(made, name), rel=0.15), name
    assert found.errors.mean < 0.03


def test_the_fit_of_streams_finds_what_made_the_timings(measured: list[dict[str, Any]]) -> None:
    """Bandwidth, floors and clocks of each kind decide every step that is not all products."""
    found = fit.fit_streams(fit.cpu_rows(measured), BOX, "")
    p = found.parameters
    assert isinstance(p, cpu.CpuStreamParameters)
    assert p.stream == pytest.approx(STREAM.stream, rel=0.1)
    assert p.back16 == pytest.approx(STREAM.back16, rel=0.1)
    for kind in ("divide", "exponential", "gelu", "softmax", "norm_backward"):
        assert p.clocks[kind] == pytest.approx(STREAM.clocks[kind], rel=0.15), kind
        assert p.floors[kind] == pytest.approx(STREAM.floors[kind], rel=0.3), kind
    assert found.errors.mean < 0.04


def test_one_disturbed_row_does_not_move_a_fit(measured: list[dict[str, Any]]) -> None:
    """Other work on the machine makes single timings ten times too long."""
    disturbed = json.loads(json.dumps(measured))
    for r in [r for r in disturbed if r["kind"] == "microbench" and r["case"]["block"] == "gemm"][::17]:
        r["seconds"]["median"] *= 10
    p = fit.fit_gemms(fit.cpu_rows(disturbed), "fp32", BOX, "").parameters
    assert isinstance(p, cpu.CpuGemmParameters)
    assert p.efficiency["tn"] == pytest.approx(GEMM.efficiency["tn"], rel=0.05)


def test_the_file_of_a_calibration_is_a_device(measured: list[dict[str, Any]], home: Path) -> None:
    """What calibrate writes must be found by name, be listed, and price a step."""
    text, _ = calibrate.device_file(measured, "my-box")
    own.path("my-box").parent.mkdir(parents=True)
    own.path("my-box").write_text(text)
    found = profile.load("My-Box")
    assert (found.kind, found.name, found.hardware.sm_count) == ("cpu", "A box", 2)
    assert set(found.fitted.values()) == {"fitted"}
    for dtype in ("fp32", "bf16"):  # the fastest product runs at this share of the box's peak
        reached = max(GEMM.efficiency.values()) * BOX.peak(dtype)
        assert found.hardware.peak(dtype) == pytest.approx(reached, rel=0.1)
    assert found.residuals["gemm.fp32"]["mean"] < 0.03
    listed = CliRunner().invoke(main, ["devices", "--json"])
    assert "my-box" in [row["device"] for row in json.loads(listed.output)]
    step = predict("gpt2", "lora:r=8", device=found, batch=1, seq=64, dtype="fp32")
    assert 0.01 < step.time.phases["total"] < 10


def test_a_device_brings_its_own_host(measured: list[dict[str, Any]], home: Path) -> None:
    """The host's share of a step is that of the machine that was calibrated, not of the default."""
    text, _ = calibrate.device_file(measured, "mine")
    for kind in ("devices", "hosts"):
        (home / kind).mkdir()
    own.path("mine").write_text(text)
    default = host.load()
    slow = host.Host(**{**vars(default), "name": "slow", "module": 1e-3})
    hosts.write_host(slow, own.path("mine", "hosts"))
    options: dict[str, Any] = {"device": "mine", "batch": 1, "seq": 32, "dtype": "fp32"}
    mine, usual = predict("gpt2", "full", **options), predict("gpt2", "full", host=default, **options)
    assert mine.time.phases["forward"] > usual.time.phases["forward"] + 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[1:], "no environment"),
        (lambda r: [r[0]], "no microbenchmarks"),
        (lambda r: [r[0], {"kind": "microbench", "case": {}, "seconds": {}}], "no microbenchmarks"),
        (lambda r: [r[0], *[x for x in r if x.get("case", {}).get("block") != "attention"]], "attention, too few"),
        (lambda r: [x for x in r if x.get("case", {}).get("block") in (None, "host")], "too few microbenchmarks"),
    ],
)
def test_records_that_make_no_device_are_refused(measured: list[dict[str, Any]], change: Any, message: str) -> None:
    """Half a file of records must not become half a device."""
    with pytest.raises(UserError, match=message):
        calibrate.device_file(change(measured), "mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--name", "h100-sxm"], "is a bundled device"),
        (["--device", "cpu", "--name", "a100"], "is a bundled device (a100-80gb-sxm)"),
        (["--device", "cpu", "--name", "half-speed"], "is a bundled host"),
        (["--device", "cpu", "--seconds", "nan"], "not a finite number"),
        (["--device", "cpu", "--seconds", "inf"], "not a finite number"),
        (["--device", "cpu", "--name", "../up"], "must be of small letters"),
        (["--device", "cpu", "--seconds", "1"], "--seconds"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_what_calibrate_cannot_do_is_one_line(home: Path, arguments: list[str], message: str) -> None:
    """Minutes of measuring must not end in a name that nobody can use."""
    result = CliRunner().invoke(main, ["calibrate", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_one_line(home: Path) -> None:
    """`--device cuda` on a machine without one says what to do."""
    result = CliRunner().invoke(main, ["calibrate", "--device", "cuda"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--device cpu" in result.stderr


def test_every_case_runs_on_the_cpu() -> None:
    """A case that cannot run would fail a calibration after minutes, on somebody else's machine."""
    watch = stopwatch.stopwatch("cpu", 1)
    smallest: dict[tuple[str, str, str, bool], designs.MicroCase] = {}
    for cases in designs.design("cpu", ("fp32", "bf16")).values():
        for case in cases:
            key = (case.op, case.dtype, case.layout, case.backward)
            smallest[key] = min(smallest.get(key, case), case, key=lambda c: int(np.prod([v for _, v in c.sizes] or 1)))
    found = run.run_blocks({"all": list(smallest.values())}, "cpu", watch, 60.0)
    assert len(found) == len(smallest)
    assert all(r["seconds"]["least"] > 0 for r in found if r["case"]["op"] != "dispatch")


def test_a_short_calibration_makes_a_device(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command to a prediction, on a real machine, which may be busy: the five seconds are its own ones, or
    other programs would decide how many rows the fits get."""
    own = SimpleNamespace(**{**vars(time), "perf_counter": time.process_time})
    for module in (run, hosts):
        monkeypatch.setattr(module, "time", own)
    monkeypatch.setattr(run, "NEEDED", 40)
    monkeypatch.setitem(kernels.RING, "cpu", 2e5)
    monkeypatch.setattr(run, "REPEATS", 3)
    monkeypatch.setattr(run, "CASE_SECONDS", 0.01)
    monkeypatch.setattr(hosts, "NEEDED", 2)
    monkeypatch.setattr(verify, "WORST", 100.0)  # how near five seconds come, of a busy machine, is not asked here
    monkeypatch.setattr(verify, "cells", lambda dtypes, cells=verify.cells: list(cells(dtypes))[:2])
    monkeypatch.setattr(verify, "TIMED", 2)
    kept = home / "micro.jsonl"
    arguments = ["calibrate", "--device", "cpu", "--threads", "1", "--seconds", "5", "--records", str(kept)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert [(r["unit"], r["message"]) for r in records.read_records(kept) if r["kind"] == "unmeasured"] == []
    assert {r["kind"] for r in records.read_records(kept)} == {"environment", "microbench"}
    step = predict("gpt2", "full", device="mine", batch=1, seq=32, dtype="fp32")
    assert 0.01 < step.time.phases["total"] < 60
    assert not list(home.rglob("*.part"))
