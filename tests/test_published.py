"""Predictions against published training steps: the accuracy that the README states, on rows that no fit saw."""

import numpy as np
import pytest

from validate.published.steps import Outcome, evaluate_all, load, pairs, summary


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return evaluate_all(load())


@pytest.fixture(scope="module")
def check(outcomes: list[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if o.row.split == "check"]


def test_every_row_names_its_source_and_groups_are_never_split() -> None:
    """A figure without a source cannot be checked, and half a group in the fit would leak into the other half."""
    rows = load()
    assert all(row.source.startswith("http") for row in rows)
    assert len({row.id for row in rows}) == len(rows)
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.group, set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())


def test_step_times_ratios_verdicts_and_memory_meet_their_bars(check: list[Outcome]) -> None:
    """The promise of the product: mean errors of 12 % in time, 8 % in the ratio and in memory, verdicts right."""
    total = summary(check)[-1]
    right, decided = map(int, total["verdicts"].split("/"))
    assert total["mean"] <= 0.12
    assert total["ratio_mean"] <= 0.08
    assert total["memory_mean"] <= 0.08
    assert right >= 0.95 * decided
    assert decided >= 10


def test_intervals_hold_what_they_promise(check: list[Outcome]) -> None:
    """A 90 % interval that holds 60 % misleads; one that holds everything says nothing."""
    assert 0.85 <= np.mean([o.inside for o in check]) <= 0.97


def test_the_answer_that_people_start_from(outcomes: list[Outcome]) -> None:
    """PEFT's L40S benchmark of 2026-07: full 362.6 ms, LoRA r32 on q and v 117.0 ms."""
    rows = {(o.row.method, round(o.seconds, 4)): o for o in outcomes if o.row.family == "peft"}
    full, lora = rows["full", 0.3626], rows["lora:r=32,targets=q_proj+v_proj", 0.1170]
    assert abs(full.error) <= 0.10
    assert abs(lora.error) <= 0.10
    assert full.predicted_seconds / lora.predicted_seconds == pytest.approx(362.6 / 117.0, rel=0.08)


def test_lora_is_slower_where_the_paper_measured_it_slower(outcomes: list[Outcome]) -> None:
    """arXiv 2507.08833, forward and backward on an A100: the starting point of the project."""
    found = pairs([o for o in outcomes if o.row.family == "paper"])
    assert len(found) == 2
    assert all(p.measured < 1 and p.predicted < 1 for p in found)


def test_fp32_steps_of_neusight(outcomes: list[Outcome]) -> None:
    """Eager fp32 training on A100, V100 and L4: mean error at most 8 % (a plain roofline has 31.9 %)."""
    errors = [abs(o.error) for o in outcomes if o.row.family == "neusight"]
    assert np.mean(errors) <= 0.08
