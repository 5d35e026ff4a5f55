"""Microbenchmarks time what they say: as many calls as they divide by, and the calls that fits believe them to be."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from math import prod
from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from perfmodel.tracing.programs.dtypes import DTYPES
from validate.fitting import cpu_ops
from validate.measuring import clocks
from validate.microbench import designs, kernels, run, stopwatch
from validate.microbench.designs import MicroCase
from validate.microbench.kernels import Ring


class Dispatched(TorchDispatchMode):
    """Every call with the shapes and dtypes of its tensors and of what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self.calls.append((name, *([(DTYPES[t.dtype], tuple(t.shape)) for t in flat(x)] for x in (args, out))))
        return out


def flat(x: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested lists."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from flat(part)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted(kernels.STREAM_CALLS))
def test_a_benchmark_calls_what_its_fit_counts(name: str, dtype: str) -> None:
    """A row timed as one call and priced as another would put an error into every step of the machine."""
    rows, columns = 96, 160
    case = MicroCase("pointwise", name, dtype, (("rows", rows), ("columns", columns)))
    call, _ = kernels.build_call(case, "cpu")
    with Dispatched() as seen:
        call(0)
    told = cpu_ops.op(name, dtype, rows, columns)
    found = [c for c in seen.calls if c[0].partition(".")[0] == told.name.partition(".")[0]]
    assert len(found) == 1, seen.calls
    _, inputs, outputs = found[0]
    assert [dtype for dtype, _ in outputs] == [s.dtype for s in told.outputs]
    assert [prod(shape) for _, shape in outputs] == [s.numel for s in told.outputs]
    if told.attrs.dims is not None:  # what runs over rows and what down columns
        assert [shape for _, shape in outputs] == [s.shape for s in told.outputs]
    read = sorted((dtype, prod(shape)) for dtype, shape in set(inputs) if dtype != "i64")
    assert read == sorted({(s.dtype, s.numel) for s in told.inputs if s.shape != (rows,) or name != "embedding"})


@given(st.integers(1, 3), st.integers(1, 900), st.integers(1, 900), st.sampled_from(["fp32", "bf16"]), st.booleans())
def test_operands_of_a_call_share_no_memory(of: int, rows: int, columns: int, dtype: str, warm: bool) -> None:
    """Where one filled the pool, the next began at its start again: of x + x half is read, and memory seemed faster."""
    before = kernels.RING["cpu"]
    kernels.RING["cpu"] = 2e5
    try:
        rings = [Ring(rows, columns, dtype=dtype, device="cpu", warm=warm and not n, of=of) for n in range(of)]
    finally:
        kernels.RING["cpu"] = before
    spans = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for ring in rings for copy in ring.copies)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_every_call_says_how_many_large_operands_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that share the pool: a new op that forgets to would be timed on one operand twice."""
    made: list[tuple[int, int]] = []

    def ring(*shape: int, of: int = 1, **other: Any) -> Ring:
        made.append((prod(shape), of))
        return Ring(*shape, of=of, **other)

    monkeypatch.setattr(kernels, "Ring", ring)
    monkeypatch.setitem(kernels.RING, "cpu", 2e5)
    for op in designs.STREAMS:
        made.clear()
        kernels.build_call(MicroCase("pointwise", op, "fp32", (("rows", 64), ("columns", 96))), "cpu")
        assert sum(size == 64 * 96 for size, _ in made) == made[0][1]


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2)])
def test_only_heads_that_share_keys_ask_for_it(monkeypatch: pytest.MonkeyPatch, heads: int, shared: int) -> None:
    """Memory-efficient attention takes no call that asks: without need, an old card would time another kernel."""
    asked = []

    def attention(q: Any, k: Any, v: Any, *, is_causal: bool, enable_gqa: bool) -> Any:
        asked.append(enable_gqa)
        return q

    monkeypatch.setattr(kernels, "scaled_dot_product_attention", attention)
    monkeypatch.setitem(kernels.RING, "meta", 1e5)
    sizes = (("batch", 1), ("seq", 16), ("heads", heads), ("kv_heads", shared), ("head_dim", 8))
    call, _ = kernels._attention(MicroCase("attention", "sdpa", "fp32", sizes), "meta")
    call(0)
    assert asked == [heads != shared]


def test_a_repeat_makes_as_many_calls_as_it_is_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a number of its own, so that none finds in a cache what the one before has read."""
    watch, calls = stopwatch.CpuStopwatch(1), list[int]()
    monkeypatch.setattr(watch, "cost", 0.0)
    monkeypatch.setattr(watch.clock, "now", lambda: float(len(calls)))  # a second a call
    timing = watch(calls.append, 7, 0.0, 100)
    assert (timing.least, timing.median, timing.repeats) == (1.0, 1.0, 3)
    timed = calls[stopwatch.WARM_UP :]
    assert timed == list(range(7 * 3))


