"""What stands for `torch.cuda` while the stand-in is there; each name is one of the real module's."""

from types import SimpleNamespace
from typing import Any

from .gpu import Gpu

CUDA_VERSION, CUDNN_VERSION = "12.8", 91002


class Runtime:
    """Functions of `torch.cuda`, with the parameters of the real ones that the project uses."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self._capability()[0] >= 8 or including_emulation

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        if device not in (0, "cuda", "cuda:0"):
            raise RuntimeError("CUDA error: invalid device ordinal")

    def get_device_name(self, device: Any = None) -> str:
        return self.gpu.name

    def get_device_capability(self, device: Any = None) -> tuple[int, int]:
        return self._capability()

    def get_device_properties(self, device: Any = None) -> Any:
        hardware, (major, minor) = self.gpu.on.hardware, self._capability()
        return SimpleNamespace(
            name=self.gpu.name, major=major, minor=minor, multi_processor_count=hardware.sm_count,
            total_memory=self.gpu.memory_bytes, L2_cache_size=int(hardware.l2_bytes),
        )  # fmt: skip

    def synchronize(self, device: Any = None) -> None:
        self.gpu.synchronize()

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.gpu.peak = self.gpu.live

    def memory_allocated(self, device: Any = None) -> int:
        return self.gpu.live

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.gpu.peak

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.gpu.reserved

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return self.gpu.memory_bytes - self.gpu.live, self.gpu.memory_bytes

    def manual_seed_all(self, seed: int) -> None:
        pass

    def Event(self, enable_timing: bool = False) -> "Event":
        return Event(self.gpu, enable_timing)

    def _capability(self) -> tuple[int, int]:
        major, minor = self.gpu.on.compute_capability.split(".")
        return int(major), int(minor)


class Event:
    """A mark in the stream: it is reached when the work before it is done."""

    def __init__(self, gpu: Gpu, enable_timing: bool) -> None:
        self.gpu, self.timed = gpu, enable_timing
        self.at: float | None = None

    def record(self, stream: Any = None) -> None:
        self.at = max(self.gpu.host_s, self.gpu.device_s)

    def synchronize(self) -> None:
        self.gpu.host_s = max(self.gpu.host_s, self.at or 0.0)

    def query(self) -> bool:
        return self.at is None or self.at <= self.gpu.host_s

    def elapsed_time(self, end_event: "Event") -> float:
        if not (self.timed and end_event.timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.at is None or end_event.at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not end_event.query():
            raise RuntimeError("CUDA error: device not ready")
        return (end_event.at - self.at) * 1e3


NAMES = tuple(name for name in vars(Runtime) if not name.startswith("_"))
