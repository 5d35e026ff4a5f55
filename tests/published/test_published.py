"""Predictions against published training steps: the accuracy that the README states, on rows that no fit saw."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.prediction.memory import reserved_bounds
from perfmodel.program.software import CURRENT
from perfmodel.resources import read_rows
from validate.published import steps
from validate.published.reasons import FAR
from validate.published.show_steps import _print_published
from validate.published.steps import (
    FAMILIES,
    TABLE,
    StepOutcome,
    evaluate_rows,
    published_steps,
    row_pairs,
    stack_of,
    summarise_rows,
)

NAMELESS = ", ".join(CURRENT.words.split(", ")[2:])  # transformers and peft of a row that names neither


@pytest.fixture(scope="module")
def outcomes() -> list[StepOutcome]:
    return evaluate_rows(published_steps())


@pytest.fixture(scope="module")
def check(outcomes: list[StepOutcome]) -> list[StepOutcome]:
    return [o for o in outcomes if o.row.split == "check"]


def test_every_row_names_its_source_and_groups_are_never_split() -> None:
    """A figure without a source cannot be checked, and half a group in the fit would leak into the other half."""
    rows = [row for path in (TABLE, FAMILIES, steps.SEVERAL) for row in published_steps(path)]
    assert all(row.source.startswith("http") for row in rows)
    assert len({row.id for row in rows}) == len(rows)
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    ("software", "date", "words"),
    [
        ("torch 2.7.1+cu126 transformers 4.52.4 peft 0.15.2.dev0", "2025-06-19",
         "torch 2.7.1, CUDA 12.6, transformers 4.52.4, peft 0.15.2"),
        ("torch 2.1.0 cu121 (AMD: 2.4.1)", "2024", f"torch 2.1, CUDA 12.1, {NAMELESS}"),
        ("PyTorch 2.0 CUDA 11.8 flash-attn 2", "", f"torch 2.0, CUDA 11.8, {NAMELESS}"),
        ("Ubuntu 22.04.6 LTS, torch==2.5.1, transformers==4.49.0", "",
         f"torch 2.5.1, CUDA 12.4, transformers 4.49, {NAMELESS.rpartition(', ')[2]}"),
        ("", "2024-06-07", f"torch 2.3, CUDA 12.1, {NAMELESS}"),
        ("NGC PyTorch container, build 16972326", "2024", f"torch 2.5, CUDA 12.4, {NAMELESS}"),
        ("NGC PyTorch container, build 16972326", "", CURRENT.words), ("", "2026-11", CURRENT.words),
    ],
)  # fmt: skip
def test_a_row_is_predicted_on_the_stack_that_it_names(software: str, date: str, words: str) -> None:
    """A figure of 2024 judges the model of 2024's kernels; what a source does not say is taken as of today, but PyTorch
    as of the figure's day."""
    assert stack_of(software, date).words == words


def test_every_row_that_names_its_pytorch_has_it() -> None:
    """A spelling that the pattern misses would be predicted as current without a word."""
    rows = [row for path in (TABLE, FAMILIES) for row in read_rows(path, dict)]
    named = [r["software"] for r in rows if "torch 2" in r["software"].lower() or "torch==" in r["software"]]
    assert len(named) > 90
    assert all(stack_of(software).torch == CURRENT.torch for software in named if "torch 2.13" in software)
    assert all(stack_of(software).torch < CURRENT.torch for software in named if "torch 2.13" not in software)


def test_families_that_joined_later_are_within_12_percent() -> None:
    """No device or host was fitted to a BERT, nor to the cards that people own; every row is of a source no fit saw."""
    found = evaluate_rows(row for row in published_steps(steps.FAMILIES) if row.split == "check")
    assert len(found) >= 24
    assert summarise_rows(found)[-1]["mean"] <= 0.12


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_step_times_ratios_verdicts_and_memory_are_what_the_readme_claims(check: list[StepOutcome]) -> None:
    """The promise of the product, in one sentence: whoever makes a figure worse has to say so in front."""
    total = summarise_rows(check)[-1]
    step, ratio = (f"{100 * total[key]:.1f} %" for key in ("mean", "ratio_mean"))
    right, decided = map(int, total["verdicts"].split("/"))
    assert right == decided
    claim = f"on {len(check)} published training steps that no fit has seen the step time is off by {step} on average, "
    claim += f"the ratio of LoRA to full fine-tuning by {ratio}, and the verdict was right in all {decided} pairs"
    assert claim in " ".join(README.split())
    assert total["mean"] <= 0.05
    assert total["ratio_mean"] <= 0.03
    assert total["memory_mean"] <= 0.03
    assert decided >= 29


