"""Prices of attention, memory-bound kernels and decompositions, by hand from datasheet figures and parameters."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perfmodel.devices import profile
from perfmodel.devices.attention import attention_backward_time, attention_flops, attention_forward_time
from perfmodel.devices.kernels import memory_bound
from perfmodel.devices.pointwise import KINDS, pointwise_time
from perfmodel.devices.price import durations
from perfmodel.devices.solver import ROUTINES, solver_time
from perfmodel.program.op import Attrs, Op, Spec
from perfmodel.program.software import SoftwareStack


def test_causal_attention_by_hand() -> None:
    """4 x 32 heads, 4096 tokens, head 128 on an A100.

    FLOPs         4 * 4 * 32 * 4096**2 * 128 / 2 = 0.550e12 useful
    diagonal      32 blocks of 128 rows: 32 * 33 / 2 of 32 * 32 squares, so 0.567e12 are computed
    compute       0.567e12 / (312e12 * 0.689) = 2.64 ms, all SMs busy
    longest CTA   alone * 128 * 4096 * 4 * 128 * 108 / (312e12 * 0.689) = 0.11 ms, added by the soft maximum
    memory        4 tensors of 134 MB: 0.26 ms, half of it exposed
    """
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.attention, a100.hardware
    flops = float(attention_flops(4, 4096, 4096, 32, 128))
    assert flops == 4 * 4 * 32 * 4096**2 * 128 / 2
    computed = flops * (32 * 33 / 2) / (32 * 32 / 2)
    rate = hw.peak("bf16") * dict(p.efficiency)[128]
    work, longest = computed / rate, p.alone * 128 * 4096 * 4 * 128 * 108 / rate
    moved = 4 * 4 * 4096 * 32 * 128 * 2
    seconds = float(attention_forward_time(4, 4096, 4096, 32, 32, 128, hardware=hw, parameters=p))
    rest = (32 * 128 + 1) * p.cta_overhead / 108 / hw.clock_hz
    low = p.launch_floor + (work**p.p + longest**p.p) ** (1 / p.p)
    assert low < seconds < low + rest + p.exposed_memory * moved / hw.memory_bandwidth * 1.01
    backward = float(attention_backward_time(4, 4096, 4096, 32, 32, 128, hardware=hw, parameters=p))
    assert 2.5 < backward / seconds < 4.0  # 2.5 times the FLOPs at a lower rate, and three kernels


def test_a_cta_of_two_row_blocks_by_hand() -> None:
    """A head of 256 queries: two CTAs of one block at once, or one of both, which takes twice as long; a wide head's
    CTA has one block in either case.
    """
    b200 = profile.load("b200")
    both = replace(b200.cudnn_attention, row_tiles=2, cta_overhead=0.0, exposed_memory=0.0, launch_floor=0.0, p=8.0)
    narrow, wide = (
        [float(attention_forward_time(1, 256, 4096, 1, 1, head, hardware=b200.hardware, parameters=p, causal=False))
         for p in (replace(both, row_tiles=1), both)]
        for head in (128, 256)
    )  # fmt: skip
    assert narrow[1] == pytest.approx(2 * narrow[0])
    assert wide[1] == wide[0]


def test_the_backward_pass_of_wide_heads_by_hand() -> None:
    """Its products take time in inverse proportion to their rate, whatever the copies beside them take."""
    h100 = profile.load("h100-sxm")
    p = replace(h100.cudnn_attention, backward_cta_overhead=0.0)
    one, half, quarter = (
        attention_backward_time(4, 2048, 2048, 16, 16, np.array([128, 256]), hardware=h100.hardware,
                                parameters=replace(p, backward_wide=rate))
        for rate in (1.0, 0.5, 0.25)
    )  # fmt: skip
    assert one[0] == half[0] == quarter[0]
    assert quarter[1] - half[1] == pytest.approx(2 * (half[1] - one[1]))
    assert half[1] > one[1]


def test_an_addition_by_hand() -> None:
    """c = a + b on 2**28 bf16 elements: 3 * 537 MB at `stream` * 2.039 TB/s, a floor and a gap."""
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.pointwise, a100.hardware
    expected = p.launch_floor + p.kernel_gap + 3 * 2 * 2**28 / (p.stream * hw.memory_bandwidth)
    seconds = pointwise_time(2 * 2 * 2**28, 2 * 2**28, hardware=hw, parameters=p)
    assert float(seconds) == pytest.approx(expected, rel=0.01)
    assert 0.7 < p.stream < 1.0


def test_an_addition_in_l2_by_hand() -> None:
    """Half of it comes from L2 where its operands just fill it, all of it where they are small.

    The operand that was just written, a third of all, is there longer: a third of L2 is 1/(1 + 1/27) kept.
    """
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.pointwise, a100.hardware
    full = p.l2_usable * hw.l2_bytes
    for moved, from_l2 in ((full / 100, 1.0), (full, (0.5 + 0.5 + 27 / 28) / 3), (100 * full, 0.0)):
        stream = moved / hw.memory_bandwidth * ((1 - from_l2) / p.stream + from_l2 / p.l2_ratio)
        seconds = pointwise_time(2 / 3 * moved, moved / 3, hardware=hw, parameters=p)
        assert float(seconds) == pytest.approx(p.launch_floor + p.kernel_gap + stream, rel=1e-4)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if isinstance(kind.rate, str)])
def test_a_kernel_of_many_instructions_by_hand(kind: str) -> None:
    """Elements at so many a clock and SM, where that takes longer than their bytes; the larger side has 4 B each."""
    a100 = profile.load("a100-80gb-sxm")
    slow, n = replace(a100.pointwise, **{str(KINDS[kind].rate): 0.01}), 2.0**20
    busy = n / (0.01 * a100.hardware.sm_count * a100.hardware.clock_hz)
    for sizes, told in (((4 * n, n), {}), ((n, 4 * n), {}), ((n, n), {"elements": n})):
        seconds = pointwise_time(*sizes, hardware=a100.hardware, parameters=slow, kind=kind, **told)
        assert float(seconds) == pytest.approx(slow.launch_floor + slow.kernel_gap + busy, rel=1e-9)


@pytest.mark.parametrize(("torch", "up", "down"), [("2.5", 30.9, 30.9), ("2.6", 30.9, 17.2)])
def test_casts_of_fp32_to_16_bit_stream_since_torch_2_6(torch: str, up: float, down: float) -> None:
    """An adapter's branch casts both ways: Qwen1.5-0.5B's 16 x 559 tokens took 29.2 and 18.2 us on an H100, torch 2.6
    (https://github.com/AMD-AGI/TraceLens)."""
    on = profile.load("h100-sxm").under(SoftwareStack.of(f"torch={torch}"))
    low, high = (Spec(dtype, (16, 559, 1024)) for dtype in ("bf16", "fp32"))
    casts = [Op("_to_copy", (a,), (b,), a.nbytes, b.nbytes) for a, b in ((low, high), (high, low))]
    found = (durations(casts, on) - on.pointwise.kernel_gap) * 1e6
    assert found == pytest.approx([up, down], rel=0.01)


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "softmax"])
@pytest.mark.parametrize(("length", "idle"), [(512, 1.0), (768, 4 / 3), (1600, 2048 / 1600), (64, 4.0)])
def test_idle_lanes_slow_a_norm_and_nothing_else(kind: str, length: int, idle: float) -> None:
    """A layer norm takes 512 elements a step: of a row of 768 the second step is half empty, yet moves as slowly."""
    a100 = profile.load("a100-80gb-sxm")
    rows, p = 2**16, replace(a100.pointwise, norm_reread=0.0)
    known = {"kind": kind, "rows": rows, "elements": rows, "hardware": a100.hardware, "parameters": p}
    floors = float(pointwise_time(0.0, 0.0, **known))
    plain, seen = (float(pointwise_time(2**30, 2**30, **known, row_elements=x)) - floors for x in (None, length))
    assert seen / plain == pytest.approx(idle if kind == "norm" else 1.0)


