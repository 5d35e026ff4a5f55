"""`perfmodel validate paper`: the claim of arXiv 2507.08833, measured beside predicted."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

from records_by_hand import DEVICE, TINY, environment, visit

from perfmodel.cli import main
from perfmodel.setup import Setup
from validate.campaign import paper
from validate.measuring import records, run
from validate.measuring.cells import Cell, Grid

LORA = "lora:r=4,targets=all-linear"


def called(*words: str | Path) -> Any:
    return CliRunner().invoke(main, ["validate", "paper", *map(str, words)])


def test_the_papers_figures_stand_beside_the_prediction() -> None:
    """Its ratios are those of the published seconds, of the same size of batch only."""
    rows = {(r.cell.config.name, r.cell.setup.seq): r for r in paper.predicted_claim("a100-80gb-sxm")}
    assert rows["gpt2-xl", 512].published == pytest.approx(0.22207 / 0.17681)
    assert rows["tinyllama-1.1b", 512].published == pytest.approx(0.14196 / 0.10403)
    assert rows["gpt2-xl", 1024].published is None
    assert all(paper.verdict_of_ratio(r.predicted) == "slower" for r in rows.values())


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (3.0, 1)])
def test_a_verdict_that_is_wrong_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, code: int
) -> None:
    """Forward + backward alone decide: a record as predicted is right, one whose LoRA is thrice as slow is not."""
    setup = Setup(batch=2, seq=16, dtype="fp32")
    visits = [visit(Cell(TINY, method, setup)) for method in ("full", LORA)]
    for phase in ("forward", "backward"):
        visits[0]["seconds"][phase] = [s * factor for s in visits[0]["seconds"][phase]]
    visits[1]["seconds"]["optimizer"] = [1e3]  # of no account
    visits[1]["seconds"] = {k: v[:1] for k, v in visits[1]["seconds"].items()}
    plan = run.MeasuringPlan(Grid("by hand", (), 1, 1, 1), "cpu", 1)
    monkeypatch.setattr(run, "plan", lambda *args, **options: plan)
    monkeypatch.setattr(
        run, "measure_cells", lambda plan, output, progress: records.append_records(output, environment(), *visits)
    )
    done = called("--device", "cpu", "--profile", DEVICE["cpu"], "--output", tmp_path / "r.jsonl", "--json")
    assert done.exit_code == code, done.output
    (row,) = json.loads(done.output)["rows"]
    assert row["measured"]["ratio"] * factor == pytest.approx(row["predicted"]["ratio"])


def test_paper_is_told_what_to_do() -> None:
    """Neither or both is a question of its own."""
    for words in ((), ("--device", "cpu", "--predict-only", "l4")):
        done = called(*words)
        assert done.exit_code == 2
        assert "--predict-only DEVICE" in done.output
