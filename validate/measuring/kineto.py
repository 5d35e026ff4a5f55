"""What a Chrome trace of torch.profiler (Kineto) says about a step: device kernels, copies, ATen calls, memory.

A device event carries the correlation id of the runtime call that launched it. That call ran on the host at a time
that lies in a phase (a user annotation) and inside an ATen call, so both are known for every kernel however late it
ran. Work whose launch is not in the trace was in flight when the trace began: its number is told, and no more.

**Helpers.** A library's product is one kernel, whatever else the library launches for it: on Hopper cuBLAS clears a
counter of 4 B first (168 of the 169 products of a Qwen1.5 forward; 0.9 us, and 1.8 us more of gaps, where the product
took 32), and where it splits the inner dim a kernel adds the parts. So does a `Memset` that any ATen call launches
besides kernels (a reduction's semaphores, a convolution's sum) belong to those. Whether it happens is the library's
choice and not the program's: helpers are no kernels, neither here nor in `perfmodel.calls.costs.kernels`, but their
time is the call's, as in the prices, where bf16 products were fitted to latencies of whole calls. A fill that is all an
ATen call does (the `zero_` inside `zeros`) is what the program asked for, and counts like a kernel.

Times in a trace are microseconds; everything returned is in seconds and bytes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .names import adds_parts, generated, is_collective, is_operator

Event = dict[str, Any]

DEVICE_WORK = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}  # category -> kind
RUNTIME = ("cuda_runtime", "cuda_driver")
LAUNCHES = ("Launch", "Memcpy", "Memset")  # in the names of the runtime's calls that ask for work
NCCL, GLOO = "nccl", "gloo:"  # begin the names of NCCL's kernels, and of what gloo's threads mark in a trace
NO_PHASE = "outside"
MICRO = 1e-6


@dataclass(frozen=True)
class Work:
    """One kernel, copy or fill on a device stream, with where it came from on the host.

    Attributes:
        kind: kernel, memcpy or memset.
        start: since the first event of the trace.
        phase: the annotation in which it was launched.
        call: the ATen call or package's operator that launched it; empty if none did.
        nbytes: of a copy or fill.
        helps: whether it only helps a kernel of the same call.
    """

    kind: str
    name: str
    stream: int
    start: float
    seconds: float
    phase: str
    call: str
    nbytes: int = 0
    helps: bool = False

    @property
    def is_kernel(self) -> bool:
        """Whether it counts as a kernel: one, or a copy or fill that a program's step could as well do in one."""
        return not (self.helps or self.crosses_bus)

    @property
    def crosses_bus(self) -> bool:
        """Whether it is a copy between host and device."""
        return self.kind == "memcpy" and "DtoD" not in self.name


@dataclass(frozen=True)
class ProfiledCall:
    """An ATen call or package's operator on the host; `self_seconds` leaves out those inside it."""

    name: str
    phase: str
    start: float
    seconds: float
    self_seconds: float
    outermost: bool


@dataclass
class Profile:
    """A parsed trace.

    Attributes:
        work: what was launched in the trace.
        phases: phase -> seconds on the host.
        launches: the runtime's calls that ask for work (launch, copy, fill): name -> (number, seconds on the host).
        memory_peak: highest sum of allocations less frees since the trace began, bytes.
        exchanging: seconds in which at least one collective is under way, from its start to its end on this rank.
        unlaunched: kernels, copies and fills whose launch is not in the trace.
    """

    work: list[Work] = field(default_factory=list)
    calls: list[ProfiledCall] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    launches: dict[str, tuple[int, float]] = field(default_factory=dict)
    memory_peak: int = 0
    exchanging: float = 0.0
    unlaunched: int = 0

    @property
    def busy(self) -> float:
        """Seconds in which at least one stream of the device works."""
        return union((w.start, w.start + w.seconds) for w in self.work)

    @property
    def span(self) -> float:
        """Seconds from the start of the device's first work to the end of its last."""
        ends = [w.start + w.seconds for w in self.work]
        return max(ends) - min(w.start for w in self.work) if ends else 0.0


