"""The reader of profiler traces, on a trace written by hand in Kineto's format: no GPU is needed to trust it.

In the fixture a forward launches a GEMM (stream 7) and a copy (stream 20); a backward on its own thread launches a fill
and two kernels that run late, after the annotation has ended on the host; one kernel's launch lies before the trace.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from validate.measuring import kineto

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kineto_two_streams.json"
COMPOSITE = {"aten::linear", "aten::t"}


@pytest.fixture(scope="module")
def trace() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def profile(trace: dict[str, Any]) -> kineto.Profile:
    return kineto.parse_trace(trace, ["forward", "backward"], transparent=COMPOSITE.__contains__)


def test_a_kernel_belongs_to_the_phase_that_launched_it(profile: kineto.Profile) -> None:
    """The device runs behind the host: by its own time a late kernel would be counted in the wrong phase or in none."""
    assert {w.name: w.phase for w in profile.work if w.kind == "kernel"} == {
        "gemm_128x128": "forward", "sum_and_scatter": "backward"
    }  # fmt: skip


def test_a_kernel_belongs_to_the_aten_call_that_launched_it(profile: kineto.Profile) -> None:
    """Kernels per ATen call is a table of the model: composite calls launch nothing themselves, an op's helpers do."""
    calls = [(w.kind, w.call) for w in profile.work if w.call]
    assert calls == [
        ("kernel", "aten::mm"), ("memcpy", "aten::copy_"), ("memset", "aten::embedding_dense_backward"),
        ("kernel", "aten::embedding_dense_backward"), ("kernel", "aten::embedding_dense_backward"),
    ]  # fmt: skip


def test_streams_copies_and_missing_launches(profile: kineto.Profile) -> None:
    """Copies are not kernels, and work that was in flight when the trace began is told, but is none of the step's."""
    copy, fill = (next(w for w in profile.work if w.kind == kind) for kind in ("memcpy", "memset"))
    assert (copy.stream, copy.nbytes, fill.stream, fill.nbytes) == (20, 1048576, 7, 4096)
    assert copy.seconds == pytest.approx(100e-6)
    assert profile.unlaunched == 1


def test_kernels_are_counted_by_the_call_that_launched_them(profile: kineto.Profile) -> None:
    """A fill is what some calls launch instead of a kernel, so it counts; a copy from the host does not."""
    pytest.importorskip("torch")
    from validate.measuring.profile import plain_profile

    found = plain_profile(profile, "cuda", step_seconds=1e-3)
    calls = {phase: {name: n for name, (n, _) in table.items()} for phase, table in found["by_call"].items()}
    assert calls["forward"] == {"aten::mm": 1}
    assert calls["backward"] == {"aten::embedding_dense_backward": 3}
    assert found["copies"] == {"number": 1, "bytes": 1048576}
    assert found["host_bound_share"] == pytest.approx(1 - profile.busy / 1e-3)


def test_busy_time_counts_overlapping_streams_once(profile: kineto.Profile) -> None:
    """Streams overlap: adding their kernels up would report a device that is busier than it is."""
    by_hand = 300 + 10 + (2100 - 2000)  # 1250-1350 lies inside the GEMM, 2040-2100 partly inside 2000-2080
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


def test_what_gloo_takes_and_how_long_it_works(trace: dict[str, Any]) -> None:
    """A buffer of gloo's threads and a clone inside its call are no memory of the program; its spans overlap."""

    def memory(ts: float, tid: int, nbytes: int, address: int) -> dict[str, Any]:
        args = {"Bytes": nbytes, "Addr": address, "Device Type": 0}
        return {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "tid": tid, "ts": ts, "args": args}

    def span(category: str, name: str, ts: float, dur: float, tid: int) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, "tid": tid}

    events = [
        span("cpu_op", "c10d::_reduce_scatter_base_", 0, 100, 1), memory(50, 1, 1000, 11),  # the clone
        span("user_annotation", "gloo:all_reduce", 60, 200, 2), memory(70, 2, 4000, 12), memory(250, 2, -4000, 12),
        span("user_annotation", "gloo:all_gather", 160, 200, 3), memory(300, 1, 500, 13), memory(350, 1, -1000, 11),
        memory(400, 1, 30, 11), memory(450, 1, -500, 13),
    ]  # fmt: skip
    found = kineto.parse_trace({"traceEvents": events}, [])
    assert found.memory_peak == 530  # the program's own, the last of it where the clone was
    assert found.exchanging == pytest.approx(300e-6)
    renamed = [{**e, "name": "ncclDevKernel" if e.get("cat") == "kernel" else e["name"]} for e in trace["traceEvents"]]
    kernels = [e for e in renamed if e["name"] == "ncclDevKernel"]
    by_hand = kineto.union((e["ts"], e["ts"] + e["dur"]) for e in kernels) * 1e-6
    assert kineto.parse_trace({"traceEvents": renamed}, []).exchanging == pytest.approx(by_hand)


