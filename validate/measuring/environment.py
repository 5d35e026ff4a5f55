"""Where and with what a measurement ran: device, driver, clocks, software, threads, host."""

import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from perfmodel import units
from perfmodel.errors import UserError
from perfmodel.program.installed import installed

from .allocator import KEPT, on_glibc

SOFTWARE = ("torch", "transformers", "peft", "numpy", "perfmodel")
VARIABLES = (  # beginnings of the names of environment variables that change how steps run
    "OMP_", "MKL_", "KMP_", "GOMP_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "CUDA_", "PYTORCH_", "TORCH_", "ATEN_", "DNNL_",
    "ONEDNN_",
)  # fmt: skip
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NVIDIA_SMI = (
    "driver_version", "vbios_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem",
    "power.limit", "power.max_limit", "temperature.gpu", "persistence_mode", "mig.mode.current",
)  # fmt: skip

SPOILT = "CUDA error"  # begins what PyTorch says when a process can use its GPU no more
FREE = 0.9  # of the memory: CUDA's context takes half a GB
PASSING = ("clocks.sm", "clocks.mem", "temperature.gpu", "free_memory")  # of a GPU, from one moment to the next


def describe(device: str, threads: int) -> dict[str, Any]:
    """Everything that a reader of the records needs to judge them; what cannot be read is left out."""
    found: dict[str, Any] = {
        "device": device,
        "host": {
            "cpu": cpu_name(), "clock_hz": clock_hz(), "cores": os.cpu_count(), "threads": threads,
            "caches": caches(), "isa": isa(),
            "memory_bytes": memory_bytes(), "system": platform.platform(), "python": platform.python_version(),
            "libc": " ".join(platform.libc_ver()), "huge_pages": _read(HUGE_PAGES), "load": _load(),
            "malloc": KEPT if device == "cpu" and on_glibc() else "as it is",
            "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
        },
        "software": {name: v for name in SOFTWARE if (v := installed(name))},
        "blas": {
            "mkl": torch._C.has_mkl, "onednn": torch._C._has_mkldnn,
            "parallel": torch.__config__.parallel_info().splitlines()[-1],
        },
    }  # fmt: skip
    if device == "cuda":
        found["gpu"] = gpu()
    return found


def identity(found: dict[str, Any]) -> str:
    """The id of an environment, the same whatever load, clocks and temperature are at the moment."""
    lasting = {**found, "host": {**found["host"], "load": None, "clock_hz": None}}
    if "gpu" in found:
        lasting["gpu"] = {k: v for k, v in found["gpu"].items() if k not in PASSING}
    text = json.dumps(lasting, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def spoilt(record: Mapping[str, Any]) -> bool:
    """Whether what was to be measured ended with an error after which the process can use its GPU no more."""
    return record.get("status") == "error" and SPOILT in str(record["message"])


def occupied(found: Mapping[str, Any]) -> str:
    """That others hold much of the GPU's memory, and so of its time, in one line; empty if they do not."""
    gpu = found.get("gpu", {})
    total, free = (float(gpu.get(name, 0.0)) for name in ("total_memory", "free_memory"))
    if not free or free > FREE * total:
        return ""
    return (
        f"others hold {units.nbytes(total - free)} of the GPU's {units.nbytes(total)}: what is measured is theirs too"
    )


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clock_hz() -> float | None:
    """The highest clock of the first core, or what it runs at where the system knows no highest one."""
    if highest := _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")):
        return float(highest) * 1e3
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2]) * 1e6
    return None


def isa() -> list[str]:
    """Vector and matrix extensions that decide which kernels run."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
    for line in _lines(Path("/proc/cpuinfo")):
        if line.lower().startswith(("flags", "features")):
            flags = set(line.partition(":")[2].split())
            return [name for name in wanted if name in flags]
    return []


def native_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices itself."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(isa()))


def caches() -> dict[str, int]:
    """Bytes of the first core's caches by level."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if level and size and kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("K")) * 1024
    return found


def memory_bytes() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_device(device: str) -> None:
    """Refuse what cannot be measured, before anything is.

    Raises:
        UserError: no such device here, or one that is not modelled: ROCm's, a slice of a GPU.
    """
    if device != "cuda":
        return
    if torch.version.hip is not None:
        raise UserError("AMD cards are not modelled (this PyTorch is built for ROCm): use --device cpu")
    if not torch.cuda.is_available():
        raise UserError("no CUDA device is visible to PyTorch here: use --device cpu")
    name = str(torch.cuda.get_device_properties(torch.cuda.current_device()).name)
    if re.search(r"\bMIG\b", name):
        raise UserError(f"{name}: MIG slices are not modelled; measure a whole GPU")


def gpu() -> dict[str, Any]:
    """Properties of the current CUDA device, and what nvidia-smi tells."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
    found = {name: getattr(properties, name) for name in names if hasattr(properties, name)}
    found["free_memory"] = torch.cuda.mem_get_info()[0]
    found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    which = _known_to_nvidia_smi(properties)
    for name in NVIDIA_SMI:  # one by one: an old driver refuses the whole query for one unknown name
        if which is not None and (value := _nvidia_smi(name, which)) is not None:
            found[name] = value
    return found


def _known_to_nvidia_smi(properties: Any) -> str | None:
    """The current device as nvidia-smi names it: by its UUID, or by its number where all are visible in its order."""
    if (uuid := getattr(properties, "uuid", None)) is not None:
        return f"GPU-{str(uuid).removeprefix('GPU-')}"
    alone = torch.cuda.device_count() == 1 and "CUDA_VISIBLE_DEVICES" not in os.environ
    return "0" if alone else None


def _nvidia_smi(name: str, which: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={name}", "--format=csv,noheader", f"--id={which}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _read(path: Path) -> str:
    lines = _lines(path)
    return lines[0].strip() if lines else ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