def parse_trace(
    trace: dict[str, Any], phases: Sequence[str], *, transparent: Callable[[str], bool] = lambda name: False
) -> Profile:
    """Read a Chrome trace.

    Args:
        trace: the parsed JSON, with `traceEvents`.
        phases: names of the user annotations that mark phases.
        transparent: whether an operator only calls others (composite ops), so that kernels belong to those.
    """
    events = _since_the_first(e for e in trace["traceEvents"] if e.get("ph") in ("X", "i"))
    marks = [e for e in _of(events, "user_annotation") if e["name"] in phases]
    spans = [(e["ts"], _end(e), e["name"]) for e in sorted(marks, key=lambda e: (e["ts"], -_end(e)))]
    profile = Profile()
    for start, stop, name in spans:
        profile.phases[name] = profile.phases.get(name, 0.0) + (stop - start) * MICRO
    stacks = _Stacks(e for e in _of(events, "cpu_op") if is_operator(e["name"]))
    profile.calls = [
        ProfiledCall(e["name"], _phase(e["ts"], spans), e["ts"] * MICRO, e["dur"] * MICRO, own * MICRO, top)
        for e, own, top in stacks.calls()
    ]
    runtime = [e for e in events if e.get("cat") in RUNTIME]
    profile.launches = _launches(runtime)
    launches = {e["args"]["correlation"]: e for e in runtime if "correlation" in e["args"]}
    found = [e for e in events if e.get("cat") in DEVICE_WORK]
    launched = [(e, launches[e["args"]["correlation"]]) for e in found if e["args"].get("correlation") in launches]
    profile.unlaunched = len(found) - len(launched)
    profile.work = _work(launched, spans, stacks, transparent)
    profile.memory_peak = _memory_peak(events)
    collectives = [e for e in _of(events, "kernel") if e["name"].startswith(NCCL)]
    collectives += [e for e in _of(events, "user_annotation") if e["name"].startswith(GLOO)]
    profile.exchanging = union((e["ts"], _end(e)) for e in collectives) * MICRO
    return profile


def _since_the_first(events: Iterable[Event]) -> list[Event]:
    """Events on a clock that starts with them: microseconds since 1970 leave a quarter of one to their digits."""
    found = list(events)
    origin = min((float(e["ts"]) for e in found), default=0.0)
    return [{**e, "ts": float(e["ts"]) - origin} for e in found]


def _launches(runtime: list[Event]) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for event in runtime:
        if any(part in event["name"] for part in LAUNCHES):
            number, seconds = found.get(event["name"], (0, 0.0))
            found[event["name"]] = number + 1, seconds + float(event["dur"]) * MICRO
    return found


def _work(
    launched: list[tuple[Event, Event]],
    spans: list[tuple[float, float, str]],
    stacks: "_Stacks",
    transparent: Callable[[str], bool],
) -> list[Work]:
    """Device events, each with its launch, as work."""
    around = [stacks.around(launch) for _, launch in launched]
    with_kernels = {
        id(calls[0]) for (e, _), calls in zip(launched, around, strict=True) if calls and e["cat"] == "kernel"
    }  # fmt: skip
    work = []
    for (event, launch), calls in zip(launched, around, strict=True):
        kind, args = DEVICE_WORK[event["cat"]], event["args"]
        fills = kind == "memset" and bool(calls) and id(calls[0]) in with_kernels
        work.append(Work(
            kind, event["name"], int(args.get("stream", -1)), event["ts"] * MICRO, float(event["dur"]) * MICRO,
            _phase(launch["ts"], spans), _owner(event["name"], [c["name"] for c in calls], transparent),
            int(args.get("bytes", 0)), fills or adds_parts(event["name"]),
        ))  # fmt: skip
    return work


