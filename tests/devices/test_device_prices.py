"""Prices of single kernels, each recomputed by hand from datasheet figures and fitted parameters."""

from dataclasses import replace

import numpy as np
import pytest

from perfmodel.devices import profile
from perfmodel.devices.attention import attention_backward_time, attention_flops, attention_forward_time
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.gemm_parameters import GemmParameters, Layout
from perfmodel.devices.kernels import memory_bound
from perfmodel.devices.pointwise import KINDS, pointwise_time
from perfmodel.devices.price import durations
from perfmodel.devices.solver import ROUTINES, solver_time
from perfmodel.program.op import Attrs, Op, Spec


def test_a_big_square_gemm_by_hand() -> None:
    """The whole model in one sum: 8192 cubed on an A100 SXM is bound by math.

    FLOPs          2 * 8192**3 = 1.0995e12; at 312e12 FLOP/s 3.524 ms
    burst math     3.524 ms / math_efficiency (1.000)
    waves          tiles of 256 x 128: 2048 blocks on 108 SMs = 18.96; of the rest to 19, 76 % is paid: 18.99, 3.531 ms
    barriers       3.5 clocks for each of 8192 elements of k and each wave, at 1.41 GHz: 0.386 ms
    drains         6.7 * 256 * 128 * 2 B at 90.5 GB/s (312e12 / 108 / 31.9) for each wave: 0.092 ms
    derating       1 + 0.115 * 4.009/(4.009 + 1.8) = 1.079: 4.33 ms
    launch         4360 clocks / 1.41 GHz = 0.003 ms
    sum            4.30 ms, 82 % of peak, and a little for the 0.25 ms of memory traffic beside it
    """
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.gemm["bf16"], a100.hardware
    math = 2 * 8192**3 / (hw.peak("bf16") * p.math_efficiency * p.sustained)
    x = 32 * 64 / 108
    waves = x + p.wave_tail * (np.ceil(x) - x)
    sm_load = hw.peak("bf16") / 108 / p.tile_balance
    bubbles = waves * 8192 * p.k_bubble / hw.clock_hz
    drains = waves * 256 * 128 * p.epilogue * 2 / sm_load
    busy = math * waves / x + bubbles + drains
    sm_time = busy * (1 + p.derating * busy / (busy + p.derating_time))
    memory = 3 * 8192**2 * 2 / (hw.memory_bandwidth * p.memory_efficiency)  # at most: all from DRAM
    launch = p.launch_clocks / hw.clock_hz
    seconds = float(gemm_time(8192, 8192, 8192, hardware=hw, parameters=p))
    assert launch + sm_time <= seconds <= launch + sm_time + p.overlap_loss * memory**2 / sm_time
    assert 0.7 < 2 * 8192**3 / seconds / hw.peak("bf16") < 1.0


def test_a_board_of_70_watts_by_hand() -> None:
    """A T4 runs fp32 at two thirds of its datasheet's rate within a step: its power, not its peak, is the limit.

    Idle at its highest clock it draws 27 of its 70 W. A block of 128 x 128 costs for each k 2 * 128 * 128 FLOPs and
    loads 256 operands of 4 B, whose energy counts as some FLOPs a byte; each FLOP takes `power_share` of 19.1 pJ, each
    byte of the three matrices 60 pJ.
    """
    t4 = profile.load("t4")
    p, hw = t4.gemm["fp32"], t4.hardware
    flops = 2 * 4096**3
    joules = flops * (1 + 256 * 4 * p.load_energy / (2 * 128 * 128)) * p.power_share * 19.1e-12
    joules += 3 * 4096**2 * 4 * 60e-12
    seconds = float(gemm_time(4096, 4096, 4096, hardware=hw, parameters=p, dtype="fp32"))
    assert 0.98 * joules / (70 - 27) < seconds < 1.2 * joules / (70 - 27)
    assert 0.5 < flops / seconds / hw.fp32_flops < 0.75
    unlimited = replace(hw, board_power=None)
    assert float(gemm_time(4096, 4096, 4096, hardware=unlimited, parameters=p, dtype="fp32")) < 0.85 * seconds


