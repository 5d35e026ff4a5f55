"""`perfmodel validate check`: predictions against records written by hand, with every kind of miss found.

A record is made from the prediction itself, so that a perfect model is known, and then changed in one thing.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from records_by_hand import DEVICE, METHODS, TINY, Change, Record, environment, visit, written

from perfmodel.cli import main
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.setup import Setup
from validate.checking.check import Report, check_records
from validate.measuring import records
from validate.measuring.cells import Cell


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["validate", "check", *map(str, words)])


def checked(path: Path, change: Change = lambda visits: None) -> Report:
    return check_records([written(path / "r.jsonl", change)], device=DEVICE["cpu"])


def test_records_as_predicted_hold_every_limit(tmp_path: Path) -> None:
    """A perfect model must pass, or a failure says nothing about the model."""
    done = run(written(tmp_path / "r.jsonl"), "--device", DEVICE["cpu"], "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["holds"]
    assert all(abs(cell["error"]) < 1e-9 and abs(cell["memory_error"]) < 1e-9 for cell in found["cells"])
    assert [line["cells"] for line in found["summary"]] == [*METHODS, "all"]


def slower(factor: float, *which: int) -> Change:
    """The step of some visits takes longer, in all its phases."""

    def change(visits: list[Record]) -> None:
        for i in which:
            visits[i]["seconds"] = {k: [factor * s for s in v] for k, v in visits[i]["seconds"].items()}

    return change


def more_memory(visits: list[Record]) -> None:
    visits[1]["memory"]["peak"] = int(visits[1]["memory"]["peak"] * 1.06)


def one_call_more(visits: list[Record]) -> None:
    visits[2]["calls"]["backward"]["mm"] += 1


def failed(visits: list[Record]) -> None:
    visits[1] = {**{k: v for k, v in visits[1].items() if k not in ("seconds", "memory")}, "status": "error"}


@pytest.mark.parametrize(
    ("change", "exceeded"),
    [
        (slower(1.25, 0, 1, 2), {"step time, mean error", "step time, median error"}),
        (slower(1.12, 0, 1, 2), {"step time, median error"}),
        (slower(1.4, 0), {"ratio to full, mean error"}),
        (slower(4.0, 1), {"step time, mean error", "ratio to full, mean error",
                          "wrong verdicts where the difference exceeds 10 %"}),
        (more_memory, {"peak memory, worst error"}),
        (one_call_more, {"cells whose ATen calls differ"}),
        (failed, {"cells that failed"}),
    ],
)  # fmt: skip
def test_a_limit_that_is_exceeded_is_named_and_ends_with_1(tmp_path: Path, change: Change, exceeded: set[str]) -> None:
    """A check in a script must fail for each promise alone."""
    found = checked(tmp_path, change)
    assert {limit.name for limit in found.limits if not limit.holds} == exceeded
    done = run(tmp_path / "r.jsonl", "--device", DEVICE["cpu"])
    assert done.exit_code == 1
    assert all(name in done.output for name in exceeded)


def test_errors_are_those_of_the_sum_by_hand(tmp_path: Path) -> None:
    """Errors are relative to the measured figure; a cell's time is the median of all its timed steps."""

    def change(visits: list[Record]) -> None:
        step = visits[0]["seconds"]["step"][0]
        visits[0]["seconds"] = {k: [v[0]] * 3 for k, v in visits[0]["seconds"].items()}
        visits[0]["seconds"]["step"] = [step / 1.1, 10 * step, step / 0.8]  # median: step / 0.8

    found = checked(tmp_path, change)
    total = found.lines[-1]
    assert found.outcomes[0].error == pytest.approx(0.8 - 1)
    assert total.step.mean == pytest.approx(0.2 / 3)
    assert total.step.median == 0
    assert total.ratio.mean == pytest.approx(0.2)  # both speed-ups have that step in them
    assert total.ratio.number == 2


@pytest.mark.parametrize(("edge", "factor", "inside"), [("low", 1.001, 1.0), ("low", 0.999, 2 / 3),
                                                         ("high", 0.999, 1.0), ("high", 1.001, 2 / 3)])  # fmt: skip
