"""The price models behave like physics on every device: finite, positive, never less time for more work."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import Device
from perfmodel.devices import gemm, profile
from perfmodel.devices.attention import attention_backward_time, attention_forward_time
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.gemm_parameters import LAYOUTS, Layout, layout_index
from perfmodel.devices.pointwise import KINDS, pointwise_time
from perfmodel.devices.profile import DeviceProfile
from perfmodel.program.software import SoftwareStack

NAMES = profile.names()
FITTED_BF16 = [n for n in NAMES if profile.load(n).kind == "cuda" and profile.load(n).fitted["gemm.bf16"] == "fitted"]
sizes = st.integers(1, 2**17)
small = st.integers(1, 512)
devices = st.sampled_from(NAMES)


def prices(device: DeviceProfile, m: int, n: int, k: int, b: int) -> list[Any]:
    """One call of every model, with sizes that some op could have."""
    hw = device.hardware
    heads: dict[str, Any] = {
        "heads": 2 * b,
        "kv_heads": b,
        "head_dim": 1 + n % 256,
        "hardware": hw,
        "parameters": device.attention,
    }
    return [
        *(gemm_time(m, n, k, b, hardware=hw, parameters=device.gemm[d], dtype=d) for d in device.gemm),
        gemm_time(m, n, k, hardware=hw, parameters=device.gemm["bf16"], layout="nt", output_itemsize=4),
        gemm_time(m, n, k, hardware=hw, parameters=device.gemm["bf16"], accumulate=True),
        attention_forward_time(b, m, m, **heads),
        attention_backward_time(b, m, k, **heads, causal=False),
        *(
            pointwise_time(
                2 * m * n, 4 * m * n, kind=kind, rows=m, elements=m * n, row_elements=n, hardware=hw,
                parameters=device.pointwise,
            )
            for kind in KINDS
        ),
    ]  # fmt: skip


@given(devices, sizes, sizes, sizes, small)
@settings(max_examples=60)
def test_prices_are_finite_and_positive(name: str, m: int, n: int, k: int, b: int) -> None:
    """No size may break a sweep."""
    with np.errstate(all="raise", under="ignore"):
        found = prices(profile.load(name), m, n, k, b)
    assert all(np.isfinite(t) and t > 0 for t in found)


K_STEP = 0.98  # doubling k may shorten a bf16 product by up to 2 %: a split that leaves fewer waves becomes possible


@given(st.sampled_from(FITTED_BF16), sizes, sizes, sizes, small)
@settings(max_examples=150)
def test_more_work_never_takes_less_time_in_gemm(name: str, m: int, n: int, k: int, b: int) -> None:
    """Predictions that fall with more work would give absurd advice; sides that other kernels run have a law below."""
    device = profile.load(name)
    kwargs: dict[str, Any] = {"hardware": device.hardware, "parameters": device.gemm["bf16"]}
    n, k = 8 * n, 8 * k
    base = gemm_time(m, n, k, b, **kwargs)
    assert gemm_time(2 * m, n, k, b, **kwargs) >= base * 0.9999
    assert gemm_time(m, 2 * n, k, b, **kwargs) >= base * 0.9999
    assert gemm_time(m, n, k, 2 * b, **kwargs) >= base * 0.9999
    assert gemm_time(m, n, 2 * k, b, **kwargs) >= base * K_STEP


@given(devices, sizes, sizes, sizes, small, st.sampled_from(LAYOUTS))
@settings(max_examples=150)
def test_a_side_beyond_a_multiple_of_8_never_costs_less(
    name: str, m: int, n: int, k: int, b: int, layout: Layout
) -> None:
    """The kernels of other generations that run it must not seem a way out: padding is, and advice says so."""
    device = profile.load(name)
    kwargs: dict[str, Any] = {"hardware": device.hardware, "parameters": device.gemm["bf16"], "layout": layout}
    sides = [8 * x for x in (m, n, k)]
    even, odd = (gemm_time(*(x + more for x in sides), b, **kwargs) for more in (2, 1))
    assert gemm_time(*sides, b, **kwargs) * K_STEP <= min(even, odd)


@given(devices, sizes, small, st.integers(1, 128), st.sampled_from([16, 32, 64, 128]), st.booleans())
@settings(max_examples=150)
def test_more_work_never_takes_less_time_in_attention(
    name: str, seq: int, batch: int, heads: int, dim: int, causal: bool
) -> None:
    """The same for attention, forward and backward, by FlashAttention-2 and by cuDNN; but a wide head's CTA may be half
    as large as a narrow one's, and then done sooner.
    """
    device = profile.load(name)
    for time, p in itertools.product(
        (attention_forward_time, attention_backward_time), (device.attention, device.cudnn_attention)
    ):
        kwargs: dict[str, Any] = {"hardware": device.hardware, "parameters": p, "causal": causal}
        base = time(batch, seq, seq, heads, heads, dim, **kwargs) * 0.9999
        assert time(2 * batch, seq, seq, heads, heads, dim, **kwargs) >= base
        assert time(batch, 2 * seq, 2 * seq, heads, heads, dim, **kwargs) >= base
        assert time(batch, seq, seq, 2 * heads, 2 * heads, dim, **kwargs) >= base
        assert time(batch, seq, seq, heads, heads, 2 * dim, **kwargs) >= base / (p.row_tiles if dim == 128 else 1)
        one, two = (time(batch, seq, seq, heads, heads, dim, item, **kwargs) for item in (1, 2))  # with a mask
        assert two > one > time(batch, seq, seq, heads, heads, dim, **kwargs)


@given(devices, sizes, small, sizes)
@settings(max_examples=100)
def test_a_wider_window_is_never_cheaper(name: str, seq: int, heads: int, window: int) -> None:
    """Up to no window at all, which one as wide as the sequence is."""
    device = profile.load(name)
    for time, p in itertools.product(
        (attention_forward_time, attention_backward_time), (device.attention, device.cudnn_attention)
    ):
        price = partial(time, 2, seq, seq, heads, heads, 128, hardware=device.hardware, parameters=p)
        assert price(window=window) <= price(window=2 * window) * (1 + 1e-9)
        assert price(window=window) <= price() * (1 + 1e-9)
        assert price(window=seq) == price()


@given(devices, st.sampled_from(sorted(KINDS)), st.floats(0, 1e12), st.floats(0, 1e12))
@settings(max_examples=200)
def test_more_bytes_never_take_less_time(name: str, kind: str, read: float, written: float) -> None:
    """The same for memory-bound kernels, across the edge of L2 too."""
    device = profile.load(name)
    kwargs: dict[str, Any] = {"hardware": device.hardware, "parameters": device.pointwise, "kind": kind}
    base = pointwise_time(read, written, **kwargs) * 0.9999
    assert pointwise_time(2 * read, written, **kwargs) >= base
    assert pointwise_time(read, 2 * written, **kwargs) >= base
    assert pointwise_time(2 * read, 2 * written, **kwargs) >= base


def test_a_grid_equals_its_points() -> None:
    """A sweep is one vectorised prediction: broadcasting must not change a number."""
    h100 = profile.load("h100-sxm")
    hw, m, n = h100.hardware, np.array([[1], [100], [5000]]), np.array([32, 4096])
    grid = gemm_time(m, n, 1024, 2, hardware=hw, parameters=h100.gemm["bf16"])
    attention = attention_forward_time(m, n, n, 8, 2, 128, hardware=hw, parameters=h100.attention)
    softmax = pointwise_time(
        4 * m * n, 4 * m * n, kind="softmax", rows=m, row_elements=n, hardware=hw, parameters=h100.pointwise
    )
    for i, j in itertools.product(range(3), range(2)):
        a, b = int(m[i, 0]), int(n[j])
        assert grid[i, j] == gemm_time(a, b, 1024, 2, hardware=hw, parameters=h100.gemm["bf16"])
        assert attention[i, j] == attention_forward_time(a, b, b, 8, 2, 128, hardware=hw, parameters=h100.attention)
        one = pointwise_time(
            4 * a * b, 4 * a * b, kind="softmax", rows=a, row_elements=b, hardware=hw, parameters=h100.pointwise
        )
        assert softmax[i, j] == one


@pytest.mark.parametrize(("name", "dtype"), [("a100-80gb-sxm", "fp32"), ("t4", "fp32"), ("h100-sxm", "bf16")])
def test_products_priced_together_cost_what_they_cost_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: str
) -> None:
    """Layouts, alignments and tiles of many products in one call, or each product with one tile after another."""
    device = profile.load(name)
    p = device.gemm[dtype]
    shapes = np.array(
        [(840, 3072, 3072), (32, 840, 3072), (3072, 32, 840), (8, 8, 8192), (141, 30522, 512), (197, 197, 64)],
        dtype=float,
    ).T
    layouts, batch = ("tn", "nn", "nt", "tn", "tn", "nn"), np.array([1.0, 1.0, 1.0, 12.0, 1.0, 96.0])
    b_copies, accumulate = np.array([np.inf, np.inf, 1.0, 1.0, np.inf, 1.0]), np.array([False, True, *4 * [False]])
    fixed: dict[str, Any] = {"hardware": device.hardware, "parameters": p, "dtype": dtype}
    of_layouts = np.array([layout_index(layout) for layout in layouts])
    together = gemm_time(*shapes, batch, layout=of_layouts, b_copies=b_copies, accumulate=accumulate, **fixed)
    monkeypatch.setattr(gemm, "TOGETHER", 1)
    for i, layout in enumerate(layouts):
        alone = gemm_time(
            *shapes[:, i], batch[i], layout=layout, b_copies=b_copies[i], accumulate=accumulate[i], **fixed
        )
        assert together[i] == pytest.approx(float(alone), rel=1e-14)


def test_operands_in_l2_are_cheaper() -> None:
    """A small weight that was just used is not read from DRAM again."""
    l40s = profile.load("l40s")
    kwargs: dict[str, Any] = {"hardware": l40s.hardware, "parameters": l40s.gemm["bf16"]}
    assert gemm_time(16, 4096, 4096, **kwargs, b_copies=1.0) < gemm_time(16, 4096, 4096, **kwargs)


def test_a_thin_gemm_wastes_the_tensor_cores() -> None:
    """Rank 8 and rank 32 cost nearly the same: the reason why LoRA's FLOPs say little about its time."""
    h100 = profile.load("h100-sxm")
    kwargs: dict[str, Any] = {"hardware": h100.hardware, "parameters": h100.gemm["bf16"]}
    assert gemm_time(16384, 32, 4096, **kwargs) < 1.1 * gemm_time(16384, 8, 4096, **kwargs)
    assert gemm_time(16384, 4096, 4096, **kwargs) < 30 * gemm_time(16384, 32, 4096, **kwargs)


