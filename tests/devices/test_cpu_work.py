"""How much memory traffic a CPU has from each call: bytes by hand, write-allocates included."""

from dataclasses import replace
from typing import Any

import pytest

from perfmodel.devices import profile
from perfmodel.devices.cpu import GRAIN, CpuGemmParameters, CpuStreamParameters, cpu_gemm_time, regime, stream_time
from perfmodel.devices.cpu_work import FEW_ROWS, KINDS, REGIMES, VECTOR, kind_of, streams
from perfmodel.program.op import Op
from perfmodel.tape import nn, pointwise, shape
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.engine import run_backward
from perfmodel.tape.pointwise import fill
from perfmodel.tape.tensor import Parameter, Tensor

ROWS, WIDTH, TABLE = 32, 128, 512
N = 4 * ROWS * WIDTH  # bytes of a tensor of rows, fp32


def parameter(*dims: int, dtype: str = "fp32") -> Parameter:
    return Parameter("x", dims, dtype, kind="weight", trainable=True)


def embedding() -> Tensor:
    return nn.embedding(parameter(TABLE, WIDTH), parameter(ROWS, dtype="i64"))


def half() -> Tensor:
    return shape.narrow(parameter(ROWS, 2 * WIDTH), 1, WIDTH)


PROGRAMS = {
    "embedding": embedding, "narrow": half, "silu": lambda: pointwise.silu(parameter(ROWS, WIDTH)),
    "cast": lambda: pointwise.cast(parameter(ROWS, WIDTH, dtype="bf16"), "fp32"),
}  # fmt: skip


def recorded(program: str) -> list[Op]:
    """Forward and backward of a program."""
    with recording(Tape("cpu")) as tape:
        tape.begin("x", "forward")
        y = PROGRAMS[program]()
        run_backward(y, fill("ones_like", y.shape, y.dtype))
    return [op for part in tape.parts for op in part.ops if not op.view]


# (program, op): passes as (kind, bytes, elements, cold bytes). A store to memory that no cache holds reads it first;
# cold is what no cache holds: fresh results, and operands beside the first.
EXPECTED: dict[tuple[str, str], list[tuple[str, float, int, int]]] = {
    ("embedding", "embedding"): [("gather", N + 2 * N, ROWS * WIDTH, 2 * N)],
    ("embedding", "ones_like"): [("stream", 2 * N, ROWS * WIDTH, N)],
    ("embedding", "embedding_dense_backward"): [
        ("stream", 2 * 4 * TABLE * WIDTH, TABLE * WIDTH, 4 * TABLE * WIDTH),  # a table of zeros
        ("gather", 3 * N, ROWS * WIDTH, N),  # a row of it and of the gradient read, written in place
    ],
    ("narrow", "slice_backward"): [
        ("stream", 2 * 2 * N, 2 * ROWS * WIDTH, 2 * N),  # zeros
        ("strided", 2 * N, ROWS * WIDTH, 0),  # the part copied into them
    ],
    ("silu", "silu"): [("sigmoid", N + 2 * N, ROWS * WIDTH, N)],
    ("silu", "silu_backward"): [("sigmoid", 2 * N + 2 * N, ROWS * WIDTH, 2 * N)],
    ("cast", "_to_copy"): [("cast", N / 2 + 2 * N, ROWS * WIDTH, N)],
}


@pytest.mark.parametrize(("program", "name"), EXPECTED)
def test_a_call_moves_the_bytes_that_its_kernel_does(program: str, name: str) -> None:
    """A CPU's small steps are made of these: a pass left out or counted twice goes straight into the time."""
    op = next(op for op in recorded(program) if op.name == name)
    found: list[Any] = [(kind, traffic, elements, cold) for kind, traffic, elements, _, cold in streams(op)]
    assert found == EXPECTED[program, name]
    assert all(calls == 1 for *_, calls, _ in streams(op))
    if len(found) == 1:  # of several streams the call has a kind of its own
        assert kind_of(op) == found[0][0]


@pytest.mark.parametrize(("elements", "cores"), [(100, 1), (3 * GRAIN, 3), (1e9, 4)])
def test_a_stream_by_hand(elements: float, cores: int) -> None:
    """As many cores as have a grain of work each; their part of the cache; halfway where it is just full."""
    hw = replace(profile.load("cpu-xeon-2.5ghz-1t").hardware, sm_count=4, l2_bytes=4 * 2**20, memory_bandwidth=40e9)
    p = CpuStreamParameters(stream=0.9, cache_ratio=3.0, cache_usable=0.5)
    floor, compute = p.floors["stream"], elements * p.clocks["stream"] / (hw.clock_hz * cores)
    full = 0.5 * 2**20 * cores
    for traffic, slowdown in (
        (full / 100, 4 / (3.0 * cores)), (full, 0.5 + 0.5 * 4 / (3.0 * cores)), (1000 * full, 1.0)
    ):  # fmt: skip
        seconds = stream_time(traffic, elements, 2, hardware=hw, parameters=p, kind="stream")
        assert float(seconds) == pytest.approx(2 * floor + compute + traffic * slowdown / (0.9 * 40e9), rel=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_no_fit_has_measured_takes_time_too(kind: str, half: bool) -> None:
    """A fit leaves the usual figures where it had no rows: more to compute on as many bytes must take longer."""
    hw = profile.load("cpu-xeon-2.5ghz-1t").hardware
    few, many = (
        stream_time(1e6, n, hardware=hw, parameters=CpuStreamParameters(), kind=kind, half=half) for n in (1e6, 2e6)
    )
    assert many > few > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["tn", "nn", "nt"])
@pytest.mark.parametrize("m", [8, FEW_ROWS - 1, FEW_ROWS, 2048])
@pytest.mark.parametrize("n", [8, VECTOR - 1, VECTOR, 100, 2048])
def test_a_product_costs_by_the_regime_that_a_fit_files_it_under(dtype: str, layout: str, m: int, n: int) -> None:
    """Otherwise a calibration would measure one kernel and predict with the figures of another."""
    hw = profile.load("cpu-xeon-2.5ghz-1t").hardware
    plain = CpuGemmParameters()
    for name in REGIMES:
        slow = replace(plain, efficiency={**plain.efficiency, name: 0.1}, a_passes={**plain.a_passes, name: 50.0})
        was, now = (
            cpu_gemm_time(m, n, 256, hardware=hw, parameters=p, dtype=dtype, layout=layout) for p in (plain, slow)
        )
        assert (now > 2 * was) == (name == regime(m, n, layout, dtype)), name
        assert now >= was