@pytest.mark.parametrize("device", ["a100-80gb-sxm", "h100-sxm"])
def test_a_fused_norm_by_hand(device: str) -> None:
    """It loads, computes and stores by turns: time is the root of the squares of what bytes and elements take."""
    on = profile.load(device)
    p, hw, n = on.pointwise, on.hardware, 2.0**30
    moving = 2 * 2 * n / (p.fused_norm_stream * hw.memory_bandwidth)
    computing = n / (5.8 * hw.sm_count * hw.clock_hz)
    known: dict[str, Any] = {"hardware": hw, "parameters": p, "kind": "fused_norm", "rows": 2**16, "elements": n}
    seconds = float(pointwise_time(2 * n, 2 * n, **known)) - p.launch_floor - p.kernel_gap
    assert seconds == pytest.approx((moving**2 + computing**2) ** 0.5, rel=1e-3)


@pytest.mark.parametrize(("width", "spilled"), [(4096, 0.0), (8192, 0.0), (16384, 20 * 16384 - 2**18)])
def test_a_fused_norms_backward_by_hand(width: int, spilled: float) -> None:
    """One block an SM walks over rows; of one too wide for 256 KiB of registers, the rest moves besides.

    Of each element of bf16 it holds 4 B that it reads and 16 B of fp32: weight, its gradient, product, dx.
    """
    a100 = profile.load("a100-80gb-sxm")
    p, hw, rows = a100.pointwise, a100.hardware, 2**16
    moving = rows * (6 * width + spilled) / (p.stream * hw.memory_bandwidth)
    waiting = rows / hw.sm_count * p.serial_latency
    seconds = pointwise_time(
        4 * rows * width, 2 * rows * width, kind="fused_norm_backward", rows=rows, row_elements=width, hardware=hw,
        parameters=p,
    )  # fmt: skip
    assert float(seconds) == pytest.approx(p.launch_floor + p.kernel_gap + moving + waiting, rel=2e-3)


