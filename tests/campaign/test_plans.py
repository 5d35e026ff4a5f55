"""What a campaign measures: budgets and plans that are wrong are refused, bundled ones begin with what tells most."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")

from campaigns import CPU, PLAN, command
from records_by_hand import DEVICE, TINY, environment, visit

from perfmodel import architectures, compare
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.setup import Setup
from validate.campaign import guide, plan, versions, work
from validate.checking.check import check_records
from validate.measuring import records
from validate.measuring.cells import Cell


@pytest.mark.parametrize("budget", ["0m", "-3s", "25q", "1e3", "4", "", "nan", "9m9", "1_0m"])
def test_a_budget_that_is_none_ends_in_one_line(tmp_path: Path, budget: str) -> None:
    """An hour spent on a typing error is gone."""
    done = command("--output", tmp_path / "c", "--budget", budget)
    assert done.exit_code == 2
    assert done.output.count("\n") == 1
    assert "--budget" in done.output
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[[stages]]", "[[stage]]"), "did you mean 'stages'"),
        (('name = "steps"', 'nam = "steps"'), "has a name"),
        (("most = 34", "most = 0"), "most must be a whole number from 1"),
        (('"gemm bf16"', '"gem bf16"'), "did you mean 'gemm bf16'"),
        (('"lora:r=4"', '"lore"'), "unknown method 'lore'"),
        (("programs = 10", "program = 10"), "did you mean 'programs'"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_in_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    """Before anything runs, not when its stage comes."""
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.replace(*change))
    done = command("--output", tmp_path / "c", "--plan", path)
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "c").exists()


def test_bundled_plans_begin_with_what_tells_most() -> None:
    """Any prefix must be worth having: floors and kernels before steps, the paper's steps before rare options."""
    on = profile.load("h100-sxm")
    units = plan.load_plan(None, "cuda").units("cuda", on)
    first = {stage: i for i, u in reversed(list(enumerate(units))) for stage in (u.stage,)}
    order = ["floors", "kernels, a first part", "the paper's own: 4 x 512 tokens", "around the break-even", "QLoRA"]
    assert sorted(order, key=first.__getitem__) == order
    visits = [u.work.cell for u in units if isinstance(u.work, plan.Visit)]
    models = {c.config.name for c in visits}
    assert {"gpt2-xl", "tinyllama-1.1b", "llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b"} <= models
    assert {c.method.partition(":")[0] for c in visits} == {"full", "lora", "dora", "ia3", "top_k", "qlora"}
    assert {c.setup.compile for c in visits} == {"none", "default"}
    assert {c.setup.grad_accum for c in visits} == {1, 4}
    assert len({u.id for u in units}) == len(units)
    assert plan.load_plan(None, "cpu").units("cpu", CPU)[0].stage == "floors"


@pytest.mark.parametrize("block", ["gemm int2", ["gemm fp32"], {"gemm": 1}, 3])
def test_a_block_that_is_none_is_one_line(tmp_path: Path, block: Any) -> None:
    """An hour on a rented machine begins with a plan that somebody has written by hand."""
    path = tmp_path / "plan.toml"
    text = json.dumps(block) if not isinstance(block, dict) else "{gemm = 1}"
    path.write_text(f'[[stages]]\nname = "a"\nblocks = [{text}]\n')
    with pytest.raises(UserError, match="unknown block of microbenchmarks"):
        plan.load_plan(path, "cpu")


def test_steps_lie_around_the_predicted_break_even() -> None:
    """There a verdict is hardest to get right: half the length must come out on one side, twice on the other."""
    config, on, method = architectures.load("llama-3.2-3b"), profile.load("h100-sxm"), "lora:r=16,targets=all-linear"
    cells = [Cell(config, text, Setup(batch=4)) for text in ("full", method)]
    found = list(guide.around(cells, on, 2048))
    assert [c.method for c in found] == ["full", method] * 3
    middle, short, long = (c.setup.seq for c in found[::2])
    ratios = [
        compare(config, ["full", method], Setup(batch=4, seq=seq), on).speedups[0].ratio
        for seq in (short, middle, long)
    ]
    assert ratios[0] > 1.1 > ratios[1] > 0.9 > ratios[2]


def test_counts_of_another_version_are_compared_with_its_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the installed program is not the tape's, a call more is no error of the model, nor may it be hidden."""
    assert versions.other() == []
    monkeypatch.setattr(versions, "installed", lambda name: "4.50.0" if name == "transformers" else "0")
    assert "transformers" in versions.other()
    cell = Cell(TINY, "full", Setup(batch=2, seq=16, dtype="fp32"))
    record = visit(cell)
    plain = work.traced_cell(cell, "cpu")["calls"]
    assert check_calls(tmp_path / "a", {**record, "traced": {"calls": plain}}) == []  # the trace is the tape's program
    record["calls"]["forward"]["mm"] = record["calls"]["forward"].get("mm", 0) + 1
    assert check_calls(tmp_path / "b", record) != []
    plain["forward"]["mm"] = plain["forward"].get("mm", 0) + 1
    assert check_calls(tmp_path / "c", {**record, "traced": {"calls": plain}}) == []


@pytest.mark.parametrize(
    ("turn", "status", "wanted", "expected"),
    [(0, "ok", True, True), (1, "ok", True, False), (0, "oom", True, False), (0, "ok", False, False)],
)
def test_only_a_first_visit_that_succeeds_is_traced(
    monkeypatch: pytest.MonkeyPatch, turn: int, status: str, wanted: bool, expected: bool
) -> None:
    """A trace takes seconds of a rented hour: once a program, and where its counts are compared with it."""
    monkeypatch.setattr(work, "visit", lambda *of, **options: {"status": status})
    monkeypatch.setattr(work, "traced_cell", lambda cell, device: {"calls": {}})
    cell = Cell(TINY, "full", Setup(batch=2, seq=16))
    found = work.visit_record(plan.Visit(cell, turn), work.Settings("cpu", 1, 1, 1, wanted))
    assert ("traced" in found) == expected
    assert found["status"] == status


def check_calls(path: Path, record: dict[str, Any]) -> list[Any]:
    records.append_records(path, environment(), record)
    return list(check_records([path], device=DEVICE["cpu"]).outcomes[0].calls)


def test_qlora_runs_on_bitsandbytes_where_it_is_installed() -> None:
    """The campaign's QLoRA stage must measure 4-bit weights, not a LoRA under another name."""
    pytest.importorskip("bitsandbytes")
    from validate.measuring.visit import visit as measure

    cell = Cell(TINY, "qlora:r=4,targets=all-linear", Setup(batch=2, seq=16))
    found = measure(cell, "cpu", threads=1, warm_up=1, steps=1)
    assert found["status"] == "ok", found
    assert any("4bit" in name for name in found["calls"]["forward"])
    p = compare(TINY, ["full", cell.method], cell.setup, CPU).predictions[1]
    assert found["params"]["trainable"] == p.trainable_params
    assert found["memory"]["peak"] == pytest.approx(p.memory.peak, rel=0.05)