@pytest.mark.parametrize("name", ["t4", "l4", "p4", "a100-40gb-pcie", "l40s"])
def test_no_product_draws_more_than_its_board_may(name: str) -> None:
    """Energy over time stays below the limit; where no product can reach it, the shorter sum without it is the same."""
    device = profile.load(name)
    p, hw = device.gemm["fp32"], device.hardware
    m, n, k = np.array([[7, 100, 513, 2048, 8192], [64, 4096, 100, 2048, 3000], [4096, 64, 2048, 33, 8192]])
    seconds = gemm_time(m, n, k, hardware=hw, parameters=p, dtype="fp32")
    joules = 2 * m * n * k * p.power_share * hw.flop_energy
    assert (joules <= seconds * (hw.board_power - hw.idle_power if hw.idle_power else hw.board_power)).all()
    strong = gemm_time(m, n, k, hardware=replace(hw, board_power=1e5), parameters=p, dtype="fp32")
    unlimited = gemm_time(m, n, k, hardware=replace(hw, board_power=None), parameters=p, dtype="fp32")
    assert strong == pytest.approx(unlimited, rel=1e-12)
    assert (seconds >= strong * (1 - 1e-12)).all()


@pytest.mark.parametrize("name", ["t4", "l4", "a100-40gb-pcie"])
def test_whether_a_board_can_reach_its_limit_changes_no_price(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The question saves a sum where the answer is no: a no too many would let a board draw more than it may."""
    device = profile.load(name)
    p, hw = device.gemm["fp32"], device.hardware
    m, n, k = np.array([[64, 2048, 8192, 33], [4096, 4096, 8192, 128], [2048, 1024, 8192, 64]])
    boards = [replace(hw, board_power=(hw.idle_power or 0.0) + watts) for watts in np.geomspace(20, 600, 40)]

    def seconds() -> list[np.ndarray]:
        return [gemm_time(m, n, k, hardware=board, parameters=p, dtype="fp32") for board in boards]

    asked = seconds()
    monkeypatch.setattr("perfmodel.devices.gemm._can_reach_the_limit", lambda *of: True)
    for short, whole in zip(asked, seconds(), strict=True):
        assert short == pytest.approx(whole, rel=1e-9)


def test_a_wide_sm_loads_no_faster() -> None:
    """An SM of an L4 has twice the fp32 units of one of an A100; L2 feeds both with as many bytes a clock."""
    assert profile.load("a100-80gb-sxm").hardware.lanes == pytest.approx(1.0, rel=0.03)
    l4 = profile.load("l4").hardware
    assert l4.lanes == pytest.approx(2.0, rel=0.03)
    slow = GemmParameters(tile_balance=60.0, tiles=((32, 32),), k_step=8)  # loads alone decide
    narrow = replace(l4, fp32_flops=l4.fp32_flops / 2)
    wide, half = (gemm_time(4096, 4096, 512, hardware=h, parameters=slow, dtype="fp32") for h in (l4, narrow))
    assert float(wide) == pytest.approx(float(half), rel=0.01)


def test_a_one_row_gemm_by_hand() -> None:
    """A mat-vec product reads its weight once: 16384**2 * 2 B = 537 MB at 0.78 * 2.039 TB/s = 336 us, and a floor."""
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.gemm["bf16"], a100.hardware
    weight = 16384**2 * 2 / (hw.memory_bandwidth * p.memory_efficiency)
    seconds = float(gemm_time(1, 16384, 16384, hardware=hw, parameters=p))
    assert weight < seconds < 1.35 * weight


UNALIGNED = [  # device, (m, n, k), layout, us, of products whose sides are no multiples of 8; sources: `alignment`
    ("h100-sxm", (141, 30522, 512), "tn", 41.28),
    ("h200", (72000, 3072, 3073), "tn", 14200.0),  # 3,072: the pointers were odd
    ("h200", (72000, 14336, 3073), "tn", 64000.0),
    ("b200", (1157, 1157, 4096), "nt", 99.1),  # https://github.com/pytorch/pytorch/pull/196992
    ("rtx-5090", (400, 1018, 256), "tn", 4.45),
    ("rtx-4090", (2055, 2055, 2055), "nn", 150.1),
    ("rtx-4090", (2073, 2073, 2073), "nn", 159.1),
    ("rtx-a6000", (8192, 50257, 576), "tn", 8710.0),
    ("rtx-a6000", (8192, 576, 50257), "nn", 7113.0),
    ("rtx-a6000", (50257, 576, 8192), "nt", 6475.0),
]


@pytest.mark.parametrize(("device", "sides", "layout", "measured"), UNALIGNED)
def test_products_of_unaligned_sides_take_what_others_measured(
    device: str, sides: tuple[int, int, int], layout: Layout, measured: float
) -> None:
    """Older kernels run them, up to 8 times slower: GPT-2's vocabulary is odd, BERT's no multiple of 4."""
    on = profile.load(device)
    seconds = gemm_time(*sides, hardware=on.hardware, parameters=on.gemm["bf16"], layout=layout)
    assert seconds * 1e6 == pytest.approx(measured, rel=0.15)


def test_fp32_products_of_any_side_run_alike() -> None:
    """Their threads load 4 bytes anyway: a T4 takes 4 % longer for 50,257 columns than for 50,304."""
    t4 = profile.load("t4")
    odd, whole = (
        gemm_time(13700, n, 768, hardware=t4.hardware, parameters=t4.gemm["fp32"], dtype="fp32") for n in (50257, 50304)
    )
    assert odd == pytest.approx(float(whole), rel=0.05)


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


def test_an_addition_by_hand() -> None:
    """c = a + b on 2**28 bf16 elements: 3 * 537 MB at `stream` * 2.039 TB/s, a floor and a gap."""
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.pointwise, a100.hardware
    expected = p.launch_floor + p.kernel_gap + 3 * 2 * 2**28 / (p.stream * hw.memory_bandwidth)
    seconds = pointwise_time(2 * 2 * 2**28, 2 * 2**28, hardware=hw, parameters=p)
    assert float(seconds) == pytest.approx(expected, rel=0.01)
    assert 0.7 < p.stream < 1.0


def test_an_addition_in_l2_by_hand() -> None:
    """Half of it comes from L2 where its operands just fill it, all of it where they are small."""
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.pointwise, a100.hardware
    full = p.l2_usable * hw.l2_bytes
    for moved, from_l2 in ((full / 100, 1.0), (full, 0.5), (100 * full, 0.0)):
        stream = moved / hw.memory_bandwidth * ((1 - from_l2) / p.stream + from_l2 / p.l2_ratio)
        seconds = pointwise_time(2 / 3 * moved, moved / 3, hardware=hw, parameters=p)
        assert float(seconds) == pytest.approx(p.launch_floor + p.kernel_gap + stream, rel=1e-4)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.rate])
def test_a_kernel_of_many_instructions_by_hand(kind: str) -> None:
    """Elements at so many a clock and SM, where that takes longer than their bytes; the larger side has 4 B each."""
    a100 = profile.load("a100-80gb-sxm")
    slow, n = replace(a100.pointwise, **{str(KINDS[kind].rate): 0.01}), 2.0**20
    busy = n / (0.01 * a100.hardware.sm_count * a100.hardware.clock_hz)
    for sizes, told in (((4 * n, n), {}), ((n, 4 * n), {}), ((n, n), {"elements": n})):
        seconds = pointwise_time(*sizes, hardware=a100.hardware, parameters=slow, kind=kind, **told)
        assert float(seconds) == pytest.approx(slow.launch_floor + slow.kernel_gap + busy, rel=1e-9)


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


def test_a_compiler_pads_the_products_that_eager_pytorch_pays_for() -> None:
    """Inductor copies operands to aligned rows; what is aligned, or in fp32, stays as it is."""

    def seconds(columns: int, dtype: str, padded: bool) -> float:
        a, b = Spec(dtype, (8192, 768)), Spec(dtype, (768, columns))
        out = Spec(dtype, (8192, columns))
        op = Op("mm", (a, b), (out,), a.nbytes + b.nbytes, out.nbytes, attrs=Attrs("tn", padded=padded))
        return float(durations([op], profile.load("a100"))[0])

    eager, compiled = seconds(50257, "bf16", False), seconds(50257, "bf16", True)
    aligned, copy = seconds(50264, "bf16", False), 2 * 2 * 768 * 50257 / 2.04e12
    assert eager > 2 * compiled
    assert aligned + copy < compiled < aligned + 1.5 * copy
    assert seconds(50264, "bf16", True) == aligned
    assert seconds(50257, "fp32", True) == seconds(50257, "fp32", False)