def _owner(kernel: str, calls: list[str], transparent: Callable[[str], bool]) -> str:
    """The call that a kernel belongs to: the outermost around its launch that does not only call others.

    Args:
        calls: operators around the launch, innermost first. If all only call others the innermost one launched it:
            NCCL's kernels belong to the collective.
    """
    opaque = [name for name in calls if not (transparent(name) or is_collective(name))]
    return opaque[-1] if opaque else generated(kernel) or (calls[0] if calls else "")


def _of(events: list[Event], category: str) -> list[Event]:
    return [e for e in events if e.get("cat") == category]


def _end(event: Event) -> float:
    return float(event["ts"]) + float(event.get("dur", 0.0))


def _phase(ts: float, spans: list[tuple[float, float, str]]) -> str:
    """The innermost phase at a time of the host's clock (on any thread: backward has threads of its own)."""
    for start, stop, name in reversed(spans):
        if start <= ts <= stop:
            return name
    return NO_PHASE


class _Stacks:
    """Operators by thread, nested as their times nest."""

    def __init__(self, calls: Iterable[Event]) -> None:
        self.threads: dict[Any, _Thread] = {}
        for event in sorted(calls, key=lambda e: (e["ts"], -float(e["dur"]))):
            self.threads.setdefault(event["tid"], _Thread()).add(event)

    def calls(self) -> Iterator[tuple[Event, float, bool]]:
        """(call, microseconds without the calls inside it, whether it is inside none)."""
        for thread in self.threads.values():
            yield from zip(thread.events, thread.own, (parent < 0 for parent in thread.parents), strict=True)

    def around(self, launch: Event) -> list[Event]:
        """The calls in which a launch happens, innermost first."""
        thread = self.threads.get(launch["tid"])
        return thread.around(launch["ts"]) if thread else []


class _Thread:
    """The calls of one thread in order of their start, each with the call that it is inside of."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.starts: list[float] = []
        self.parents: list[int] = []  # index of the call around it, -1 for none
        self.own: list[float] = []  # microseconds without the calls inside

    def add(self, event: Event) -> None:
        """Append a call; it starts no earlier than those before, and before those inside it."""
        start, parent = event["ts"], len(self.events) - 1
        while parent >= 0 and _end(self.events[parent]) <= start:
            parent = self.parents[parent]
        if parent >= 0:
            self.own[parent] -= float(event["dur"])
        self.events.append(event)
        self.starts.append(start)
        self.parents.append(parent)
        self.own.append(float(event["dur"]))

    def around(self, ts: float) -> list[Event]:
        """The calls that run at a time, innermost first."""
        found, at = [], bisect_right(self.starts, ts) - 1
        while at >= 0:
            if ts <= _end(self.events[at]):
                found.append(self.events[at])
            at = self.parents[at]
        return found


def _memory_peak(events: list[Event]) -> int:
    """Highest running sum of the allocator's events, which are bytes taken (positive) or given back; a GPU's if any.

    Without what gloo takes for itself, as NCCL's buffers are in no allocator: its threads gather into a buffer of their
    own, and it reduces and scatters a clone (ProcessGroupGloo.cpp of PyTorch).
    """
    found = [e for e in events if e["name"] == "[memory]"]
    device = max((e["args"].get("Device Type", 0) for e in found), default=0)  # 0 is the CPU
    threads = {e["tid"] for e in _of(events, "user_annotation") if e["name"].startswith(GLOO)}
    exchanging = _Stacks(e for e in _of(events, "cpu_op") if threads and e["name"].startswith("c10d::"))
    not_ours: set[int] = set()  # addresses
    live = peak = 0
    for event in sorted(found, key=lambda e: e["ts"]):
        nbytes, address = int(event["args"]["Bytes"]), event["args"].get("Addr")
        if event["args"].get("Device Type", 0) != device:
            continue
        if nbytes > 0 and threads and (event["tid"] in threads or exchanging.around(event)):
            not_ours.add(address)
        elif address in not_ours:
            not_ours.remove(address)
        else:
            live += nbytes
            peak = max(peak, live)
    return peak


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of a union of intervals."""
    total, until = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, until))
        until = max(until, stop)
    return total
