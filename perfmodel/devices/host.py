"""What the host spends on dispatching a step: Python, autograd and the launch, in seconds."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..calls.costs import by_lists
from ..errors import UserError, check_kind, nearest
from ..program.op import Op
from ..program.part import HostWork, Part
from ..resources import DATA, is_file, mapping, read_toml, stems
from ..values import immutable
from . import own

if TYPE_CHECKING:
    from .profile import DeviceProfile

HOSTS = DATA / "hosts"
LONGEST = 1.0  # seconds: no call takes so long
USUAL = "epyc-genoa"  # the host of a device that names none
SLOWEST = 100.0  # times as slow as a bundled host
PYTHON = {  # cost -> what of a part's `HostWork` costs it, in forward and backward
    "module": "modules", "adapter": "adapters", "node": "nodes", "checkpoint": "checkpoints", "hook": "hooks",
    "search": "searched",
}  # fmt: skip
ENGINE = {  # the same of a training engine
    "fetch": "weights", "release": "returns", "reduce": "gradients", "wrap": "units",
}  # fmt: skip
EAGER = PYTHON | ENGINE
BESIDE = {"node": "nodes", "search": "searched", "reduce": "gradients", "wrap": "units"}  # what compiled code leaves


class HostCalls(NamedTuple):
    """What the host sees of one run of a part.

    Attributes:
        work: what it does besides calls.
        launched, views, generated: of each call whether it launches something, is a view, is one of Inductor's kernels.
        tensors: parameters in the Python code around each call, where calls are on lists.
    """

    phase: str
    compiled: bool
    captured: bool
    work: HostWork
    launched: np.ndarray
    views: np.ndarray
    generated: np.ndarray
    tensors: np.ndarray | None

    @classmethod
    def of(cls, part: Part) -> "HostCalls":
        """Look at a part."""
        ops = part.ops
        in_lists = not part.compiled and part.phase == "optimizer" and any(by_lists(op) for op in ops)
        return cls(
            part.phase, part.compiled, part.captured, part.host,
            np.array([op.launched for op in ops], dtype=bool), np.array([op.view for op in ops], dtype=bool),
            np.array([part.compiled and _generated(op) for op in ops], dtype=bool),
            np.array([_tensors(op) for op in ops]) if in_lists else None,
        )  # fmt: skip


@immutable
class Host:
    """Host costs in seconds; they belong to the machine's CPU and Python, not to its GPU.

    A default stands where a host's file has no figure of its own; what it rests on is written beside it.

    Attributes:
        call: an ATen call in forward: Python, dispatcher, autograd node.
        view: a view in forward.
        backward_call: an ATen call inside a backward node (C++, no Python).
        backward_view: a view inside a backward node.
        node: the engine's work for one backward node.
        module: one `nn.Module.__call__` with the Python code of its forward.
        adapter: the extra Python code of one PEFT layer.
        checkpoint: one call of `torch.utils.checkpoint`.
        hook: one Python hook on a saved tensor (non-reentrant checkpoints pack, recompute and unpack each).
        tensor: one parameter in the Python code around a list-wise optimizer or clipping.
        loop_call: a call in a Python loop over single tensors (AdamW on a CPU, some optimizers of methods).
        update: what clipping, an optimizer's step and `zero_grad` take of Python however few the parameters are; where
            a file has none, it is in the costs of the calls.
        optimizer_call: a call of a list-wise optimizer (foreach, fused), of clipping, or of a library's own kernel.
        launch_call: the driver call that launches one kernel (CUDA only).
        launch: from the launch on the host to the start on the device.
        graph_launch: one launch of a whole CUDA graph.
        compiled_kernel: a Triton kernel's call in the code that Inductor writes, without the driver's launch.
        compiled_graph: entering a compiled graph: wrappers of Dynamo, AOTAutograd and Inductor.
        guard: what Dynamo asks about one module before it reuses its code.
        search: a look at one node of the graph, where DDP searches for what gets no gradient.
        fetch: what an engine's hooks around a module's forward do with one of its parameters
            (`perfmodel.devices.engine`); release: those around its backward; reduce: its hook on one complete gradient;
            settle: its work on one trained parameter in the update; wrap: those around a unit of parameters that are
            gathered together, forward or backward.
    """

    name: str
    call: float
    view: float
    backward_call: float
    backward_view: float
    node: float
    module: float
    adapter: float
    checkpoint: float
    hook: float
    tensor: float
    loop_call: float
    optimizer_call: float
    launch_call: float
    launch: float
    graph_launch: float
    source: str = ""
    # github.com/meta-pytorch/tritonbench/pull/1017: 6.8 to 9.1 us a Triton kernel, of which the driver 3.0; 44.3 us a
    # compiled call of one such kernel
    compiled_kernel: float = 5e-6
    compiled_graph: float = 36e-6
    # github.com/pytorch/pytorch/issues/191753: 0.76 ms of cache lookup and 0.13 ms before the graph for Qwen3-8B, whose
    # 36 layers have 14 modules each
    guard: float = 1.8e-6
    # `prepare_for_backward` with and without a search, PyTorch 2.13 on an Intel Xeon, 2026-11-30, graphs of Llama:
    # 0.12 us a node of 300, 0.27 of 2,300, 0.43 of 7,000, which no longer lie in a cache
    search: float = 0.25e-6
    update: float = 0.0
    fetch: float = 0.0
    release: float = 0.0
    reduce: float = 0.0
    settle: float = 0.0
    wrap: float = 0.0

    def slower(self, times: float) -> "Host":
        """A machine on which every cost is so many times as high."""
        return replace(self, **{cost: getattr(self, cost) * times for cost in COSTS})

    def dispatch(self, part: Part, device: str) -> np.ndarray:
        """Host seconds before each op of one run of a part, shape (ops,); Python's share is spread evenly."""
        return self.dispatched(HostCalls.of(part), device)

    def dispatched(self, calls: HostCalls, device: str) -> np.ndarray:
        """The same of what the host sees of a part."""
        if calls.compiled:
            return self._compiled(calls, device)
        if calls.tensors is not None:
            call = view = self.optimizer_call
            python = self.update * calls.work.updates
        elif calls.phase == "optimizer":  # a Python loop over tensors, without autograd
            call, view = self.loop_call, self.view
            python = self.settle * calls.work.gradients + self.update * calls.work.updates
        else:
            forward = calls.phase == "forward"
            call, view = (self.call, self.view) if forward else (self.backward_call, self.backward_view)
            python = self._python(calls.work, EAGER)
        launching = call + (self.launch_call if device == "cuda" else 0.0)
        seconds = np.where(calls.launched, launching, np.where(calls.views, view, call))
        if calls.tensors is not None:
            seconds += self.tensor * calls.tensors
        return seconds + python / max(1, len(seconds))

    def _python(self, work: HostWork, costs: Mapping[str, str]) -> float:
        """Seconds of a run of a part besides its calls."""
        seconds: float = sum(getattr(self, cost) * getattr(work, count) for cost, count in costs.items())
        return seconds

    def _compiled(self, calls: HostCalls, device: str) -> np.ndarray:
        """The same for compiled code: guards and wrappers first, then the calls one after another.

        What hooks of several GPUs do beside it is Python's work, spread evenly. A library's kernel costs what it costs
        in eager mode: `extern_kernels.mm` with its buffer took 0.96 of `torch.mm` where both were measured.
        """
        seconds = np.zeros(len(calls.launched))
        on_gpu = device == "cuda"
        if not (calls.captured and on_gpu):
            launch = np.where(calls.launched, self.launch_call if on_gpu else 0.0, 0.0)
            call = np.where(calls.views, self.view, self.call)
            seconds += np.where(calls.generated, self.compiled_kernel, call) + launch
        seconds += self._python(calls.work, BESIDE) / max(1, len(seconds))
        if calls.phase == "forward":
            seconds[0] += self.guard * calls.work.modules
        captured = self.graph_launch if calls.captured and on_gpu else 0.0
        seconds[0] += calls.work.graphs * (self.compiled_graph + captured)
        return seconds


