"""Calibration: microbenchmarks of this machine, a fit, and a device and a host file that `--device NAME` finds.

The device file has the form of data/devices/*.toml; its datasheet holds what the system tells and, for a CPU, whose
makers publish no such figures, the best rates that were measured.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from perfmodel.devices import host as host_files
from perfmodel.devices import own, profile
from perfmodel.devices.cpu_work import STATE
from perfmodel.devices.hardware import Hardware
from perfmodel.devices.profile import CPU_ATTENTION16, DeviceProfile
from perfmodel.errors import UserError
from perfmodel.resources import check_parent, make_parent, write_text

from ..accuracy import Errors
from ..fitting import cpu as cpu_fit
from ..fitting import cuda as cuda_fit
from ..fitting.judging import Fit
from ..fitting.write import block_text
from ..measuring import allocator, environment, records
from ..microbench import designs, run, stopwatch
from . import hosts, verify

Progress = Callable[[float, str], None]  # share done, what comes next
Record = dict[str, Any]

SECONDS = 150.0  # of a whole calibration, the host's part included
HOST_SHARE = 0.35  # of the seconds
MEASURED = "measured by perfmodel calibrate"
BIG = 8e6  # B: calls that move at least so much show the memory's bandwidth


@dataclass(frozen=True)
class Calibration:
    """What a calibration made.

    Attributes:
        device, host: the files.
        fits: blocks that were fitted, with their errors on left-out rows.
        caveats: blocks that the file goes without, and microbenchmarks that failed, in words.
        by: the host's fit.
        checks: errors of predicting the timed programs and real steps (`verify`).
        refusal: why nothing was written; empty if the files are there.
        seconds: how long it took.
    """

    profile: DeviceProfile
    device: Path
    host: Path
    fits: Mapping[str, Fit]
    caveats: list[str]
    by: hosts.HostFit
    checks: Mapping[str, Errors]
    refusal: str
    seconds: float


def calibrate(
    device: str,
    name: str,
    *,
    threads: int | None = None,
    seconds: float = SECONDS,
    output: Path | None = None,
    progress: Progress = lambda share, label: None,
) -> Calibration:
    """Measure this machine and write its device and host files, if what they predict is not far from what was timed.

    Args:
        device: cpu or cuda.
        name: of the files; the device is `--device NAME` from then on.
        threads: of the CPU [default: PyTorch's choice]; the profile holds for steps with as many.
        seconds: for everything, roughly.
        output: keeps the records of the microbenchmarks.

    Raises:
        UserError: no such device here, a name that is none or a bundled device's, files that cannot be written; an
            error after which the GPU can be used no more.
    """
    begin = time.perf_counter()
    target, host_target = own.path(name), own.path(name, "hosts")
    if bundled := profile.bundled(name):
        which = "" if bundled == name else f" ({bundled})"
        raise UserError(f"{name!r} is a bundled device{which}: give the calibration another --name")
    if name in host_files.names():
        raise UserError(f"{name!r} is a bundled host: give the calibration another --name")
    environment.check_device(device)
    for path in (target, host_target):
        make_parent(path)
    if output is not None:
        check_parent(output)
    threads = threads or torch.get_num_threads()
    found = microbenchmarks(device, threads, seconds * (1.0 - HOST_SHARE), progress)
    if output is not None:
        records.append_records(output, *found)
    if environment.spoilt(found[-1]):
        kept = f" (what was measured is in {output})" if output else ""
        raise UserError(f"{found[-1]['unit']}: {found[-1]['message']}: the GPU answers no more{kept}; calibrate again")
    text, fits = device_file(found, name)
    mine = profile_of_text(text, name)
    on = mine if device == "cpu" else None
    by = hosts.calibrate_host(
        lambda label: progress(1.0, f"host: {label}"),
        on=on,
        least=host_floors(found),
        seconds=max(2.0, seconds - (time.perf_counter() - begin)),
    )
    checks = verify.of_programs(by, on)
    if on:
        progress(1.0, "real steps")
        checks[verify.STEPS] = verify.of_steps(on, by.host, threads)
    refusal = verify.refusal(checks)
    if not refusal:
        hosts.write_host(by.host, host_target, by.provenance(checks))
        write_text(target, text)
        profile.forget()
    caveats = [*verify.poor(fits, mine.kind).values(), *failed(found)]
    if occupied := environment.occupied(found[0]):
        caveats.append(occupied)
    return Calibration(mine, target, host_target, fits, caveats, by, checks, refusal, time.perf_counter() - begin)


def microbenchmarks(device: str, threads: int, seconds: float, progress: Progress) -> list[Record]:
    """An environment's record and those of the microbenchmarks."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    if device == "cpu":
        allocator.keep_freed_memory()
    try:
        here = environment.describe(device, threads)
        head = {"kind": "environment", "id": environment.identity(here), "started": time.time(), **here}
        watch = stopwatch.stopwatch(device, threads)
        measured = run.run_blocks(designs.design(device, designs.DTYPES), device, watch, seconds, progress)
    finally:
        torch.set_num_threads(before)
    return [head, *({"unit": run.case_in_words(r["case"]), **r, "environment": head["id"]} for r in measured)]


def failed(found: Sequence[Record]) -> list[str]:
    """Microbenchmarks that ended with an error, by what it said; out of memory is none, the case was too large."""
    said: dict[str, list[Record]] = {}
    for r in found:
        if r["kind"] == "unmeasured" and r["status"] == "error":
            said.setdefault(r["message"], []).append(r)
    return [f"{len(rs)} microbenchmarks failed, {rs[0]['unit']} first: {text}" for text, rs in said.items()]


def device_file(found: Sequence[Record], name: str) -> tuple[str, dict[str, Fit]]:
    """The text of a device file, and the blocks that were fitted, from the records of a calibration.

    Raises:
        UserError: records without an environment, or too few microbenchmarks to fit.
    """
    here = next((r for r in found if r.get("kind") == "environment"), None)
    if here is None:
        raise UserError("these records hold no environment of a calibration")
    if here["device"] == "cuda":
        known, fits = cuda_fit.fit_gpu(found, here)
        title = str(here["gpu"]["name"])
        datasheet = cuda_fit.datasheet(known, here["gpu"])
        capability = known.compute_capability
        kept = {block: fit for block, fit in fits.items() if block not in verify.poor(fits, "cuda")}
        return file_text(name, title, "cuda", known.architecture, datasheet, kept, capability), fits
    rows = cpu_fit.cpu_rows(found)
    datasheet = cpu_datasheet(rows, here)
    hardware = Hardware(**{k: v for k, (v, _) in datasheet.items()})
    host, software = here["host"], f"PyTorch {here['software'].get('torch')}, {here['host']['threads']} threads"
    fits = {f"gemm.{d}": cpu_fit.fit_gemms(rows, d, hardware, software) for d in ("bf16", "fp32")}
    fits |= {
        "attention": cpu_fit.fit_attention_kernel(rows, "fp32", hardware, software),
        "pointwise": cpu_fit.fit_streams(rows, hardware, software),
    }
    if cpu_fit.tells_attention(rows, "bf16"):  # otherwise priced as fp32's
        fits[CPU_ATTENTION16] = cpu_fit.fit_attention_kernel(rows, "bf16", hardware, software)
    return file_text(name, host["cpu"], "cpu", "cpu", datasheet, fits), fits


def host_floors(found: Sequence[Record]) -> dict[str, float]:
    """Seconds that a call, a view and a module's call take at least, by the microbenchmarks: field of a host -> s."""
    timed = {r["case"]["op"]: float(r["seconds"]["least"]) for r in found if r.get("kind") == "microbench"}
    fields = {"call": "dispatch", "loop_call": "dispatch", "view": "view", "module": "module_call"}
    return {field: timed[op] for field, op in fields.items() if op in timed}


def cpu_datasheet(rows: Sequence[cpu_fit.CpuRow], here: Record) -> dict[str, tuple[Any, str]]:
    """Figure -> (value, source) of a CPU with so many threads at work."""
    host = here["host"]
    threads = int(host["threads"])
    products = [r for r in rows if r.case["block"] == "gemm"]
    best = {d: max((_rate(r) for r in products if r.case["dtype"] == d), default=0.0) for d in designs.DTYPES}
    bandwidth = max((_bandwidth(r) for r in rows if r.case["op"] in STATE), default=0.0)
    if not bandwidth or not all(best.values()):
        raise UserError("too few microbenchmarks to tell the peaks of this machine: give the calibration more time")
    caches = host["caches"]
    system = "the system's description of this machine"
    return {
        "sm_count": (threads, "threads of the calibration"),
        "clock_hz": (float(host.get("clock_hz") or 3e9), system),
        "memory_bytes": (float(host["memory_bytes"]), system),
        "memory_bandwidth": (bandwidth, MEASURED),
        "l2_bytes": (float(caches.get("L2", 1 << 20)) * threads, f"{system}: L2 of so many cores"),
        "fp32_flops": (best["fp32"], MEASURED),
        "bf16_flops": (best["bf16"], MEASURED),
    }


def _rate(r: cpu_fit.CpuRow) -> float:
    return 2.0 * r.sizes["m"] * r.sizes["n"] * r.sizes["k"] / r.seconds


def _bandwidth(r: cpu_fit.CpuRow) -> float:
    """Bytes read and written a second, of a call on cold operands that is too big for a core's cache."""
    from ..fitting.cpu_ops import op

    call = op(r.case["op"], r.case["dtype"], r.sizes["rows"], r.sizes["columns"])
    moved = float(call.bytes_read + call.bytes_written)
    return moved / r.seconds if moved >= BIG else 0.0


def file_text(
    name: str, title: str, kind: str, architecture: str, datasheet: Mapping[str, tuple[Any, str]],
    fits: Mapping[str, Fit], capability: str = "",
) -> str:  # fmt: skip
    """A device file as text."""
    head = [
        f"# Written by perfmodel calibrate on {date.today()}.",
        f'name = "{title}"',
        f'kind = "{kind}"',
        f'architecture = "{architecture}"',
        *([f'compute_capability = "{capability}"'] if capability else []),
        f'host = "{name}"',
        "",
        "[datasheet]",
        *(
            f"{key} = {value:.6g}" if isinstance(value, float) else f"{key} = {value}"
            for key, (value, _) in datasheet.items()
        ),
        "",
        "[source]",
        *(f'{key} = "{source}"' for key, (_, source) in datasheet.items()),
        "",
    ]
    today = date.today().isoformat()
    return "\n".join([*head, *(block_text(f"fitted.{block}", fit, today) for block, fit in fits.items())])


def profile_of_text(text: str, name: str) -> DeviceProfile:
    """The profile of a device file's text."""
    import tomllib

    return profile.from_table(name, tomllib.loads(text), f"{name}.toml")
