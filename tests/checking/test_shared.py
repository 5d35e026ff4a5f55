"""Steps that several processes shared, held against the tape of a rank.

`fixtures/two_ranks.jsonl` is what `validate measure --parallel` wrote of two gloo processes on a CPU (PyTorch 2.13;
without its table of operators): a tiny Llama, full and LoRA, DDP and FSDP2.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from made_up_node import cpu_node
from records_by_hand import DEVICE, written

from perfmodel.cli import main
from perfmodel.errors import UserError
from validate.checking.check import SEVERAL, Report, check_records

RECORDS = Path(__file__).parents[1] / "fixtures" / "two_ranks.jsonl"
CPU = "cpu-epyc-genoa-1t"
COUNTED = (
    "cells that failed", "cells whose ATen calls differ", "cells whose collectives or their bytes differ",
    "peak memory, worst error",
)  # fmt: skip
Change = Callable[[list[dict[str, Any]]], object]


def changed(folder: Path, change: Change = lambda records: None) -> Path:
    """The records, changed by `change`: the environment and four visits."""
    found = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    change(found)
    path = folder / "two.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in found))
    return path


def checked(folder: Path, change: Change = lambda records: None) -> Report:
    return check_records([changed(folder, change)], device=CPU, node=cpu_node(folder / "node.toml"))


def exceeded(report: Report) -> set[str]:
    return {x.name.removeprefix(f"{SEVERAL}: ") for x in report.limits if not x.holds} & set(COUNTED)


def test_ranks_exchange_what_the_tape_has(tmp_path: Path) -> None:
    """Zero tolerance: which collectives, how many, their bytes, every ATen call; memory of a rank within 1 %."""
    found = checked(tmp_path)
    assert [limit.name for limit in found.limits if limit.name.removeprefix(f"{SEVERAL}: ") in COUNTED]
    assert exceeded(found) == set()
    assert {(o.measured.name.split()[-2], o.measured.cell.method) for o in found.shared} == {
        (kind, method) for kind in ("ddp", "fsdp2") for method in ("full", "lora:r=4")
    }
    for o in found.shared:
        assert o.differences == []
        assert o.measured.calls
        assert o.measured.shared
        assert sum(n for of in o.measured.shared.messages.values() for n, _ in of.values()) > 0
        assert abs(o.memory_error) < 0.01
        assert 0 < o.communication < 1
    assert len(found.pairs) == 2  # a speed-up is over full fine-tuning that was shared alike
    assert {line.name for line in found.shared_lines} == {"full", "lora:r=4", "ddp x2", "fsdp2 x2", "all"}


def one_byte_more(records: list[dict[str, Any]]) -> None:
    records[1]["messages"]["backward"]["allreduce"][1] += 1


def one_collective_less(records: list[dict[str, Any]]) -> None:
    records[1]["messages"]["forward"].clear()


def by_nccl(records: list[dict[str, Any]]) -> None:
    """NCCL scatters what it reduces: it copies nothing out, as gloo does."""
    for record in records[1:]:
        record["parallel"]["backend"] = "nccl"


def holds_more(records: list[dict[str, Any]]) -> None:
    records[2]["memory"]["peak"] = int(records[2]["memory"]["peak"] * 1.06)


@pytest.mark.parametrize(
    ("change", "limit", "told"),
    [
        (one_byte_more, COUNTED[2], ("backward", "bytes of allreduce", 1)),
        (one_collective_less, COUNTED[2], ("forward", "broadcast", -1)),
        (by_nccl, COUNTED[1], ("backward", "copy_", 4)),
        (holds_more, COUNTED[3], None),
    ],
)
def test_a_number_that_is_wrong_is_reported(
    tmp_path: Path, change: Change, limit: str, told: tuple[str, str, int] | None
) -> None:
    """Traffic is what LoRA saves or does not: a byte that nobody predicted must fail the check, and be named."""
    found = checked(tmp_path, change)
    assert exceeded(found) == {limit}
    off = {(d.phase, d.name, d.measured - d.predicted) for o in found.shared for d in o.differences}
    assert told is None or told in off


def test_steps_of_one_process_are_judged_as_without_them(tmp_path: Path) -> None:
    """Both kinds of records lie in one file, and neither may make the other look better or worse."""
    alone, node = written(tmp_path / "r.jsonl"), cpu_node(tmp_path / "node.toml")
    before = check_records([alone], device=DEVICE["cpu"])
    found = check_records([alone, changed(tmp_path)], device=DEVICE["cpu"], node=node)
    assert found.limits[: len(before.limits)] == before.limits
    assert str(found.lines) == str(before.lines)  # some figures are nan
    assert all(limit.name.startswith(SEVERAL) for limit in found.limits[len(before.limits) :])
    assert before.holds


def old(records: list[dict[str, Any]]) -> None:
    for record in records[1:]:
        del record["parallel"]["nodes"]


def on_one_core(records: list[dict[str, Any]]) -> None:
    for record in records[1:]:
        record["parallel"]["cores"] = 1


def other_torch(records: list[dict[str, Any]]) -> None:
    records[0]["software"]["torch"] = "2.9.1"


def compiled(records: list[dict[str, Any]]) -> None:
    for record in records[1:]:
        record["cell"]["setup"]["compile"] = "default"


def of_one(records: list[dict[str, Any]]) -> None:
    for record in records[1:]:
        record["parallel"]["processes"] = 1


REASONS: list[tuple[Change, str]] = [
    (of_one, "of 1 process shares nothing: measure without --parallel"),
    (old, "measured before calls of ranks were counted: measure again"),
    (on_one_core, "2 processes of 1 thread shared 1 core: measure again with cores for all"),
    (other_torch, "measured under torch 2.9.1 (mirrored: 2.13): what ranks call there is not modelled"),
    (compiled, "calls of compiled ranks are not counted as they run: measure without compile"),
]


@pytest.mark.parametrize(("change", "why"), REASONS)
def test_what_cannot_be_predicted_is_said_in_a_line(tmp_path: Path, change: Change, why: str) -> None:
    """Beside other records it is listed with its reason; alone it is all that there is to say."""
    with pytest.raises(UserError) as fault:
        checked(tmp_path, change)
    assert why in str(fault.value)
    assert "\n" not in str(fault.value)
    alone, node = written(tmp_path / "r.jsonl"), cpu_node(tmp_path / "node.toml")
    done = run(alone, tmp_path / "two.jsonl", "--device", DEVICE["cpu"], "--node", node)
    assert done.exit_code == 0, done.output
    assert "3 cells and 2 speed-ups checked, 4 cells not predicted: all limits hold" in done.output
    told = json.loads(run(alone, tmp_path / "two.jsonl", "--device", DEVICE["cpu"], "--node", node, "--json").output)
    assert [why in x["why"] for x in told["not_predicted"]] == [True] * 4
    assert {x["parallel"] for x in told["not_predicted"]} == {"ddp", "fsdp2"}


def run(*words: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["validate", "check", *map(str, words)])


def test_without_a_network_the_way_to_one_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo is as fast as the machine: no other figure would do; after `calibrate --network` nothing is to be typed."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    done = run(RECORDS, "--device", CPU)
    assert done.exit_code == 2
    assert "calibrate --network --device cpu" in done.output
    cpu_node(tmp_path / "nodes" / "mine.toml")
    assert "node mine" in run(RECORDS, "--device", CPU).output


def test_the_terminal_and_the_page_tell_what_was_exchanged(tmp_path: Path) -> None:
    """Number and bytes of a step by hand: all gradients in a bucket, and the buffer of the positions."""
    pytest.importorskip("jinja2")
    page = tmp_path / "c.html"
    busy = changed(tmp_path, lambda records: records[0]["host"].update(load=9.4))
    done = run(busy, "--device", CPU, "--node", cpu_node(tmp_path / "node.toml"), "--html", page)
    assert done.exit_code == 1  # of this machine's times nothing is promised
    parameters, buffer = 78144, 64
    assert "load 9.4 on 2 cores as it began" in done.output
    assert re.search(rf"ddp x2 +2 +{(4 * parameters + buffer) / 1e3:.0f} kB +exact", " ".join(done.output.split()))
    text = page.read_text()
    assert "What the processes exchanged" in text
    assert f"{SEVERAL}: ddp x2" in text