def test_a_time_is_inside_between_both_ends_of_its_interval(
    tmp_path: Path, edge: str, factor: float, inside: float
) -> None:
    """The share inside tells whether predictions are as sure as they should be."""
    (tmp_path / "plain").mkdir()
    time = checked(tmp_path / "plain").outcomes[0].predicted.time

    def change(visits: list[Record]) -> None:
        visits[0]["seconds"]["step"] = [factor * getattr(time, edge)] * 2

    assert checked(tmp_path, change).lines[-1].inside == pytest.approx(inside)


def test_kernels_of_a_gpu_are_compared_call_by_call(tmp_path: Path) -> None:
    """The table of kernels per ATen call is corrected from this list: it must name the call and both numbers."""

    def change(visits: list[Record]) -> None:
        visits[0]["profile"] = {"by_call": {"forward": {"aten::mm": [3, 1e-5], "aten::_softmax": [1, 1e-6]}}}

    path = written(tmp_path / "r.jsonl", change, "cuda")
    found = check_records([path])  # the GPU's own name leads to its profile
    assert found.machines["here"].on.slug == "l4"
    by_name = {(d.phase, d.name): (d.measured, d.predicted) for d in found.outcomes[0].kernels}
    assert by_name["forward", "mm"] == (3, 15)  # seven linears a block and the head
    assert by_name["forward", "_softmax"] == (1, 0)  # the head's own is _log_softmax
    assert not found.outcomes[1].kernels  # not profiled: nothing to compare


def test_steps_are_predicted_under_the_versions_that_measured_them(tmp_path: Path) -> None:
    """A rented GPU's image decides on attention and launches; a version that nobody knows is taken as today's."""
    path = written(tmp_path / "r.jsonl", device="cuda")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for torch, cuda, words in (
        ("2.6.0+cu124", "12.4", "torch 2.6, CUDA 12.4"),
        ("9.1", "19.0", "torch 2.13, CUDA 13.0"),
    ):
        lines[0] |= {"software": {"torch": torch, "numpy": "2.0"}, "gpu": {"name": "NVIDIA L4", "cuda": cuda}}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (outcome, *_) = check_records([path]).outcomes
        assert outcome.predicted.setup.stack.words.startswith(words)


def test_out_of_memory_is_a_result_and_visits_are_taken_together(tmp_path: Path) -> None:
    """A cell that does not fit must not fail the check; one that ran in another round was measured."""

    def change(visits: list[Record]) -> None:
        bare = {k: v for k, v in visits[1].items() if k not in ("seconds", "memory", "calls")} | {"status": "oom"}
        visits.append({**bare, "round": 1})
        visits[2] = {**bare, "id": visits[2]["id"], "cell": visits[2]["cell"]}

    found = checked(tmp_path, change)
    assert [c.status for c in found.cells] == ["ok", "ok", "oom"]
    assert found.holds
    assert "out of memory" in run(tmp_path / "r.jsonl", "--device", DEVICE["cpu"]).output


def test_page_and_picture_are_written(tmp_path: Path) -> None:
    """The page must open offline and hold every cell; the picture needs matplotlib."""
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    page, plot = tmp_path / "c.html", tmp_path / "c.png"
    path = written(tmp_path / "r.jsonl", slower(1.4, 0))
    assert run(path, "--device", DEVICE["cpu"], "--html", page, "--plot", plot).exit_code == 1
    text = page.read_text()
    assert all(f'<th scope="row">{method}</th><td>' in text.partition("<h2>Cells")[2] for method in METHODS)
    assert "ratio to full" in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert plot.read_bytes().startswith(b"\x89PNG")