COSTS = {f.name: f for f in fields(Host) if f.type in (float, "float")}


def _generated(op: Op) -> bool:
    return op.name.startswith("inductor::")


def _tensors(op: Op) -> int:
    """Tensors that the optimizer's Python code touches for one list op (the first list's length)."""
    return sum(s.copies for s in op.outputs) if op.name.startswith(("_foreach", "_fused")) else 0


GivenHost = str | PathLike[str] | Host


@cache
def names() -> tuple[str, ...]:
    """The bundled hosts."""
    return stems(HOSTS, ".toml")


def load(name_or_path: str | PathLike[str] = "default") -> Host:
    """A host by bundled name, by the name of an own one (`perfmodel calibrate`), or by the path of a TOML file.

    "default" is the usual one, as no device is known here.

    Raises:
        UserError: unknown name, broken TOML, a missing, mistyped or negative figure.
    """
    check_kind("host", name_or_path, (str, PathLike), "a name, the path of a TOML, or a Host")
    text = str(name_or_path)
    if text in ("default", *names()):
        return _bundled(USUAL if text == "default" else text)
    mine = own.find(text, "hosts")
    if mine is None and not is_file(text):
        known = ["default", *names(), *own.calibrated("hosts")]
        raise UserError(f"unknown host {text!r}: {nearest(text, known)} (or give a path)")
    return _read(mine or Path(text))


@cache
def _bundled(name: str) -> Host:
    return _read(HOSTS / f"{name}.toml")


def _read(path: Path) -> Host:
    """A file either holds the seconds, or `like` and `slower`: a bundled host's, each so many times as long."""
    values = read_toml(path)
    name, source = str(values.get("name", path.stem)), str(values.get("source", ""))
    if "like" in values:
        like, slower = str(values["like"]), values.get("slower")
        if like not in names():
            raise UserError(f"{path}: like must be a bundled host, got {like!r}: {nearest(like, names())}")
        if isinstance(slower, bool) or not isinstance(slower, (int, float)) or not 0 < slower <= SLOWEST:
            raise UserError(f"{path}: slower must be a number of times above 0 and up to {SLOWEST}, got {slower!r}")
        return replace(_bundled(like).slower(slower), name=name, source=source)
    seconds = mapping(values.get("seconds"), f"{path}: [seconds]")
    costs = {}
    for f in COSTS.values():
        value = seconds.get(f.name, None if f.default is MISSING else f.default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LONGEST:
            raise UserError(f"{path}: [seconds] {f.name} must be a number of seconds from 0 to below 1, got {value!r}")
        costs[f.name] = float(value)
    return Host(name=name, source=source, **costs)


def host_of(host: GivenHost, on: "DeviceProfile") -> Host:
    """The host that a name, path or `Host` stands for; "default" is the one that goes with the device.

    An own device's was made beside it by `perfmodel calibrate`; where that file is gone it is the usual one.

    Raises:
        UserError: as `load`.
    """
    if isinstance(host, Host):
        return host
    if not isinstance(host, str) or host != "default":
        return load(host)
    goes_along = on.host in names() or own.find(on.host, "hosts") is not None
    return load(on.host if goes_along else USUAL)