def test_a_long_row_of_logits_is_read_twice() -> None:
    """Liger's cross entropy finds the sum of a row, then its gradient: a row of 1 MiB has left the SM by then."""
    a100 = profile.load("a100-80gb-sxm")
    known: dict[str, Any] = {"kind": "cross_entropy", "elements": 1, "hardware": a100.hardware}
    per_byte = []
    for width, rows in ((2**13, 2**14), (2**18, 2**9)):
        waits = {"rows": rows, "parameters": replace(a100.pointwise, serial_latency=0.0)}
        moved, floor = (float(pointwise_time(size, size, **known, **waits)) for size in (4.0 * rows * width, 0.0))
        per_byte.append(moved - floor)
    assert per_byte[1] / per_byte[0] == pytest.approx(1 + a100.pointwise.softmax_reread / 2, rel=0.01)


@pytest.mark.parametrize(("name", "flops"), [("linalg_qr", 8 / 3), ("_linalg_svd", 22), ("linalg_inv_ex", 8 / 3)])
def test_flops_of_decompositions_of_a_square_matrix(name: str, flops: float) -> None:
    """Golub & Van Loan's counts: QR with its Q 4mn^2 - 4/3 n^3, an SVD 14mn^2 + 8n^3, an inverse 8/3 n^3."""
    assert ROUTINES[name].flops(300, 300) == pytest.approx(flops * 300**3)


