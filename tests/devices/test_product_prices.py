"""Prices of matrix products, by hand from datasheet figures and fitted parameters, or as others measured them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perfmodel.devices import profile
from perfmodel.devices.alignment import padding
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.gemm_parameters import LAYOUTS, GemmParameters, Layout
from perfmodel.devices.price import durations
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


def test_a_write_to_l2_costs_what_the_halves_of_an_l2_make_of_it() -> None:
    """An adapter's output, 16 MB of 8192 x 1024 with k = 32, stays in a B200's L2: each step of the cost is one pass.

    The rate of a pass: SMs load a byte for every `tile_balance` FLOPs, all of them 2,250e12 / 44.5 = 50.6 TB/s; their
    L2 holds 0.19 of that in a pass over everything.
    """
    b200 = profile.load("b200")
    p, hw = replace(b200.gemm["bf16"].in_bursts(), overlap_loss=0.0), b200.hardware
    seconds = [
        float(gemm_time(8192, 1024, 32, hardware=hw, parameters=replace(p, l2_write_cost=cost))) for cost in (4.0, 5.0)
    ]
    one_pass = 2 * 8192 * 1024 / (hw.peak("bf16") / p.tile_balance * p.l2_stream)
    assert seconds[1] - seconds[0] == pytest.approx(one_pass, rel=0.02)


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


LONG_PRODUCTS = {  # TFLOP/s of n x n products in 16 bit, n = 8,192 and 10,240, by the sources of `mma_energy`
    "rtx-a4000": 56.0, "a40": 116.4, "rtx-a6000": 123.3, "l4": 58.2, "a100-40gb-pcie": 213.5, "h100-pcie": 482.0,
    "rtx-a2000": 28.9, "rtx-pro-6000": 342.0, "rtx-pro-6000-server": 402.0, "v100": 93.4, "t4": 24.0,
    "rtx-3060": 25.4, "rtx-3080": 64.1, "rtx-4060-ti": 43.9, "rtx-4070-super": 75.4, "rtx-4070-ti-super": 90.9,
    "rtx-4090": 165.0, "rtx-5060-ti": 48.1, "rtx-5080": 102.6, "a10g": 68.0,
}  # fmt: skip


@pytest.mark.parametrize(("name", "rate"), LONG_PRODUCTS.items())
def test_long_16_bit_products_run_as_fast_as_the_board_may(name: str, rate: float) -> None:
    """A card's datasheet promises up to 2.7 times as much: its power decides, which class defaults cannot know.

    GeForce cards, at half rate, are not short of it: they run up to an eighth above their datasheet's clock.
    """
    device, n = profile.load(name), np.array([8192, 10240])
    assert device.fitted["gemm.bf16"] != "fitted"
    seconds = gemm_time(n, n, n, hardware=device.hardware, parameters=device.gemm["fp16"], dtype="fp16")
    assert float(np.mean(2e-12 * n**3 / seconds)) == pytest.approx(rate, rel=0.13)


# Of profiles of real programs: us of the products of each call. Qwen1.5-0.5B, 16 x 559 tokens, forward
# (github.com/AMD-AGI/TraceLens, tests/traces/h100); SmolLM2-135M, 20 forwards and backwards of 256 tokens
# (github.com/Sagar063/Week13_ERAV4_SmolLM2_135M_RoPE_GQA_RMSNorm, proof_sdpa_on/profiles).
QWEN, SMOL, SMOL_WIDTHS = (
    16 * 559,
    256,
    ((576, 576, 60), (576, 192, 60), (576, 1536, 60), (1536, 576, 30), (576, 49152, 1)),
)
PROFILED = {
    "addmm of Qwen": ("h100-sxm", [(QWEN, 1024, 1024, "tn", 72)], 2266),
    "mm of Qwen": (
        "h100-sxm", [(QWEN, 1024, 1024, "tn", 24), (QWEN, 2816, 1024, "tn", 48), (QWEN, 1024, 2816, "tn", 24)], 6588
    ),
    "mm of SmolLM2's linear": ("rtx-4060-ti-16gb", [(SMOL, n, k, "tn", 20 * x) for k, n, x in SMOL_WIDTHS], 63_759),
    "mm of SmolLM2's MmBackward0": (
        "rtx-4060-ti-16gb",
        [of for k, n, x in SMOL_WIDTHS for of in ((SMOL, k, n, "nn", 20 * x), (n, k, SMOL, "nt", 20 * x))],
        128_199,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "products", "measured"), PROFILED.values(), ids=PROFILED)
def test_products_inside_real_models_take_as_long_as_priced(name: str, products: list[Any], measured: float) -> None:
    """Fits see products alone, back to back; in a model their operands come from memory and other kernels between."""
    device = profile.load(name)
    p, hw = device.gemm["bf16"], device.hardware
    priced = sum(
        times * float(gemm_time(m, n, k, hardware=hw, parameters=p, layout=way)) for m, n, k, way, times in products
    )
    assert priced == pytest.approx(measured * 1e-6, rel=0.12)


def test_an_l40_runs_its_products_within_300_watts() -> None:
    """Tensor cores at half rate draw as much a clock: 2.48 pJ a FLOP leave 121 of the datasheet's 181 TFLOP/s."""
    l40 = profile.load("l40")
    seconds = float(gemm_time(8192, 8192, 8192, hardware=l40.hardware, parameters=l40.gemm["bf16"]))
    joules = 2 * 8192**3 * 2.48e-12 + 3 * 8192**2 * 2 * 60e-12
    assert seconds == pytest.approx(joules / 300, rel=0.01)
    assert l40.hardware.limit("tf32") == (pytest.approx(2 * 2.48e-12), 300)
    assert l40.hardware.limit("fp32") == (10.5e-12, 300)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("t4", "fp32"), ("l4", "fp32"), ("p4", "fp32"), ("a100-40gb-pcie", "fp32"), ("l40s", "fp32"),
        ("l40", "bf16"), ("h100-pcie", "bf16"), ("rtx-a4000", "tf32"),
    ],
)  # fmt: skip
def test_no_product_draws_more_than_its_board_may(name: str, dtype: str) -> None:
    """Energy over time stays below the limit; where no product can reach it, the shorter sum without it is the same."""
    device = profile.load(name)
    p, hw = device.gemm[dtype], device.hardware
    m, n, k = np.array([[7, 100, 513, 2048, 8192], [64, 4096, 100, 2048, 3000], [4096, 64, 2048, 33, 8192]])
    seconds = gemm_time(m, n, k, hardware=hw, parameters=p, dtype=dtype)
    energy, power = hw.limit(dtype)
    assert power == hw.board_power - ((hw.idle_power or 0.0) if dtype == "fp32" else 0.0)
    assert (2 * m * n * k * p.power_share * energy <= seconds * power).all()
    strong = gemm_time(m, n, k, hardware=replace(hw, board_power=1e5), parameters=p, dtype=dtype)
    unlimited = gemm_time(m, n, k, hardware=replace(hw, board_power=None), parameters=p, dtype=dtype)
    assert strong == pytest.approx(unlimited, rel=1e-12)
    assert (seconds >= strong * (1 - 1e-12)).all()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("t4", "fp32"), ("l4", "fp32"), ("a100-40gb-pcie", "fp32"), ("a40", "bf16"), ("h100-nvl", "bf16")],
)
def test_whether_a_board_can_reach_its_limit_changes_no_price(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    """The question saves a sum where the answer is no: a no too many would let a board draw more than it may."""
    device = profile.load(name)
    p, hw = device.gemm[dtype], device.hardware
    m, n, k = np.array([[64, 2048, 8192, 33], [4096, 4096, 8192, 128], [2048, 1024, 8192, 64]])
    boards = [replace(hw, board_power=(hw.idle_power or 0.0) + watts) for watts in np.geomspace(20, 600, 40)]

    def seconds() -> list[np.ndarray]:
        return [gemm_time(m, n, k, hardware=board, parameters=p, dtype=dtype) for board in boards]

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


def test_padding_rounds_sides_along_memory_up_and_copies_what_changes() -> None:
    """Columns always, rows where they lie along A's memory (nt), else the depth; the operands that grow are copied."""
    layouts = np.array([LAYOUTS.index("nn"), LAYOUTS.index("nt")])
    (m, n, k, batch), copied = padding(13, 16, 21, 2, layouts)
    assert (m.tolist(), n, k.tolist(), batch) == ([13, 16], 16, [24, 21], 2)
    assert copied.tolist() == [2 * 2 * (13 * 21 + 21 * 16), 2 * 2 * 13 * 21]