@pytest.mark.parametrize(("threads", "clock"), [(1, clocks.THREAD), (2, clocks.WALL)])
def test_only_a_thread_alone_is_timed_by_its_own_clock(threads: int, clock: str) -> None:
    """It leaves out what else runs on the machine, and with it what the other threads of a kernel do."""
    assert stopwatch.CpuStopwatch(threads).kind == clock


@pytest.mark.parametrize("op", ["dispatch", "view", "module_call", "launch"])
def test_only_a_launch_is_a_call_on_the_device(op: str) -> None:
    """The others tell what the host alone takes; a launch that never reached the device would cost as little."""
    call, _ = kernels.build_call(MicroCase("host", op, "fp32", ()), "meta")
    found = call(0)
    assert isinstance(found, torch.Tensor)
    assert found.device.type == ("meta" if op == "launch" else "cpu")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"), (RuntimeError("not enough memory: 1 EB"), "oom"),
        (NotImplementedError("'mm' not implemented for 'Half'"), "error"),
        (RuntimeError("No available kernel. Aborting execution."), "error"),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"), "error"),
        (ValueError("a mistake of ours"), None),
    ],
)  # fmt: skip
def test_what_a_device_cannot_do_is_a_record_and_a_fault_is_none(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str | None
) -> None:
    """An hour of cases goes on past a kernel that is not there, whatever PyTorch says of it."""

    def refuse(case: MicroCase, device: str) -> None:
        raise error

    monkeypatch.setattr(run, "build_call", refuse)
    case = MicroCase("gemm", "mm", "fp32", ())
    with nullcontext() if status else pytest.raises(type(error), match=str(error)):
        found = run.attempt(case, "cpu", stopwatch.CpuStopwatch(1))
        assert (found["kind"], found["status"], found["message"]) == ("unmeasured", status, str(error))


@pytest.mark.parametrize("wide", [False, True])
def test_floors_and_bandwidth_are_measured_first(wide: bool) -> None:
    """Whatever a calibration that is cut short has not measured, its floors and the memory's bandwidth it has."""
    cases = designs.stream_cases("fp32", wide=wide)
    operations = len({c.op for c in cases})
    largest = max(prod(n for _, n in c.sizes) for c in cases)
    first = cases[: operations + len(designs.PLAIN)]
    assert {c.op for c in first if c["rows"] == 1} == {c.op for c in cases}
    big = [c for c in first if c["rows"] > 1]
    assert {c.op for c in big} == set(designs.PLAIN)
    assert all(prod(n for _, n in c.sizes) >= largest / 2 for c in big)


def test_a_third_of_the_products_is_skinny_and_none_is_timed_twice() -> None:
    """Adapters are made of skinny products; a product timed twice is rented time that tells nothing new."""
    cases = designs.gemms("bf16", wide=True)
    assert len(set(cases)) == len(cases)
    shapes = cases[:: len(designs.LAYOUTS)]  # each in all layouts
    skinny = [min(n for _, n in case.sizes) < 64 for case in shapes]
    assert skinny == [i % 3 == 0 for i in range(len(shapes))]


@pytest.mark.parametrize(("device", "given_back"), [("cuda", 1), ("cpu", 0)])
def test_only_a_gpu_is_asked_for_its_memory_back(monkeypatch: pytest.MonkeyPatch, device: str, given_back: int) -> None:
    """A training step that follows must not find it held; a CPU has no such cache, and may have no driver either."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append(1))
    kernels.release_pools(device)
    assert len(asked) == given_back