def test_unknown_layouts_and_kinds_are_named() -> None:
    """A typing error in code must not be priced as something else."""
    a100 = profile.load("a100")
    with pytest.raises(ValueError, match="layout"):
        gemm_time(1, 1, 1, hardware=a100.hardware, parameters=a100.gemm["bf16"], layout="tt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="softmax"):
        pointwise_time(1, 1, hardware=a100.hardware, parameters=a100.pointwise, kind="softmx")


@given(m=st.integers(1, 8192), n=st.integers(1, 32768), k=st.integers(1, 16384), batch=st.integers(1, 8))
def test_products_of_older_cuda_are_slower_on_hopper_alone(m: int, n: int, k: int, batch: int) -> None:
    """cuBLAS 12.6 Update 2 made 16-bit products on Hopper faster, and none slower (`SoftwareStack.early_products`)."""
    stacks = [SoftwareStack.of(f"torch=2.6,cuda={cuda}") for cuda in ("12.4", "12.6")]

    def seconds(device: str, dtype: str) -> list[float]:
        on = [profile.load(device).under(stack) for stack in stacks]
        return [
            float(gemm_time(m, n, k, batch, hardware=p.hardware, parameters=p.gemm[dtype], dtype=dtype)) for p in on
        ]

    for device in ("h100-sxm", "h200", "h100-pcie", "h100-nvl", "gh200"):
        older, newer = seconds(device, "bf16")
        assert older >= newer * (1 - 1e-12)
        older, newer = seconds(device, "fp32")
        assert older == newer
    for device in ("a100-80gb-sxm", "l40s", "b200"):
        older, newer = seconds(device, "bf16")
        assert older == newer


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", [n for n in NAMES if profile.load(n).hardware.tf32_flops])
def test_fp32_attention_takes_three_products_in_tf32(name: str, backward: bool) -> None:
    """Its rate stays below a third of the tensor cores' (5,120 tokens, not causal: 4 FLOPs a dim, 10 backward)."""
    hardware, tokens, heads, dim = profile.load(name).hardware, 5120, 32, 128
    seconds = Device.load(name).attention(
        1, tokens, heads, dim, causal=False, dtype="fp32", kernel="efficient", backward=backward
    )
    flops = (10 if backward else 4) * heads * tokens**2 * dim
    assert flops / seconds < hardware.peak("tf32") / 3
