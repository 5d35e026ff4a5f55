"""PEFT's benchmark of its tuners: the table, what is reported of it, and the command that a user runs."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

from perfmodel import cli
from perfmodel.devices import host as hosts
from perfmodel.devices.host import Host
from perfmodel.errors import UserError
from perfmodel.prediction.predict import predict
from validate.published import tuners
from validate.published.tuners import (
    TunerOutcome,
    TunerRow,
    evaluate_tuner,
    host_speed,
    published_tuners,
    summarise_tuners,
)


@pytest.fixture(scope="module")
def rows() -> dict[str, TunerRow]:
    return {row.id: row for row in published_tuners()}


def outcome(row: TunerRow, seconds: float, predicted: float) -> TunerOutcome:
    prediction: Any = SimpleNamespace(time=SimpleNamespace(phases={"total": predicted}))
    return TunerOutcome(replace(row, seconds=seconds), prediction)


def test_every_row_names_its_source_and_can_be_read(rows: dict[str, TunerRow]) -> None:
    """A figure without a source cannot be checked; a figure outside its run's own spread was copied wrongly."""
    assert len(rows) == 44
    assert len({row.tuner for row in rows.values()}) >= 25
    for row in rows.values():
        assert row.source.startswith("https://github.com/huggingface/peft/blob/")
        assert 0 < row.spread < 0.5 * row.seconds
        assert row.trainable > 0


def test_a_traced_row_is_the_tapes_prediction(rows: dict[str, TunerRow]) -> None:
    """The table's setup, read into a trace, is what one would write on the command line."""
    row = rows["lora-rank32"]
    found = evaluate_tuner(row)
    tape = predict(row.model, "lora:r=32,targets=q_proj+v_proj", row.setup, row.device)
    assert found.predicted == pytest.approx(float(tape.time.phases["total"]), rel=0.02)
    assert found.prediction is not None
    assert found.prediction.trainable_params == row.trainable


def test_a_tuner_that_cannot_be_traced_says_why(rows: dict[str, TunerRow]) -> None:
    """It must be listed with its reason, not fall out of the count silently."""
    broken = replace(rows["lora-rank32"], config={"peft_type": "LORA", "target_modules": ["nothing"]})
    assert "nothing" in evaluate_tuner(broken).reason


def test_the_summary_is_what_one_computes_by_hand(rows: dict[str, TunerRow]) -> None:
    """Errors 10 %, 20 %, 0 % in size, two of four ranks swapped: Spearman 1 - 6·2/(4·15) = 0.8."""
    row = rows["lora-rank32"]
    found = [outcome(row, m, p) for m, p in ((1.0, 1.1), (2.0, 1.6), (1.5, 1.8), (4.0, 4.0))]
    total = summarise_tuners([*found, TunerOutcome(row, None, "why")])
    assert total.rows == 4
    assert total.mean == pytest.approx((0.1 + 0.2 + 0.2 + 0.0) / 4)
    assert total.spearman == pytest.approx(0.8)
    assert not total.holds
    assert abs(total.worst[0].error) == pytest.approx(0.2)


@pytest.mark.parametrize(("factor", "code"), [(1.05, 0), (1.3, 1)])
def test_the_command_ends_with_1_when_a_limit_is_missed(
    rows: dict[str, TunerRow], monkeypatch: pytest.MonkeyPatch, factor: float, code: int
) -> None:
    """A harness that cannot fail checks nothing."""
    chosen = [rows["lora-rank32"], rows["prompt_tuning-default"]]
    monkeypatch.setattr(tuners, "published_tuners", lambda source: chosen)
    monkeypatch.setattr(tuners, "evaluate_tuner", lambda row, host: outcome(row, row.seconds, factor * row.seconds))
    result = CliRunner().invoke(cli.main, ["validate", "tuners", "--json"])
    assert result.exit_code == code, result.output
    answer = json.loads(result.stdout)
    assert answer["summary"]["mean"] == pytest.approx(factor - 1)
    assert result.stdout == json.dumps(answer, indent=1) + "\n"  # a value a line: two runs can be compared


@pytest.mark.parametrize(("factor", "all_told"), [(1.05, False), (1.3, True)])
def test_a_reason_stands_with_the_worst_rows_and_with_all_that_are_far(
    rows: dict[str, TunerRow], monkeypatch: pytest.MonkeyPatch, factor: float, all_told: bool
) -> None:
    """A far row beside the table of the worst ones would be an error that nobody has to explain."""
    chosen = list(rows.values())[: tuners.WORST + 2]
    monkeypatch.setattr(tuners, "published_tuners", lambda source: chosen)
    monkeypatch.setattr(tuners, "evaluate_tuner", lambda row, host: outcome(row, row.seconds, factor * row.seconds))
    lines = CliRunner().invoke(cli.main, ["validate", "tuners"]).output.splitlines()
    told = [row for row in chosen if any(line.startswith(f"{row.id}, +") for line in lines)]
    assert len(told) == (len(chosen) if all_told else tuners.WORST)


def test_how_slow_a_host_was_is_judged_by_the_tuners_that_it_was_not_fitted_to(
    rows: dict[str, TunerRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One figure says all of a machine only if other tuners say the same one: here two of them do not."""
    usual, truth = hosts.load(), {"LORA": 1.7}

    def waiting(row: TunerRow, host: Host) -> TunerOutcome:
        times = host.call / usual.call
        return outcome(row, row.seconds * (1.0 + truth.get(row.tuner, 2.0)), row.seconds * (1.0 + times))

    monkeypatch.setattr(tuners, "evaluate_tuner", waiting)
    chosen = [r for r in rows.values() if r.tuner in ("LORA", "IA3")]  # one in each half
    found = host_speed(chosen)
    assert found.halves == pytest.approx((1.7, 2.0), abs=0.02)
    assert found.rows == len(chosen)
    of_lora = sum(r.tuner == "LORA" for r in chosen) / len(chosen)
    assert found.before == pytest.approx(of_lora * 0.7 / 2.7 + (1.0 - of_lora) / 3.0)
    assert found.crossed == pytest.approx(of_lora * 0.3 / 2.7 + (1.0 - of_lora) * 0.3 / 3.0, abs=0.01)
    assert 1.68 < found.slower < 2.02


def test_a_host_is_not_fitted_where_no_tuner_is_left_to_judge_it(rows: dict[str, TunerRow]) -> None:
    """A figure that nothing checks is a guess."""
    with pytest.raises(UserError, match="half of the tuners"):
        host_speed([rows["lora-rank32"]])


@pytest.mark.parametrize("beside", [["--host", "half-speed"], ["--all-rows"]])
def test_what_a_fit_of_the_host_would_ignore_is_refused(beside: list[str]) -> None:
    """It tells the host and no rows."""
    result = CliRunner().invoke(cli.main, ["validate", "tuners", "--fit-host", *beside])
    assert result.exit_code == 2
    assert "--fit-host goes without" in result.output


def test_the_command_tells_how_slow_the_host_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the figure that goes into a host's file."""
    monkeypatch.setattr(tuners, "host_speed", lambda rows, tried: tuners.HostSpeed(2.0, (2.1, 1.9), 44, 0.058, 0.039))
    told = " ".join(CliRunner().invoke(cli.main, ["validate", "tuners", "--fit-host"]).output.split())
    assert "a host 2 times as slow as the usual one" in told
    assert "by 5.8 % beside the usual host, by 3.9 % beside the one that the other half tells" in told
