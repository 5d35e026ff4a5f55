"""Puts the stand-in in place of the GPU, and takes it away again."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._foreach_utils as foreach
import transformers.utils.import_utils as transformers_imports
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity

from perfmodel.devices import host as hosts
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from validate.measuring import clocks

from . import runtime
from .gpu import Gpu
from .kineto import with_device
from .tensors import CUDA, Device, Placing

SMI = """#!/bin/sh
# nvidia-smi, as an old driver answers: one query at a time, an error for what it does not know
case "$*" in
  *--query-gpu=name\\ *) echo "{name}" ;;
  *--query-gpu=driver_version\\ *) echo "570.124.06" ;;
  *--query-gpu=clocks.max.sm\\ *) echo "{clock:.0f} MHz" ;;
  *--query-gpu=power.limit\\ *) echo "400.00 W" ;;
  *--query-gpu=mig.mode.current\\ *) echo "[N/A]" ;;
  *) echo "Field is not a valid field to query." >&2; exit 2 ;;
esac
"""


@contextmanager
def standin(on: DeviceProfile, name: str, *, by: Host | None = None, folder: Path | None = None) -> Iterator[Gpu]:
    """A GPU while the block runs.

    Args:
        on: what its work takes.
        name: what its driver calls it.
        by: the host that feeds it [default: the bundled one].
        folder: where an nvidia-smi is put; none without.
    """
    gpu = Gpu(name, on, by or hosts.load(), int(on.capacity))
    device = Device(gpu)
    with ExitStack() as stack:
        _runtime(gpu, stack)
        _profiler(gpu, stack)
        _program(device, stack)
        if folder:
            _nvidia_smi(gpu, folder, stack)
        placing = stack.enter_context(Placing(device, on.compute_capability))
        _autograd(placing, stack)
        yield gpu


def _runtime(gpu: Gpu, stack: ExitStack) -> None:
    here = runtime.Runtime(gpu)
    for name in runtime.NAMES:
        stack.enter_context(patch.object(torch.cuda, name, _noted(getattr(here, name), gpu)))
    stack.enter_context(patch.object(torch.version, "cuda", runtime.CUDA_VERSION))
    stack.enter_context(patch.object(torch.backends.cudnn, "version", lambda: runtime.CUDNN_VERSION))
    clock = SimpleNamespace(perf_counter=lambda: gpu.host_s, thread_time=time.thread_time)
    stack.enter_context(patch.object(clocks, "time", clock))


def _noted(function: Callable[..., Any], gpu: Gpu) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        gpu.asked = True
        return function(*args, **kwargs)

    return call


def _program(device: Device, stack: ExitStack) -> None:
    """What PyTorch and transformers ask of a tensor that is fake, they ask here of one on a GPU."""
    of_fake: Any = FakeTensor.device
    where = property(lambda x: of_fake.fget(x) if device.inside else CUDA)
    stack.enter_context(patch.object(FakeTensor, "device", where))
    stack.enter_context(patch.object(transformers_imports, "is_fake_tensor", lambda x: False))
    stack.enter_context(
        patch.object(foreach, "_foreach_supported_types", [*foreach._foreach_supported_types, FakeTensor])
    )
    address: Any = torch.UntypedStorage.data_ptr
    addressed = lambda s: s._cdata if s._cdata in device.gpu.storages else address(s)  # noqa: E731
    stack.enter_context(patch.object(torch.UntypedStorage, "data_ptr", addressed))
    grouped: Any = torch._C._group_tensors_by_device_and_dtype
    by_device = lambda lists, indices=False: _on_cuda(grouped(lists, indices))  # noqa: E731
    stack.enter_context(patch.object(torch._C, "_group_tensors_by_device_and_dtype", by_device))
    swap = torch.utils.swap_tensors
    stack.enter_context(patch.object(torch.utils, "swap_tensors", lambda a, b: _converted(a, b, swap)))
    plain = torch.autocast

    def autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return plain("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    stack.enter_context(patch.object(torch, "autocast", autocast))


def _autograd(placing: Placing, stack: ExitStack) -> None:
    """Backward runs Python too (hooks, what a checkpoint computes again), where PyTorch has left every mode."""
    run = torch.autograd._engine_run_backward

    def engine(*args: Any, **kwargs: Any) -> Any:
        with placing:
            return run(*args, **kwargs)

    stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", engine))


def _on_cuda(groups: dict[Any, Any]) -> dict[Any, Any]:
    """Lists of tensors by device and dtype: those of fake tensors are on the GPU."""
    return {
        (CUDA if any(isinstance(t, FakeTensor) for t in found[0][0]) else where, dtype): found
        for (where, dtype), found in groups.items()
    }


def _converted(old: torch.Tensor, new: torch.Tensor, swap: Any) -> None:
    """What `Module.to` does to a fake parameter: the new dtype's data, under the old name."""
    if isinstance(old, FakeTensor) and isinstance(new, FakeTensor):
        old.data = new.data
    else:
        swap(old, new)


def _profiler(gpu: Gpu, stack: ExitStack) -> None:
    cls = torch.profiler.profile
    init, start, stop, export = cls.__init__, cls.start, cls.stop, cls.export_chrome_trace

    def __init__(self: Any, *, activities: Any = None, **options: Any) -> None:
        self.of_device = ProfilerActivity.CUDA in set(activities or ())
        init(self, activities=[a for a in activities or () if a != ProfilerActivity.CUDA] or None, **options)

    def begin(self: Any) -> None:
        start(self)
        if self.of_device:
            gpu.begin_profile()

    def end(self: Any) -> None:
        gpu.profiling = False
        stop(self)

    def write(self: Any, path: str) -> None:
        export(self, path)
        if self.of_device:
            trace = json.loads(Path(path).read_text())
            whole = with_device(trace, gpu.launches, gpu.in_flight_s, gpu.on.architecture == "hopper")
            Path(path).write_text(json.dumps(whole))

    for name, function in (("__init__", __init__), ("start", begin), ("stop", end), ("export_chrome_trace", write)):
        stack.enter_context(patch.object(cls, name, function))


def _nvidia_smi(gpu: Gpu, folder: Path, stack: ExitStack) -> None:
    program = folder / "nvidia-smi"
    program.write_text(SMI.format(name=gpu.name, clock=gpu.on.hardware.clock_hz / 1e6))
    program.chmod(0o755)
    stack.enter_context(patch.dict(os.environ, PATH=f"{folder}{os.pathsep}{os.environ['PATH']}"))
