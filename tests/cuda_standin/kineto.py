"""The trace of a profiler on a GPU: the real one of the host, and what the stand-in did, as Kineto writes it.

PyTorch's own trace holds the calls that a program makes and, inside each, those with which a fake tensor finds its
shape; these are taken out. Every span in which the device was given work becomes a launch on the host, and a kernel, a
fill or a copy on stream 7. Autograd's nodes move to a thread of their own, where the engine of a GPU runs them.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

from .gpu import Launch
from .tensors import MARK

Event = dict[str, Any]
FAKE = ("PythonSubclass", "PythonDispatchMode")  # spans of calls on fake tensors
NODE = "autograd::engine::evaluate_function"
STREAM = 7
FIRST = 8001  # correlation
LAUNCH_US = 2.0  # of a runtime call
GEMMS = ("mm", "addmm", "bmm", "baddbmm")
FILLED_FIRST = 1e8  # FLOP-like size from which a library's GEMM on Hopper zeroes a semaphore first


class Spans:
    """Spans that do not overlap, by time."""

    def __init__(self, spans: Sequence[tuple[float, float]]) -> None:
        self.spans: list[tuple[float, float]] = []
        for start, stop in sorted(spans):
            if not self.spans or start > self.spans[-1][1]:
                self.spans.append((start, stop))
        self.starts = [start for start, _ in self.spans]

    def hold(self, ts: float) -> bool:
        """Whether a time lies in one."""
        at = bisect_right(self.starts, ts) - 1
        return at >= 0 and ts <= self.spans[at][1]


def with_device(trace: dict[str, Any], launches: Sequence[Launch], in_flight_s: float, fills: bool) -> dict[str, Any]:
    """The trace with the work of the device.

    Args:
        launches: by the number in the name of their span.
        in_flight_s: seconds of work that was queued before the profiler began: its launches are not in the trace.
        fills: whether large products are preceded by a fill (Hopper).
    """
    events = trace["traceEvents"]
    host = [e for e in events if e.get("ph") == "X"]
    fake = Spans([_span(e) for e in host if e["name"] in FAKE])
    nodes = Spans([_span(e) for e in host if e["name"].startswith(NODE)])
    kept = [e for e in events if e.get("ph") != "X" or not (_marked(e) or fake.hold(float(e["ts"])))]
    for e in kept:
        if e.get("cat") == "cpu_op" and nodes.hold(float(e["ts"])):
            e["tid"] += 1
    marks = sorted((e for e in host if _marked(e)), key=lambda e: float(e["ts"]))
    begin = min((float(e["ts"]) for e in host), default=0.0)
    device = list(_device(marks, launches, begin, in_flight_s * 1e6, nodes, fills))
    return {**trace, "traceEvents": [*kept, *device]}


def _device(
    marks: list[Event], launches: Sequence[Launch], begin: float, in_flight: float, nodes: Spans, fills: bool
) -> Iterator[Event]:
    """Launches and device work in order; a kernel starts when the one before has ended."""
    free, correlation = begin, FIRST
    if in_flight:
        yield _work("kernel", "left_over", begin, in_flight, FIRST - 1)
        free += in_flight
    numbers = [int(mark["name"].removeprefix(MARK)) for mark in marks]
    for mark, number, following in zip(marks, numbers, [*numbers[1:], len(launches)], strict=True):
        if number == following:  # a view
            continue
        launch, at = launches[number], float(mark["ts"])
        tid = mark["tid"] + nodes.hold(at)
        each = launch.seconds * 1e6 / launch.number
        filled = fills and launch.kind == "kernel" and launch.call in GEMMS and each > 1e6 * FILLED_FIRST / 1e15
        if filled:
            yield _runtime("cudaMemsetAsync", mark["pid"], tid, at, correlation)
            free = max(free, at + LAUNCH_US)
            yield _work("gpu_memset", "Memset (Device)", free, 0.9, correlation, bytes=4)
            free, correlation = free + 0.9, correlation + 1
        for _ in range(launch.number):
            copies = launch.kind != "kernel"
            name = "cudaMemcpyAsync" if copies else "cudaLaunchKernel"
            yield _runtime(name, mark["pid"], tid, at, correlation)
            free = max(free, at + LAUNCH_US)
            category = "gpu_memcpy" if copies else "kernel"
            text = _copy_name(launch.kind) if copies else f"kernel_of_{launch.call}"
            yield _work(category, text, free, each, correlation, **({"bytes": launch.nbytes} if copies else {}))
            free, correlation = free + each, correlation + 1


def _copy_name(direction: str) -> str:
    return {"HtoD": "Memcpy HtoD (Pageable -> Device)", "DtoH": "Memcpy DtoH (Device -> Pageable)"}[direction]


def _span(e: Event) -> tuple[float, float]:
    return float(e["ts"]), float(e["ts"]) + float(e["dur"])


def _marked(e: Event) -> bool:
    return str(e["name"]).startswith(MARK)


def _runtime(name: str, pid: int, tid: int, ts: float, correlation: int) -> Event:
    args = {"cbid": 211, "correlation": correlation}
    return {
        "ph": "X", "cat": "cuda_runtime", "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": LAUNCH_US, "args": args
    }  # fmt: skip


def _work(category: str, name: str, ts: float, dur: float, correlation: int, **more: Any) -> Event:
    args = {"device": 0, "context": 1, "stream": STREAM, "correlation": correlation, **more}
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": STREAM, "ts": ts, "dur": dur, "args": args}