def test_the_order_of_events_in_the_file_does_not_matter(trace: dict[str, Any], profile: kineto.Profile) -> None:
    """Kineto sorts its events by nothing that one could rely on."""
    shuffled = list(trace["traceEvents"])
    random.Random(1).shuffle(shuffled)
    again = kineto.parse_trace({"traceEvents": shuffled}, ["forward", "backward"], transparent=COMPOSITE.__contains__)
    by_start = sorted(profile.work, key=lambda w: w.start)
    assert sorted(again.work, key=lambda w: w.start) == by_start
    assert (again.busy, again.memory_peak, again.phases) == (profile.busy, profile.memory_peak, profile.phases)


def test_nodes_of_autograd_and_annotations_own_nothing(trace: dict[str, Any], profile: kineto.Profile) -> None:
    """They are listed among the calls, around them: with shapes recorded half of a step's kernels were theirs."""
    names = (
        "autograd::engine::evaluate_function: EmbeddingBackward0",
        "EmbeddingBackward0",
        "CompiledFunctionBackward",
    )
    nodes = [
        {"ph": "X", "cat": "cpu_op", "name": name, "pid": 100, "tid": 101, "ts": 1490.0 + i, "dur": 300.0 - 2 * i}
        for i, name in enumerate(names)
    ]
    again = kineto.parse_trace(
        {"traceEvents": [*trace["traceEvents"], *nodes]}, ["forward", "backward"], transparent=COMPOSITE.__contains__
    )
    assert (again.work, again.calls) == (profile.work, profile.calls)


def test_generated_kernels_and_collectives_have_owners(trace: dict[str, Any]) -> None:
    """Compiled code launches its kernels from no operator; NCCL's are inside the collective's, which owns no others."""
    renamed = {"gemm_128x128": "triton_poi_fused_add_0", "aten::linear": "CompiledFunction", "aten::mm": "Call Triton"}
    events = [{**e, "name": renamed.get(e["name"], e["name"])} for e in trace["traceEvents"]]
    assert "inductor::pointwise" in {w.call for w in kineto.parse_trace({"traceEvents": events}, []).work}
    renamed = {"aten::linear": "c10d::allreduce_", "aten::mm": "record_param_comms", "aten::zeros": "c10d::barrier"}
    events = [{**e, "name": renamed.get(e["name"], e["name"])} for e in trace["traceEvents"]]
    found = kineto.parse_trace({"traceEvents": events}, []).work
    assert {w.name: w.call for w in found if w.kind == "kernel"}["gemm_128x128"] == "c10d::allreduce_"


def test_a_fill_beside_kernels_of_the_same_call_only_helps_them(trace: dict[str, Any], profile: kineto.Profile) -> None:
    """cuBLAS clears a counter before a product; the `zero_` inside an embedding's backward is asked for."""
    assert [w.helps for w in profile.work if w.kind == "memset"] == [False]
    direct = [e for e in trace["traceEvents"] if e["name"] not in ("aten::zeros", "aten::zero_")]
    found = kineto.parse_trace({"traceEvents": direct}, ["forward", "backward"], transparent=COMPOSITE.__contains__)
    assert [(w.helps, w.is_kernel) for w in found.work if w.kind == "memset"] == [(True, False)]
    assert sum(w.is_kernel for w in found.work) == sum(w.is_kernel for w in profile.work) - 1


def test_times_since_1970_keep_their_digits(trace: dict[str, Any], profile: kineto.Profile) -> None:
    """Older traces count from there: in seconds, a double would tell them to a quarter of a microsecond."""
    late = [{**e, "ts": e["ts"] + 1_689_180_448_554_878} for e in trace["traceEvents"] if "ts" in e]
    again = kineto.parse_trace({"traceEvents": late}, ["forward", "backward"], transparent=COMPOSITE.__contains__)
    assert again.busy == pytest.approx(profile.busy, rel=1e-6)


def test_a_step_is_traced_from_an_idle_device(trace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what the step before left in flight is in the trace; nor may it end before the device does."""
    torch = pytest.importorskip("torch")
    from validate.measuring import profile as module

    done: list[str] = []

    class Profiler:
        def __init__(self, **options: Any) -> None:
            assert torch.profiler.ProfilerActivity.CUDA in options["activities"]

        def __enter__(self) -> "Profiler":
            done.append("start")
            return self

        def __exit__(self, *failure: object) -> None:
            done.append("stop")

        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps(trace))

    program = SimpleNamespace(device="cuda", step=lambda around: done.append("step"))
    monkeypatch.setattr(module, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    found = module.profile_step(program)  # type: ignore[arg-type]
    assert done == ["synchronize", "start", "step", "synchronize", "stop"]
    assert len(found.work) == 5


def test_union_of_intervals() -> None:
    """By hand: nested, overlapping, touching and apart."""
    assert kineto.union([]) == 0
    assert kineto.union([(0, 10), (2, 3), (9, 12), (12, 13), (20, 21)]) == 14
