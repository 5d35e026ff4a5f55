"""CPUs whose steps `validate measure` timed are predicted within the limits, from their calibration alone."""

import pytest

pytest.importorskip("scipy")

from perfmodel.resources import DATA
from validate.checking.check import Report, check_records

MEASURED = {path.stem: path for path in sorted((DATA / "measured").glob("*.jsonl"))}
DEVICE = {"cpu-epyc-genoa": "cpu-epyc-genoa-1t"}  # where a maker's name such as "AMD EPYC" does not tell it


@pytest.fixture(scope="module", params=MEASURED)
def found(request: pytest.FixtureRequest) -> tuple[str, Report]:
    """The records of a CPU and their check."""
    return request.param, check_records([MEASURED[request.param]], device=DEVICE.get(request.param))


def test_steps_and_speedups_keep_the_limits(found: tuple[str, Report]) -> None:
    """Mean errors of the standard grid: 10 % of the step's time, 8 % of the ratio to full fine-tuning."""
    line = found[1].lines[-1]
    assert line.step.number in (48, 72)
    assert line.step.mean <= 0.10
    assert line.ratio.mean <= 0.08
    assert [limit.name for limit in found[1].limits if not limit.holds] == []


def test_calls_are_exact_and_memory_is_within_one_percent(found: tuple[str, Report]) -> None:
    """What is counted does not depend on the machine."""
    assert not any(o.calls or o.kernels for o in found[1].outcomes)
    assert max(abs(o.memory_error) for o in found[1].outcomes) <= 0.01


def test_verdicts_are_right_where_the_measurement_decides(found: tuple[str, Report]) -> None:
    """Faster or slower by more than 10 % must be predicted as such."""
    assert [p.other.measured.cell.name for p in found[1].pairs if p.decided and not p.right] == []
