"""Power of boards and nodes: physics, and what MLPerf's power submissions measured."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.prediction import energy
from perfmodel.prediction.predict import predict
from validate.published import power


def test_two_figures_are_those_of_the_one_row_that_they_were_fitted_to() -> None:
    """A constant that nobody can derive again is one that somebody tuned."""
    assert power.fit() == (pytest.approx(energy.AT_WORK, abs=0.005), pytest.approx(energy.NODE, abs=0.005))


def test_power_on_rows_that_no_fit_saw() -> None:
    """The promise: 12 % in the mean, no row beyond 25 %; eight rows of 66 runs on H100 nodes, none of another GPU."""
    rows = power.checked()
    assert len(rows) == 8
    assert power.mean_error() < power.MEAN_LIMIT
    assert max(abs(row.error) for row in rows) < power.WORST_LIMIT


def test_the_command_says_which_rows_are_checked() -> None:
    """Its exit code is the promise."""
    told = CliRunner().invoke(main, ["validate", "power", "--json"])
    found = json.loads(told.stdout)
    assert told.exit_code == 0
    assert [row["checked"] for row in found["rows"]].count(True) == 8
    assert found["worst"] == max(abs(row["error"]) for row in found["rows"])
    assert "mean 7.0 %" in CliRunner().invoke(main, ["validate", "power"]).stdout


def test_more_work_draws_more_up_to_the_limit() -> None:
    """A board that waits idles, and none draws more than it may."""
    hardware = profile.load("h100-sxm").hardware
    assert hardware.board_power is not None

    def watts(flops: float, nbytes: float, working: float) -> float:
        drawn = energy.draws(hardware, flops_per_second={"bf16": flops}, bytes_per_second=nbytes, working=working)
        assert drawn is not None
        return drawn.step

    assert watts(0, 0, 0) == energy.IDLE * hardware.board_power
    assert watts(0, 0, 0) < watts(0, 1e12, 0.5) < watts(1e14, 1e12, 0.5) < watts(1e14, 1e12, 1.0)
    assert watts(1e16, 1e14, 1.0) == hardware.board_power
    eight = energy.joules_per_flop(hardware, "e4m3")
    assert eight == pytest.approx(energy.joules_per_flop(hardware, "bf16") / 2, rel=0.01)


def test_joules_of_a_step_recomputed_by_hand() -> None:
    """FLOPs, bytes, work and idling of one step, summed as the docstring says."""
    p, hardware = predict("llama-3.2-1b", "lora", device="l40s", batch=2, seq=512), profile.load("l40s").hardware
    drawn = energy.board_power(p, hardware)
    assert drawn is not None
    assert p.step is not None
    seconds, busy = p.time.phases["total"], p.time.device_busy
    ran = energy.flops_by_dtype(p.step)
    assert ran["bf16"] > 0.9 > 0.1 > ran["fp32"] > 0  # adapters
    joules = 0.14 * 350 * seconds + 0.37 * 350 * busy + 60e-12 * min(p.bytes["total"], 864e9 * busy)
    joules += p.flops["total"] * (ran["bf16"] * 1.87e-12 + ran["fp32"] * 10.5e-12)
    assert drawn.step * seconds == pytest.approx(min(joules, 350 * seconds))
    assert energy.board_power(p, replace(hardware, board_power=None)) is None
    assert energy.board_power(p, hardware, node=90.0) == replace(drawn, node=90.0)