def test_the_readme_has_the_table_that_the_command_prints(
    outcomes: list[StepOutcome],
    check: list[StepOutcome],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The figures have one home: a table copied once would outlive the model that it was of."""
    monkeypatch.setenv("COLUMNS", "100")
    _print_published(outcomes, summarise_rows(check), all_rows=False)
    printed = capsys.readouterr().out
    far = {o.row.id for o in outcomes if abs(o.error) > FAR}
    assert {line.partition(": ")[0] for line in printed.splitlines() if ": " in line} & {
        o.row.id for o in outcomes
    } == far
    assert far
    table = printed.split("ratio, memory:")[0]
    assert "".join(f"    {line.rstrip()}\n" for line in table.splitlines()) in README


def test_the_command_judges_by_the_rows_that_no_fit_saw(
    outcomes: list[StepOutcome], check: list[StepOutcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the fit flatter; a script that reads the errors must not get theirs."""
    monkeypatch.setattr(steps, "evaluate_rows", lambda rows, progress: outcomes)
    answer = json.loads(CliRunner().invoke(main, ["validate", "published", "--json"]).stdout)
    assert len(answer["rows"]) == len(outcomes) > len(check)
    assert answer["check"] == json.loads(json.dumps(summarise_rows(check)))


def test_what_the_allocator_may_need_holds_the_published_peaks_and_little_more(check: list[StepOutcome]) -> None:
    """Between the live bytes and what fragmentation adds: too narrow a promise ends in out of memory, too wide a one
    refuses what runs."""
    rows = [o for o in check if o.row.memory and o.row.memory_kind == "allocated"]
    excess = np.array([(o.row.memory or 0.0) / o.memory - 1 for o in rows])
    added = np.array([reserved_bounds(o.memory, "cuda")[1] / o.memory - 1 for o in rows])
    assert len(excess) >= 50
    assert (excess <= added).all()
    assert (excess >= -0.03).all()
    assert added.max() <= 1.25 * excess.max()


def test_intervals_hold_what_they_promise(check: list[StepOutcome]) -> None:
    """A 90 % interval that holds 60 % misleads; one that holds everything says nothing."""
    assert 0.85 <= np.mean([o.inside for o in check]) <= 0.97


def test_the_answer_that_people_start_from(outcomes: list[StepOutcome]) -> None:
    """PEFT's L40S benchmark of 2026-07: full 362.6 ms, LoRA r32 on q and v 117.0 ms."""
    rows = {(o.row.method, round(o.seconds, 4)): o for o in outcomes if o.row.family == "peft"}
    full, lora = rows["full", 0.3626], rows["lora:r=32,targets=q_proj+v_proj", 0.1170]
    assert abs(full.error) <= 0.10
    assert abs(lora.error) <= 0.10
    assert full.predicted_seconds / lora.predicted_seconds == pytest.approx(362.6 / 117.0, rel=0.08)


def test_lora_is_slower_where_the_paper_measured_it_slower(outcomes: list[StepOutcome]) -> None:
    """arXiv 2507.08833, forward and backward on an A100: the starting point of the project."""
    found = row_pairs([o for o in outcomes if o.row.family == "paper"])
    assert len(found) == 2
    assert all(p.measured < 1 and p.predicted < 1 for p in found)


def test_fp32_steps_of_neusight(outcomes: list[StepOutcome]) -> None:
    """Eager fp32 training on A100, V100 and L4: mean error at most 8 % (a plain roofline has 31.9 %)."""
    errors = [abs(o.error) for o in outcomes if o.row.family == "neusight"]
    assert np.mean(errors) <= 0.08
