"""`perfmodel validate campaign`: an hour on a rented machine is paid whatever happens to the process that uses it."""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("peft")

from campaigns import CPU, PLAN, command
from made_up_box import DISPATCH, ENVIRONMENT, seconds_of
from records_by_hand import environment, visit

from perfmodel.devices import host as host_files
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.report.svg import typeset
from validate.calibration import calibrate, hosts
from validate.campaign import finish, ledger, plan, run, tables, work
from validate.campaign.worker import Worker, WorkTimeout, attempted
from validate.checking import tables as checked
from validate.checking.check import check_records
from validate.measuring import isolate, records
from validate.microbench import designs

# Loads everything once, then begins the campaign again and again in a child, which is killed at a random moment after
# it wrote something; at last the command goes on to the end. Units are short: what they find is not asked for.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from perfmodel.cli import main
from perfmodel.devices import profile
from validate.calibration import hosts
from validate.campaign import plan, run
from validate.measuring.run import load_modules
from validate.microbench import run as microbench

torch.set_num_threads(1)
hosts.WARM_UP, hosts.STEPS = 1, 6
microbench.REPEATS, microbench.CASE_SECONDS = 3, 0.05
chosen, records = plan.load_plan(Path(sys.argv[1]), "cpu"), Path(sys.argv[2]) / "records.jsonl"
units = chosen.units("cpu", profile.load("cpu-epyc-genoa-2c"))
load_modules([u.work.cell for u in units if isinstance(u.work, plan.Visit)])
moments = random.Random(0)

def text():
    return records.read_bytes() if records.exists() else b""

for number in range(int(sys.argv[3])):
    before, child = text(), os.fork()
    if child == 0:
        run.run_campaign(chosen, "cpu", records.parent, 600.0, threads=1)
        os._exit(0)
    while text() == before and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.01)
    time.sleep(moments.uniform(0.0, 0.6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (records.parent / f"cut-{number}").write_bytes(text())
main(["validate", "campaign", "--device", "cpu", "--threads", "1", *sys.argv[4:]])
"""


@pytest.fixture
def planned(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def whole_lines(text: bytes) -> list[dict[str, Any]]:
    assert text == b"" or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def test_a_campaign_that_is_killed_at_any_moment_loses_doubles_and_tears_no_record(
    tmp_path: Path, planned: Path, ready: list[str]
) -> None:
    """Rented machines vanish; what was measured must be there, once, and the end as if nothing had happened."""
    folder, times, root = tmp_path / "c", 6, Path(__file__).parents[2]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*ready, "-c", KILLED, str(planned), str(folder), str(times)]
    words += ["--budget", "5m", "--plan", str(planned), "--output", str(folder), "--json"]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    text = (folder / "records.jsonl").read_bytes()
    cuts = [(folder / f"cut-{i}").read_bytes() for i in range(times)]
    assert all(text.startswith(cut) for cut in cuts)
    assert len({len(cut) for cut in cuts}) > 2  # it was killed while it got on
    found = whole_lines(text)
    units = Counter(r["unit"] for r in found if "unit" in r)
    assert set(units.values()) == {1}
    expected = {u.id for u in plan.load_plan(planned, "cpu").units("cpu", CPU)}
    assert set(units) == expected
    summary = json.loads(done.stdout)
    assert summary["units"] == {"done": len(expected) - 1, "all": len(expected)}  # the package is still missing
    assert (folder / "page.html").exists()
    assert summary["missing"] or len(summary["check"]["cells"]) == 2  # a busy machine may time what no fit is kept of


class Fake:
    """A campaign on a clock of its own: `does` makes the record of a unit, which takes `seconds` and no device."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, does: Callable[[Any], dict[str, Any]], seconds: float = 0.1
    ) -> None:
        fake, self.now = self, 0.0
        host = {"cpu": "a CPU", "threads": 1, "memory_bytes": 1e12, "clock_hz": 3e9, "caches": {"L2": 1 << 20}}
        self.here = {**environment(), "packages": {"torch": "2"}, "software": {"torch": "2"}, "host": host}
        self.takes = seconds

        class Instant(Worker):
            def __call__(self, thing: Any, seconds: float) -> dict[str, Any]:
                if thing == work.HERE:
                    return fake.here
                fake.now += min(fake.takes, seconds)
                if fake.takes > seconds:
                    raise WorkTimeout
                return attempted(does, thing)

        monkeypatch.setattr(run, "Worker", Instant)
        monkeypatch.setattr(run, "load_modules", lambda cells: None)
        monkeypatch.setattr(run, "guide", lambda environment: CPU)
        monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: self.now, time=lambda: self.now))

    def run(self, planned: Path, folder: Path, seconds: float = 600.0) -> run.CampaignRun:
        return run.run_campaign(plan.load_plan(planned, "cpu"), "cpu", folder, seconds, threads=1)