VISIT = visit(Cell(TINY, "full", Setup(seq=16)), "cpu")
TWO = {"kind": "ddp", "processes": 2, "backend": "gloo"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"kind": "visit"}, "id is missing"),
        ({"kind": "guess"}, "unknown kind of record 'guess'"),
        ({**VISIT, "seconds": {"step": [0.1]}}, "holds seconds of steps"),
        ({**VISIT, "status": "fine"}, "unknown status"),
        ({**VISIT, "environment": "there"}, "no record of environment"),
        ({**VISIT, "parallel": "ddp"}, "parallel is not a dict"),
        ({**VISIT, "parallel": {"kind": "ddp", "backend": "gloo"}}, "parallel: processes is missing"),
        ({**VISIT, "parallel": {**TWO, "nodes": "one"}}, "must be numbers"),
        ({**VISIT, "parallel": TWO, "messages": {"backward": {"allreduce": [1]}}}, "must be numbers"),
        ({**VISIT, "parallel": TWO, "profile": {"communication_share": "half"}}, "a share from 0 to 1"),
    ],
)  # fmt: skip
def test_records_that_are_not_whole_are_refused_in_one_line(tmp_path: Path, line: Record, message: str) -> None:
    """A file edited by hand, or of something else, must not end in a traceback."""
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"schema": 1, **line}) + "\n")
    with pytest.raises(UserError, match=message):
        check_records([path], device=DEVICE["cpu"])


@pytest.mark.parametrize("number", [True, -1, 1.5, "3", None])
@pytest.mark.parametrize("place", ["calls", "kernels"])
def test_a_count_is_a_whole_number(tmp_path: Path, place: str, number: Any) -> None:
    """Python takes True for 1, and a count of -1 or 1.5 would be compared as if somebody had counted it."""
    record = visit(Cell(TINY, "full", Setup(seq=16)), "cpu")
    if place == "calls":
        record["calls"] = {"forward": {"mm": number}}
    else:
        record["profile"] = {"by_call": {"forward": {"mm": [number, 1e-6]}}}
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps({"schema": 1, **r}) + "\n" for r in (environment(), record)))
    with pytest.raises(UserError, match="must be numbers"):
        check_records([path], device=DEVICE["cpu"])


@pytest.mark.parametrize("seconds", [0.0, -1.0, records.LONGEST, float("inf"), float("nan"), True, "1", None])
def test_a_time_is_a_positive_number_of_seconds(tmp_path: Path, seconds: Any) -> None:
    """Milliseconds that were taken for seconds, or a clock that jumped, must not become an error of the model."""
    path = tmp_path / "r.jsonl"
    record = visit(Cell(TINY, "full", Setup(seq=16)), "cpu")
    record["seconds"]["step"][0] = seconds
    path.write_text("".join(json.dumps({"schema": 1, **r}) + "\n" for r in (environment(), record)))
    with pytest.raises(UserError, match="holds seconds of steps"):
        check_records([path], device=DEVICE["cpu"])


def test_a_machine_without_a_profile_is_told_how_to_get_one(tmp_path: Path) -> None:
    """Another machine's profile would make every figure wrong; the way out is one command."""
    path = written(tmp_path / "r.jsonl")
    with pytest.raises(UserError, match="perfmodel calibrate --device cpu"):
        check_records([path])
    with pytest.raises(UserError, match="the records are of a cpu device, l4 is a cuda"):
        check_records([path], device="l4")
    assert run(tmp_path / "none.jsonl").exit_code == 2


def test_the_calibration_of_the_machine_that_measured_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands are enough, and another machine's calibration of that name must not be used by mistake."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    for folder in ("devices", "hosts"):
        (tmp_path / folder).mkdir()
    bundled = (profile.DEVICES / f"{DEVICE['cpu']}.toml").read_text()
    renamed = re.sub(r"(?m)^name = .*$", 'name = "a CPU"', bundled)
    (tmp_path / "devices" / "mine.toml").write_text(re.sub(r"(?m)^aliases = .*$", "aliases = []", renamed))
    (tmp_path / "hosts" / "mine.toml").write_text((hosts.HOSTS / "epyc-genoa.toml").read_text())
    found = check_records([written(tmp_path / "r.jsonl")])
    assert found.machines["here"].on.slug == "mine"
    (tmp_path / "devices" / "mine.toml").write_text(renamed.replace('"a CPU"', '"another CPU"'))
    with pytest.raises(UserError, match="no profile of 'a CPU'"):
        check_records([tmp_path / "r.jsonl"])