MEASURED = {  # ms of fp32 matrices (rows, columns) on server cards; sources at the top of `devices/solver.py`
    "linalg_qr": {
        (8, 8): 0.055, (64, 64): 0.21, (256, 256): 0.76, (512, 512): 1.8, (1024, 1024): 4.5, (4096, 4096): 32,
        (8192, 8): 0.11, (16, 4): 0.053, (16, 16): 0.060, (128, 32): 0.19,
    },
    "_linalg_svd": {
        (8, 8): 0.14, (16, 16): 0.21, (32, 32): 0.26, (64, 64): 1.1, (256, 256): 6.6, (1024, 1024): 54,
        (2048, 2048): 184, (4096, 4096): 1090,
    },
    "linalg_pinv.atol_rtol_tensor": {(4, 4): 0.18, (8, 8): 0.21},
    "_linalg_eigh": {(16, 16): 0.18, (32, 32): 0.43, (64, 64): 0.83},
    "linalg_inv_ex": {(32, 16): 0.13, (128, 64): 0.39, (256, 256): 0.65},
    "linalg_eig": {(3, 3): 0.35},
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_decompositions_take_what_was_measured_within_a_factor_of_two(name: str) -> None:
    """As the model says of itself; an optimizer's periodic decompositions rest on nothing else."""
    hw = profile.load("h100-sxm").hardware
    for (rows, columns), ms in MEASURED[name].items():
        assert 0.5 < float(solver_time(name, 1, rows, columns, hardware=hw)) * 1e3 / ms < 2.0, (rows, columns)


@pytest.mark.parametrize("device", ["h100-sxm", "cpu-xeon-2.5ghz-1t"])
def test_a_complex_product_is_priced_as_four_real_ones(device: str) -> None:
    """[Re A, -Im A; Im A, Re A] by [Re B; Im B]: twice the rows of C, twice the elements to sum over."""
    m, n, k = 192, 320, 96
    found = []
    for dtype, times in (("c64", 1), ("fp32", 2)):
        a, b = Spec(dtype, (4, times * m, times * k)), Spec(dtype, (4, times * k, n))
        found.append(Op("bmm", (a, b), (Spec(dtype, (4, times * m, n)),), a.nbytes + b.nbytes, 0))
    complex_seconds, real_seconds = durations(found, profile.load(device))
    assert complex_seconds == pytest.approx(real_seconds)


@pytest.mark.parametrize("device", ["h100-sxm", "cpu-xeon-2.5ghz-1t"])
def test_a_mask_beside_a_product_does_not_decide_on_which_units_it_runs(device: str) -> None:
    """LoRAFusion's backward takes dropout's mask as its last operand: the product stays one of 16-bit operands."""
    tokens, m, n, r = 1024, 2048, 4096, 16
    operands = [Spec("bf16", shape) for shape in ((tokens, m), (m, n), (tokens, r), (r, n))]
    masked = [*operands, Spec("bool", (tokens, n))]
    ops = [Op("lorafusion::dyw_dsa", tuple(x), (Spec("bf16", (tokens, n)),), 0, 0) for x in (operands, masked)]
    without, beside = durations(ops, profile.load(device))
    assert beside == without


def test_a_sum_along_rows_is_another_kernel_than_one_down_columns() -> None:
    """Down columns a GPU reads as it lies in memory only with a kernel of its own, whose bandwidth was fitted apart."""
    x = Spec("fp32", (512, 1024))
    kinds = []
    for out, dim in ((Spec("fp32", (512, 1)), 1), (Spec("fp32", (1, 1024)), 0)):
        (kernel,) = memory_bound(Op("sum.dim_IntList", (x,), (out,), x.nbytes, out.nbytes, attrs=Attrs(dims=(dim,))))
        kinds.append(kernel.kind)
    assert kinds == ["reduction", "column_reduction"]


def test_dequantisation_takes_what_was_measured() -> None:
    """bitsandbytes' kernel is bound by instructions on an A100 (1.241 ms with its scales' 20 us), by memory on an L40S.

    No figure was taken from the latter: 2,870 ms for three passes over Llama-3.1-8B's layers in 48 micro-batches.

    Sources: `pointwise.DEQUANTISE_RATE`; torch.profiler and nsys in github.com/sairameshpv/lightserve,
    training/qlora_financial/profiling/report.md at 8c650028.
    """

    def seconds(device: str, elements: float) -> float:
        on = profile.load(device)
        read, written = elements * (1 / 2 + 4 / 64), 2 * elements
        options: dict[str, Any] = {"hardware": on.hardware, "parameters": on.pointwise, "elements": elements}
        return float(pointwise_time(read, written, kind="dequantise", **options))

    assert seconds("a100-80gb-sxm", 16384**2) == pytest.approx(1.221e-3, rel=0.01)
    layers = 32 * 7
    assert layers * seconds("l40s", 6.98e9 / layers) == pytest.approx(2.870 / 48 / 3, rel=0.05)
    for elements, measured in ((4096**2, 32.9e-6), (11008 * 4096, 68.8e-6)):  # bitsandbytes, pull request 2051
        assert seconds("b300", elements) == pytest.approx(measured, rel=0.25)