@cache
def box() -> profile.DeviceProfile:
    """The CPU whose kernels take what `measured` says."""
    cases = [case for block in designs.design("cpu", ("fp32", "bf16")).values() for case in block[:150]]
    return calibrate.profile_of_text(calibrate.device_file([ENVIRONMENT, *map(measured, cases)], "box")[0], "box")


def measured(thing: Any) -> dict[str, Any]:
    """A record of each kind, as if the unit had been measured."""
    if isinstance(thing, plan.Visit):
        return {**visit(thing.cell), "round": thing.round}
    if isinstance(thing, plan.HostProgram):
        config, method, checkpoint, optimizer = thing.values
        program = {"model": config.name, "config": config.values, "method": method}
        program |= {"checkpoint": checkpoint, "optimizer": optimizer}
        step = finish.campaign_step(*thing.values)
        dispatched, kernels = hosts.dispatched(step, host_files.load()), hosts.kernel_seconds(step, box())
        return {"kind": "host", "program": program, "seconds": {p: dispatched[p] + kernels[p] for p in kernels}}
    took = DISPATCH + seconds_of(thing)
    return {"kind": "microbench", "case": thing.as_dict(), "seconds": {"least": took, "quartile": took, "median": took}}


def test_the_page_and_the_summary_say_what_check_says(
    tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page whose figures are its own would be a second truth."""
    pytest.importorskip("jinja2")
    Fake(monkeypatch, measured)
    folder = tmp_path / "c"
    planned.write_text(PLAN.replace("most = 48", "most = 150"))  # as many as the fit of the box has
    ran = command("--output", folder, "--plan", planned, "--budget", "10m", "--json", "--threads", "1")
    assert ran.exit_code == 0, ran.output
    summary = json.loads(ran.output)
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["missing"] == []
    fitted = {"device": str(folder / "device.toml"), "host": str(folder / "host.toml")}
    report = check_records([folder / "records.jsonl"], **fitted)
    assert summary["check"] == json.loads(json.dumps(report.as_dict()))
    assert len(report.outcomes) == 2
    page = (folder / "page.html").read_text()
    for row in [checked.line_cells(line) for line in report.lines] + [checked.limit_cells(x) for x in report.limits]:
        assert all(typeset(cell) in page for cell in row)
    assert typeset(checked.verdict_line(report)) in page
    assert "no_such_package not installed" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_campaign_that_ended_early_says_what_is_missing(
    tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little for a fit is no error: the page tells what ran, and no file of a fit is there."""
    pytest.importorskip("jinja2")
    Fake(monkeypatch, measured, seconds=1.0)
    ran = command("--output", tmp_path / "c", "--plan", planned, "--budget", "30s", "--threads", "1")
    assert ran.exit_code == 0, ran.output
    assert "missing: " in ran.output
    assert "Missing" in (tmp_path / "c" / "page.html").read_text()
    assert not list((tmp_path / "c").glob("*.toml"))


def done(ran: run.CampaignRun) -> int:
    return len(ran.units) - len(ran.left)


def test_calls_go_on_where_the_last_one_stopped(tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times nine minutes must be worth 27: nothing is done twice, nothing that was left is forgotten."""
    fake = Fake(monkeypatch, measured)
    calls = [fake.run(planned, tmp_path / "c", 7.0) for _ in range(3)]
    once = Fake(monkeypatch, measured).run(planned, tmp_path / "d", 21.0)
    assert 50 < done(calls[0]) < done(calls[1]) < done(calls[2]) < len(once.units)
    assert abs(done(calls[2]) - done(once)) <= 3
    found = records.read_records(tmp_path / "c" / run.FILE)
    assert found == [{"schema": 1, **r} for r in calls[2].ledger.records]
    assert set(Counter(r["unit"] for r in found if "unit" in r).values()) == {1}
    assert run.NO_TIME in calls[2].open.values()
    assert [why for _, why in tables.not_measured(calls[2])] == ["no_such_package not installed"]  # the rest may yet be
    assert [u.stage for u in fake.run(planned, tmp_path / "c").left] == ["QLoRA"]


@pytest.mark.parametrize("seconds", [0.02, 0.3, 3.0])
def test_a_budget_is_kept_by_what_units_took_before(
    tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """What would end after the budget is not begun, by the pace of this machine; what is there is used."""
    fake = Fake(monkeypatch, measured, seconds)
    ran = fake.run(planned, tmp_path / "c", 20.0)
    end = 20.0 * (1 - run.RESERVE)
    assert fake.now <= end + 1.5 * seconds
    assert ran.left == [u for u in ran.units if u.stage == "QLoRA"] or fake.now > end - 5 * seconds


def test_a_unit_that_hangs_is_bounded_and_not_begun_again(
    tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must cost its own limit once; one that the budget's end cut off has its turn in the next call."""
    fake = Fake(monkeypatch, measured, 1e9)
    ran = fake.run(planned, tmp_path / "c", 60.0)
    assert [r["status"] for r in ran.ledger.records if r.get("status") != "missing" and "unit" in r] == ["late"] * 2
    assert fake.now <= 60.0 * (1 - run.RESERVE) + run.OVERTIME
    again = fake.run(planned, tmp_path / "c", 60.0)
    late = [r["unit"] for r in again.ledger.records if r.get("status") == "late"]
    assert len(set(late)) == len(late) == done(again) > 2


def test_units_that_fail_are_records_and_the_rest_goes_on(
    tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, a version that lacks a class, a crash: each is an answer, none may end the hour."""

    def fails(thing: Any) -> dict[str, Any]:
        if isinstance(thing, plan.Visit):
            if thing.cell.method == "full":
                return {"status": "error", "message": "ended with code 3"}
            raise ImportError("cannot import name 'LlamaModel'")
        if isinstance(thing, plan.HostProgram):
            raise RuntimeError("CUDA out of memory")
        return measured(thing)

    ran = Fake(monkeypatch, fails).run(planned, tmp_path / "c")
    found = records.read_records(tmp_path / "c" / run.FILE)
    told = {r["unit"]: (r["kind"], r["status"], r["message"]) for r in found if "status" in r}
    full, lora = (told[u.id] for u in ran.units if u.stage == "steps")
    assert full[:2] == lora[:2] == ("visit", "error")
    assert "code 3" in full[2]
    assert "LlamaModel" in lora[2]
    assert {told[u.id][1] for u in ran.units if u.stage == "host costs"} == {"oom"}
    rows = {name: (done, left, failed) for name, done, left, failed, _ in tables.stages(ran)}
    assert rows["steps"] == (2, 0, 2)
    assert rows["host costs"] == (10, 0, 0)
    assert rows["QLoRA"] == (0, 1, 0)


def test_what_does_not_fit_is_left_out_by_prediction_and_a_package_may_come_later(
    tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes must not go into steps that cannot run; what could not run today is done when it can."""
    fake = Fake(monkeypatch, measured)
    fake.here["host"]["memory_bytes"] = 1e5
    first = fake.run(planned, tmp_path / "c")
    full = next(u for u in first.units if u.stage == "steps")
    assert first.open[full.id].startswith("needs 0.0 GB by prediction")
    reasons = [reason for _, reason in tables.not_measured(first)]
    assert [r for r in reasons if not r.startswith("needs ")] == ["no_such_package not installed"]
    again = fake.run(planned, tmp_path / "c")
    assert len(again.ledger.records) == len(first.ledger.records)  # the reason is told once
    fake.here = {**fake.here, "host": {**fake.here["host"], "memory_bytes": 1e12}, "id": "with more memory"}
    monkeypatch.setattr(run, "find_spec", lambda name: object())
    assert fake.run(planned, tmp_path / "c").left == []


def test_another_machines_campaign_is_not_continued(
    tmp_path: Path, planned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fit over two machines would be of neither."""
    fake = Fake(monkeypatch, measured)
    fake.run(planned, tmp_path / "c")
    threads = {"host": {**fake.here["host"], "threads": 2}}
    software = {"software": {**fake.here["software"], "torch": "1.0"}}
    for change in (threads, software):
        there = Fake(monkeypatch, measured)
        there.here = {**fake.here, **change, "id": "there"}
        with pytest.raises(UserError, match="holds the campaign of a CPU with 1 threads, torch 2"):
            there.run(planned, tmp_path / "c")


@pytest.mark.skipif(not isolate.can_fork(), reason="processes cannot be forked here")
def test_a_worker_that_hangs_or_dies_is_ended_and_made_anew() -> None:
    """A kernel that never returns must cost its own time, not the campaign's."""

    def does(thing: str) -> dict[str, Any]:
        if thing == "hang":
            time.sleep(60)
        if thing == "killed":
            os.kill(os.getpid(), 9)
        return {"status": "ok", "process": os.getpid()}

    worker = Worker(does)
    first = worker("fine", 10.0)["process"]
    assert worker("fine", 10.0)["process"] == first != os.getpid()
    begin = time.perf_counter()
    with pytest.raises(WorkTimeout):
        worker("hang", 0.2)
    assert time.perf_counter() - begin < 5.0
    assert worker("killed", 10.0)["status"] == "oom"
    assert worker("fine", 10.0)["process"] not in (first, os.getpid())
    worker.close()


def test_a_torn_last_line_is_cut_and_its_unit_done_again(tmp_path: Path) -> None:
    """A file that was copied while it grew ends anywhere; what is whole in it counts."""
    path = tmp_path / "records.jsonl"
    records.append_records(path, {"kind": "unmeasured", "unit": "a", "status": "late", "message": ""})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    book = ledger.Ledger(path)
    assert book.done == {"a"}
    assert path.read_bytes() == whole
    path.write_bytes(whole[:10])
    assert ledger.Ledger(path).records == []
