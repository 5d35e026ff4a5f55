"""The device: two clocks, a memory, and the launches that a profiler sees."""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from perfmodel.calls import costs
from perfmodel.devices import price
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.program.op import Op

BLOCK = 512  # B: what the caching allocator hands out is a multiple of it
RESERVED = 2 << 20  # B: what it reserves is


@dataclass(frozen=True)
class Launch:
    """What one ATen call starts on the device: equal kernels one after another, or a copy over the bus.

    Attributes:
        call: the ATen call.
        kind: kernel, or the direction of a copy (HtoD, DtoH).
        seconds: of all of it.
        nbytes: of a copy.
    """

    call: str
    kind: str
    number: int
    seconds: float
    nbytes: int = 0


@dataclass
class Gpu:
    """A GPU as its profile describes it, fed by a host.

    Attributes:
        on: prices every call, and says how much memory there is.
        name: as the driver tells it.
        by: what the host spends on a call, a view and a launch; modules, autograd nodes and the like cost nothing here.
        host_s, device_s: the clocks.
        live, peak: bytes of tensors, in the allocator's blocks.
        launches: of the profiler that runs, by number.
        asked: whether this process called anything of `torch.cuda`: then no child that it forks may.
    """

    name: str
    on: DeviceProfile
    by: Host
    memory_bytes: int
    host_s: float = 0.0
    device_s: float = 0.0
    live: int = 0
    peak: int = 0
    profiling: bool = False
    launches: list[Launch] = field(default_factory=list)
    in_flight_s: float = 0.0  # work that was still queued when the profiler began
    storages: dict[int, int] = field(default_factory=dict)
    asked: bool = False

    def run(self, op: Op, *, backward: bool) -> None:
        """A call of PyTorch's: the host dispatches it, the device does what it launches."""
        if op.view:
            self.host_s += self.by.backward_view if backward else self.by.view
            return
        number, seconds = priced(op, self.on)
        self.host_s += (self.by.backward_call if backward else self.by.call) + self.by.launch_call * number
        if number:
            self._work(Launch(op.name, "kernel", number, seconds))

    def copy(self, direction: str, nbytes: int) -> None:
        """A copy between host and device; the host waits for one that comes back."""
        self.host_s += self.by.call + self.by.launch_call
        self._work(Launch("copy_", direction, 1, nbytes / price.BUS, nbytes))
        if direction == "DtoH":
            self.synchronize()

    def _work(self, launch: Launch) -> None:
        self.device_s = max(self.device_s, self.host_s + self.by.launch) + launch.seconds
        if self.profiling:
            self.launches.append(launch)

    def synchronize(self) -> None:
        """The host waits until the device is idle."""
        self.host_s = max(self.host_s, self.device_s)

    def begin_profile(self) -> None:
        """A profiler starts to watch; what is queued already has been launched before."""
        self.profiling, self.launches = True, []
        self.in_flight_s = max(0.0, self.device_s - self.host_s)

    def allocate(self, storage: Any) -> None:
        """Count a tensor's memory until it is freed.

        Raises:
            torch.OutOfMemoryError: more than there is.
        """
        key, nbytes = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self.storages:
            return
        if self.live + nbytes > self.memory_bytes:
            free = (self.memory_bytes - self.live) / 2**30
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes / 2**30:.2f} GiB. GPU 0 has a total capacity of "
                f"{self.memory_bytes / 2**30:.2f} GiB of which {free:.2f} GiB is free."
            )
        self.storages[key] = nbytes
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.storages.pop(key, 0)

    @property
    def reserved(self) -> int:
        """Bytes that the allocator holds at the peak."""
        return -(-self.peak // RESERVED) * RESERVED


_PRICES: dict[tuple[Any, ...], tuple[int, float]] = {}


def priced(op: Op, on: DeviceProfile) -> tuple[int, float]:
    """Kernels that a call launches, and their seconds together."""
    key = (on, op.name, op.inputs, op.outputs, op.attrs)
    if key not in _PRICES:
        _PRICES[key] = int(costs.kernels(op)), float(price.durations([op], on)[0])
    return _PRICES[key]
