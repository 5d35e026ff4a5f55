"""The reader of profiler traces, on a trace written by hand in Kineto's format: no GPU is needed to trust it.

In the fixture a forward launches a GEMM (stream 7) and a copy (stream 20); a backward on its own thread launches a fill
and two kernels that run late, after the annotation has ended on the host; one kernel's launch lies before the trace.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from validate.measuring import kineto

FIXTURE = Path(__file__).parent / "fixtures" / "kineto_two_streams.json"
COMPOSITE = {"aten::linear", "aten::t"}


@pytest.fixture(scope="module")
def trace() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def profile(trace: dict[str, Any]) -> kineto.Profile:
    return kineto.parse(trace, ["forward", "backward"], transparent=COMPOSITE.__contains__)


def test_a_kernel_belongs_to_the_phase_that_launched_it(profile: kineto.Profile) -> None:
    """The device runs behind the host: by its own time a late kernel would be counted in the wrong phase or in none."""
    assert {w.name: w.phase for w in profile.work if w.kind == "kernel"} == {
        "gemm_128x128": "forward", "sum_and_scatter": "backward", "left_over_of_the_step_before": "outside",
    }  # fmt: skip


def test_a_kernel_belongs_to_the_aten_call_that_launched_it(profile: kineto.Profile) -> None:
    """Kernels per ATen call is a table of the model: composite calls launch nothing themselves, an op's helpers do."""
    calls = [(w.kind, w.call) for w in profile.work if w.call]
    assert calls == [
        ("kernel", "aten::mm"), ("memcpy", "aten::copy_"), ("memset", "aten::embedding_dense_backward"),
        ("kernel", "aten::embedding_dense_backward"), ("kernel", "aten::embedding_dense_backward"),
    ]  # fmt: skip


def test_streams_copies_and_missing_launches(profile: kineto.Profile) -> None:
    """Copies are not kernels, and a kernel without its launch must be reported, not guessed."""
    copy, fill = (next(w for w in profile.work if w.kind == kind) for kind in ("memcpy", "memset"))
    assert (copy.stream, copy.nbytes, fill.stream, fill.nbytes) == (20, 1048576, 7, 4096)
    assert copy.seconds == pytest.approx(100e-6)
    assert profile.unlaunched == 1


def test_kernels_are_counted_by_the_call_that_launched_them(profile: kineto.Profile) -> None:
    """A fill is what some calls launch instead of a kernel, so it counts; a copy from the host does not."""
    pytest.importorskip("torch")
    from validate.measuring.profile import summary

    found = summary(profile, "cuda", step_seconds=1e-3)
    calls = {phase: {name: n for name, (n, _) in table.items()} for phase, table in found["by_call"].items()}
    assert calls["forward"] == {"aten::mm": 1}
    assert calls["backward"] == {"aten::embedding_dense_backward": 3}
    assert found["copies"] == {"number": 1, "bytes": 1048576}
    assert found["host_bound_share"] == pytest.approx(1 - profile.busy / 1e-3)


def test_busy_time_counts_overlapping_streams_once(profile: kineto.Profile) -> None:
    """Streams overlap: adding their kernels up would report a device that is busier than it is."""
    by_hand = 5 + 300 + 10 + (2100 - 2000)  # 1250-1350 lies inside the GEMM, 2040-2100 partly inside 2000-2080
    assert profile.busy == pytest.approx(by_hand * 1e-6)


def test_host_calls_keep_only_their_own_time(profile: kineto.Profile) -> None:
    """Self times add up to the time in outermost calls: nothing is counted twice."""
    own = {c.name: c.self_seconds for c in profile.calls}
    assert own["aten::linear"] == pytest.approx(22e-6)
    assert own["aten::zeros"] == pytest.approx(20e-6)
    assert sum(own.values()) == pytest.approx(sum(c.seconds for c in profile.calls if c.outermost))
    assert profile.phases == pytest.approx({"forward": 400e-6, "backward": 500e-6})


def test_memory_peak_is_the_highest_running_sum(profile: kineto.Profile) -> None:
    """Events of several threads come in any order in the file."""
    assert profile.memory_peak == 2300


def test_the_order_of_events_in_the_file_does_not_matter(trace: dict[str, Any], profile: kineto.Profile) -> None:
    """Kineto sorts its events by nothing that one could rely on."""
    shuffled = list(trace["traceEvents"])
    random.Random(1).shuffle(shuffled)
    again = kineto.parse({"traceEvents": shuffled}, ["forward", "backward"], transparent=COMPOSITE.__contains__)
    by_start = sorted(profile.work, key=lambda w: w.start)
    assert sorted(again.work, key=lambda w: w.start) == by_start
    assert (again.busy, again.memory_peak, again.phases) == (profile.busy, profile.memory_peak, profile.phases)


def test_union_of_intervals() -> None:
    """By hand: nested, overlapping, touching and apart."""
    assert kineto.union([]) == 0
    assert kineto.union([(0, 10), (2, 3), (9, 12), (12, 13), (20, 21)]) == 14
