"""What a Chrome trace of torch.profiler (Kineto) says about a step: device kernels, copies, ATen calls, memory.

A device event carries the correlation id of the runtime call that launched it. That call ran on the host at a time that
lies in a phase (a user annotation) and inside an ATen call, so both are known for every kernel however late it ran.

Times in a trace are microseconds; everything returned is in seconds and bytes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]

DEVICE_WORK = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}  # category -> kind
RUNTIME = ("cuda_runtime", "cuda_driver")
NO_PHASE = "outside"
MICRO = 1e-6


@dataclass(frozen=True)
class Work:
    """One kernel, copy or fill on a device stream, with where it came from on the host.

    Attributes:
        kind: kernel, memcpy or memset.
        start, seconds: on the trace's clock.
        phase: the annotation in which it was launched.
        call: the ATen call that launched it; empty if none did.
        nbytes: of a copy or fill.
    """

    kind: str
    name: str
    stream: int
    start: float
    seconds: float
    phase: str
    call: str
    nbytes: int = 0

    @property
    def crosses_bus(self) -> bool:
        """Whether it is a copy between host and device; all else a program's step could as well do in a kernel."""
        return self.kind == "memcpy" and "DtoD" not in self.name


@dataclass(frozen=True)
class Call:
    """An ATen call on the host; `self_seconds` leaves out the ATen calls inside it."""

    name: str
    phase: str
    start: float
    seconds: float
    self_seconds: float
    outermost: bool


@dataclass
class Profile:
    """A parsed trace."""

    work: list[Work] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)  # phase -> seconds on the host
    memory_peak: int = 0  # highest sum of allocations less frees since the trace began, bytes
    unlaunched: int = 0  # device events whose launch is not in the trace

    @property
    def busy(self) -> float:
        """Seconds in which at least one stream of the device works."""
        return union((w.start, w.start + w.seconds) for w in self.work)


def parse(
    trace: dict[str, Any], phases: Sequence[str], *, transparent: Callable[[str], bool] = lambda name: False
) -> Profile:
    """Read a Chrome trace.

    Args:
        trace: the parsed JSON, with `traceEvents`.
        phases: names of the user annotations that mark phases.
        transparent: whether an ATen call only calls others (composite ops), so that kernels belong to those.
    """
    events = [e for e in trace["traceEvents"] if e.get("ph") in ("X", "i")]
    spans = sorted((float(e["ts"]), _end(e), e["name"]) for e in _of(events, "user_annotation") if e["name"] in phases)
    profile = Profile()
    for start, stop, name in spans:
        profile.phases[name] = profile.phases.get(name, 0.0) + (stop - start) * MICRO
    stacks = _Stacks(_of(events, "cpu_op"))
    profile.calls = [
        Call(e["name"], _phase(float(e["ts"]), spans), e["ts"] * MICRO, e["dur"] * MICRO, own * MICRO, top)
        for e, own, top in stacks.calls()
    ]
    launches = {e["args"]["correlation"]: e for e in events if e.get("cat") in RUNTIME and "correlation" in e["args"]}
    for event in events:
        kind = DEVICE_WORK.get(event.get("cat", ""))
        if kind is None:
            continue
        launch = launches.get(event["args"].get("correlation"))
        profile.unlaunched += launch is None
        profile.work.append(_work(event, kind, launch, spans, stacks, transparent))
    profile.memory_peak = _memory_peak(events)
    return profile


def _work(
    event: Event,
    kind: str,
    launch: Event | None,
    spans: list[tuple[float, float, str]],
    stacks: "_Stacks",
    transparent: Callable[[str], bool],
) -> Work:
    at = float((launch or event)["ts"])
    call = "" if launch is None else stacks.caller(launch, transparent)
    args = event["args"]
    return Work(
        kind, event["name"], int(args.get("stream", -1)), float(event["ts"]) * MICRO, float(event["dur"]) * MICRO,
        _phase(at, spans), call, int(args.get("bytes", 0)),
    )  # fmt: skip


def _of(events: list[Event], category: str) -> list[Event]:
    return [e for e in events if e.get("cat") == category]


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event.get("dur", 0.0))


def _phase(ts: float, spans: list[tuple[float, float, str]]) -> str:
    """The phase at a time of the host's clock (on any thread: backward has threads of its own)."""
    for start, stop, name in spans:
        if start <= ts <= stop:
            return name
    return NO_PHASE


class _Stacks:
    """ATen calls by thread, nested as their times nest."""

    def __init__(self, calls: list[Event]) -> None:
        self.threads: dict[Any, _Thread] = {}
        for event in sorted(calls, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
            self.threads.setdefault(event["tid"], _Thread()).add(event)

    def calls(self) -> Iterator[tuple[Event, float, bool]]:
        """(call, microseconds without the calls inside it, whether it is inside none)."""
        for thread in self.threads.values():
            yield from zip(thread.events, thread.own, (parent < 0 for parent in thread.parents), strict=True)

    def caller(self, launch: Event, transparent: Callable[[str], bool]) -> str:
        """The outermost ATen call around a launch that is not transparent; the innermost one if all are."""
        thread = self.threads.get(launch["tid"])
        around = thread.around(float(launch["ts"])) if thread else []
        opaque = [name for name in around if not transparent(name)]
        return opaque[-1] if opaque else around[0] if around else ""


class _Thread:
    """The calls of one thread in order of their start, each with the call that it is inside of."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.starts: list[float] = []
        self.parents: list[int] = []  # index of the call around it, -1 for none
        self.own: list[float] = []  # microseconds without the calls inside

    def add(self, event: Event) -> None:
        """Append a call; it starts no earlier than those before, and before those inside it."""
        start, parent = float(event["ts"]), len(self.events) - 1
        while parent >= 0 and _end(self.events[parent]) <= start:
            parent = self.parents[parent]
        if parent >= 0:
            self.own[parent] -= float(event["dur"])
        self.events.append(event)
        self.starts.append(start)
        self.parents.append(parent)
        self.own.append(float(event["dur"]))

    def around(self, ts: float) -> list[str]:
        """Names of the calls that run at a time, innermost first."""
        found, at = [], bisect_right(self.starts, ts) - 1
        while at >= 0:
            if ts <= _end(self.events[at]):
                found.append(str(self.events[at]["name"]))
            at = self.parents[at]
        return found


def _memory_peak(events: list[Event]) -> int:
    """Highest running sum of the allocator's events, which are bytes taken (positive) or given back."""
    live = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: float(e["ts"])):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of a union of intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total
