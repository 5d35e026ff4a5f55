"""Devices: every figure has a source, the price models behave like physics, and bad files end in one clear line."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.devices import profile
from perfmodel.devices.attention import attention_backward_time, attention_flops, attention_forward_time
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.hardware import Hardware
from perfmodel.devices.pointwise import KINDS, pointwise_time
from perfmodel.devices.profile import BLOCKS, DEVICES, DeviceProfile
from perfmodel.errors import UserError

NAMES = profile.names()
CUDA = [n for n in NAMES if profile.load(n).kind == "cuda"]
FITTED_BF16 = [n for n in CUDA if profile.load(n).fitted["gemm.bf16"] == "fitted"]
# Dense FLOPs a clock and SM: (fp32 units, tensor cores on 16-bit operands with fp32 accumulation; TF32 is half).
# NVIDIA's architecture white papers and the compute-capability table of the CUDA programming guide.
FLOPS_PER_CLOCK: dict[str, tuple[int, int | None]] = {
    "6.0": (128, None), "6.1": (256, None), "7.0": (128, 1024), "7.5": (128, 1024), "8.0": (128, 2048),
    "8.6": (256, 1024), "8.9": (256, 1024), "9.0": (256, 4096), "10.0": (256, 8192), "10.3": (256, 8192),
    "12.0": (256, 1024),
}  # fmt: skip


def table(name: str) -> dict[str, Any]:
    return tomllib.loads((DEVICES / f"{name}.toml").read_text())


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("name", NAMES)
def test_every_datasheet_figure_has_a_source(name: str) -> None:
    """A number without a source cannot be checked by anybody."""
    values = table(name)
    assert set(values["datasheet"]) == set(values["source"])
    if values["kind"] == "cuda":
        assert all(url.startswith("http") for url in values["source"].values())


@pytest.mark.parametrize("name", CUDA)
def test_peaks_follow_from_units_and_clock(name: str) -> None:
    """Datasheets quote sparse peaks and other clocks; a peak 3 % off needs a `# differs:` comment that names it."""
    hw, values = profile.load(name).hardware, table(name)
    simt, tensor = FLOPS_PER_CLOCK[values["compute_capability"]]
    rates = {"fp32_flops": simt}
    if tensor is not None:
        tensor //= 2 if hw.half_rate else 1
        rates |= {"fp16_flops": tensor, "bf16_flops": tensor, "tf32_flops": tensor // 2}
    lines = (DEVICES / f"{name}.toml").read_text().splitlines()
    explained = {key for line in lines if line.startswith("# differs:") for key in line.split(":")[1].split()}
    for key in (k for k in values["datasheet"] if k.endswith("_flops")):
        off = values["datasheet"][key] / (hw.sm_count * hw.clock_hz * rates[key]) - 1
        assert abs(off) < (0.30 if key in explained else 0.03), f"{key} is {off:+.1%} off"


def test_names_and_aliases_are_unique_and_resolve_in_any_case() -> None:
    """Users type A100, a100-sxm or the file's name and must get one and the same device."""
    seen = list(NAMES)
    for name in NAMES:
        for alias in table(name)["aliases"]:
            seen.append(alias.lower())
            assert profile.load(alias.upper()).slug == name
    assert len(seen) == len(set(seen))
    assert "classes" not in NAMES
    assert profile.load("h100") is profile.load("H100-SXM")


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_where_it_comes_from(name: str) -> None:
    """A prediction's interval and its notes rest on provenance and residuals."""
    device = profile.load(name)
    for block in BLOCKS:
        assert device.provenance[block]["source"]
        assert 0 < device.residuals[block]["median"] <= device.residuals[block]["p90"] < 1.5
        assert device.fitted[block] in ("fitted", "sibling", "class")
        if device.fitted[block] == "fitted":
            assert device.provenance[block]["rows_fitted"] > 0
    assert set(device.gemm) == {"bf16", "fp16", "tf32", "fp32"}


def test_a_device_without_own_rows_is_less_certain() -> None:
    """Class defaults must widen the interval, not narrow it."""
    for block in ("gemm.bf16", "gemm.fp32", "pointwise"):
        a100 = profile.load("a100-80gb-pcie").residuals[block]
        assert profile.load("rtx-3090").residuals[block]["p90"] > a100["p90"]


def test_dtypes_without_tensor_cores_fall_back_to_the_fp32_units() -> None:
    """A V100 has no bf16 tensor cores; its fp16 ones exist."""
    v100, p100 = profile.load("v100"), profile.load("p100")
    assert v100.hardware.peak("bf16") == v100.hardware.fp32_flops < v100.hardware.peak("fp16")
    assert v100.gemm["bf16"] == v100.gemm["fp32"] != v100.gemm["fp16"]
    assert p100.hardware.peak("fp16") == p100.hardware.fp32_flops
    a100 = profile.load("a100").hardware
    assert a100.peak("bf16", tensor_cores=False) == a100.fp32_flops


# ---------------------------------------------------------------- by hand


def test_a_big_square_gemm_by_hand() -> None:
    """The whole model in one sum: 8192 cubed on an A100 SXM is bound by math.

    FLOPs          2 * 8192**3 = 1.0995e12; at 312e12 FLOP/s 3.524 ms
    burst math     3.524 ms / math_efficiency (1.000)
    derating       1 + 0.115 * 3.524/(3.524 + 1.5) = 1.080: 3.807 ms of math if every SM were always busy
    waves          tiles of 256 x 128: 2048 blocks on 108 SMs = 18.96; of the rest to 19, 76 % is paid: 18.99, 3.815 ms
    barriers       3.5 clocks for each of 8192 elements of k and each wave, at 1.41 GHz: 0.386 ms
    drains         6.7 * 256 * 128 * 2 B at 90.5 GB/s (312e12 / 108 / 31.9) for each wave: 0.092 ms
    launch         4360 clocks / 1.41 GHz = 0.003 ms
    sum            4.30 ms, 82 % of peak, and a little for the 0.25 ms of memory traffic beside it
    """
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.gemm["bf16"], a100.hardware
    math = 2 * 8192**3 / (hw.peak("bf16") * p.math_efficiency * p.sustained)
    derated = math * (1 + p.derating * math / (math + p.derating_time))
    x = 32 * 64 / 108
    waves = x + p.wave_tail * (np.ceil(x) - x)
    sm_load = hw.peak("bf16") / 108 / p.tile_balance
    bubbles = waves * 8192 * p.k_bubble / hw.clock_hz
    drains = waves * 256 * 128 * p.epilogue * 2 / sm_load
    sm_time = derated * waves / x + bubbles + drains
    memory = 3 * 8192**2 * 2 / (hw.memory_bandwidth * p.memory_efficiency)  # at most: all from DRAM
    launch = p.launch_clocks / hw.clock_hz
    seconds = float(gemm_time(8192, 8192, 8192, hardware=hw, parameters=p))
    assert launch + sm_time <= seconds <= launch + sm_time + p.overlap_loss * memory**2 / sm_time
    assert 0.7 < 2 * 8192**3 / seconds / hw.peak("bf16") < 1.0


def test_a_one_row_gemm_by_hand() -> None:
    """A mat-vec product reads its weight once: 16384**2 * 2 B = 537 MB at 0.78 * 2.039 TB/s = 336 us, and a floor."""
    a100 = profile.load("a100-80gb-sxm")
    p, hw = a100.gemm["bf16"], a100.hardware
    weight = 16384**2 * 2 / (hw.memory_bandwidth * p.memory_efficiency)
    seconds = float(gemm_time(1, 16384, 16384, hardware=hw, parameters=p))
    assert weight < seconds < 1.35 * weight


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


# ---------------------------------------------------------------- behaviour

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
@settings(max_examples=60, deadline=None)
def test_prices_are_finite_and_positive(name: str, m: int, n: int, k: int, b: int) -> None:
    """No size may break a sweep."""
    with np.errstate(all="raise", under="ignore"):
        found = prices(profile.load(name), m, n, k, b)
    assert all(np.isfinite(t) and t > 0 for t in found)


K_STEP = 0.98  # doubling k may shorten a bf16 product by up to 2 %: a split that leaves fewer waves becomes possible


@given(st.sampled_from(FITTED_BF16), sizes, sizes, sizes, small)
@settings(max_examples=150, deadline=None)
def test_more_work_never_takes_less_time_in_gemm(name: str, m: int, n: int, k: int, b: int) -> None:
    """Predictions that fall with more work would give absurd advice."""
    device = profile.load(name)
    kwargs: dict[str, Any] = {"hardware": device.hardware, "parameters": device.gemm["bf16"]}
    base = gemm_time(m, n, k, b, **kwargs)
    assert gemm_time(2 * m, n, k, b, **kwargs) >= base * 0.9999
    assert gemm_time(m, 2 * n, k, b, **kwargs) >= base * 0.9999
    assert gemm_time(m, n, k, 2 * b, **kwargs) >= base * 0.9999
    assert gemm_time(m, n, 2 * k, b, **kwargs) >= base * K_STEP


@given(devices, sizes, small, st.integers(1, 128), st.sampled_from([16, 32, 64, 128]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_more_work_never_takes_less_time_in_attention(
    name: str, seq: int, batch: int, heads: int, dim: int, causal: bool
) -> None:
    """The same for attention, forward and backward."""
    device = profile.load(name)
    kwargs: dict[str, Any] = {"hardware": device.hardware, "parameters": device.attention, "causal": causal}
    for time in (attention_forward_time, attention_backward_time):
        base = time(batch, seq, seq, heads, heads, dim, **kwargs) * 0.9999
        assert time(2 * batch, seq, seq, heads, heads, dim, **kwargs) >= base
        assert time(batch, 2 * seq, 2 * seq, heads, heads, dim, **kwargs) >= base
        assert time(batch, seq, seq, 2 * heads, 2 * heads, dim, **kwargs) >= base
        assert time(batch, seq, seq, heads, heads, 2 * dim, **kwargs) >= base


@given(devices, st.sampled_from(sorted(KINDS)), st.floats(0, 1e12), st.floats(0, 1e12))
@settings(max_examples=200, deadline=None)
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


# ---------------------------------------------------------------- bad input

GOOD = """
name = "My GPU"
kind = "cuda"
architecture = "ampere"
compute_capability = "8.6"

[datasheet]
sm_count = 28
clock_hz = 1.78e9
memory_bytes = 12884901888
memory_bandwidth = 360e9
l2_bytes = 2359296
fp32_flops = 12.7e12
tf32_flops = 12.7e12
fp16_flops = 25.5e12
bf16_flops = 25.5e12
"""


def test_an_own_device_file_works_from_its_datasheet(tmp_path: Path) -> None:
    """Class defaults make any GPU usable."""
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    device = profile.load(path)
    assert device.slug == "mine"
    assert set(device.fitted.values()) == {"class"}
    assert device.hardware == Hardware(28, 1.78e9, 12884901888, 360e9, 2359296, 12.7e12, 12.7e12, 25.5e12, 25.5e12)
    assert gemm_time(4096, 4096, 4096, hardware=device.hardware, parameters=device.gemm["bf16"]) > 4096**3 * 2 / 25.5e12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sm_count = 28\n", "", "sm_count is missing"),
        ("sm_count = 28", "sm_count = 28.5", "sm_count must be a whole number above 0, got 28.5"),
        ("360e9", '"360 GB/s"', "memory_bandwidth must be a number above 0, got '360 GB/s'"),
        ("1.78e9", "-1.78e9", "clock_hz must be a number above 0, got -1780000000.0"),
        ("1.78e9", "nan", "clock_hz must be a number above 0"),
        ("12.7e12\ntf32", "true\ntf32", "fp32_flops must be a number above 0, got True"),
        ("l2_bytes", "l2_byte", "unknown key 'l2_byte': did you mean 'l2_bytes'"),
        ('"cuda"', '"cudo"', "kind 'cudo' is unknown: did you mean 'cuda'"),
        ('"ampere"\ncompute_capability = "8.6"', '"ampère"\ncompute_capability = "99"', "did you mean 'ampere'"),
        ('name = "My GPU"', "", "name is missing"),
        ("[datasheet]", "[datasheets]", "the table 'datasheet' is missing"),
        ("sm_count = 28", "sm_count = = 28", "not a readable TOML file"),
        ("bf16_flops = 25.5e12", "bf16_flops = 25.5e12\n[fitted]\nattention = 3", "must be a table"),
        (
            "bf16_flops = 25.5e12",
            "bf16_flops = 25.5e12\n[fitted.attention.parameters]\nalone = 1.0",
            "launch_floor is missing",
        ),
    ],
)
def test_a_bad_device_file_ends_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    """The line names the file, the key and what would be right."""
    path = tmp_path / "bad.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        profile.load(path)
    assert "bad.toml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100-sxn", "did you mean 'h100-sxm'"),
        ("A100-SXN", "did you mean 'a100-sxm'"),
        ("tpu", "unknown device 'tpu'"),
        ("", "unknown device ''"),
        ("missing/gpu.toml", "no such device file"),
        ("classes", "unknown device 'classes'"),
        ("x" * 5000, "unknown device"),
    ],
)
def test_an_unknown_device_names_the_nearest(name: str, message: str) -> None:
    """One line, and what the user probably meant."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        profile.load(name)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Binary files and folders too."""
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a readable TOML file"):
        profile.load(path)
    with pytest.raises(UserError, match="unknown device"):
        profile.load(tmp_path)


# ---------------------------------------------------------------- rewriting


def test_rewriting_keeps_what_the_author_wrote(tmp_path: Path) -> None:
    """The fit replaces [fitted…] only: comments, order and spacing of the datasheet stay byte for byte."""
    common = pytest.importorskip("validate.fitting.common", exc_type=ImportError)
    write = pytest.importorskip("validate.fitting.write", exc_type=ImportError)
    path = tmp_path / "mine.toml"
    path.write_text("# a comment\n" + GOOD + "# differs: nothing\n")
    attention = profile.load("a100").attention
    errors = common.Errors(10, 0.1, 0.08, 0.2, 0.5)
    fit = common.Fit(attention, 'a "quoted" source', "software", 20, 10, errors, {"short": errors, "m >= 64": errors})
    write.write_blocks(path, {"attention": fit}, "2026-01-01")
    once = path.read_text()
    write.write_blocks(path, {"attention": fit}, "2026-01-01")
    assert path.read_text() == once
    assert once.startswith("# a comment\n" + GOOD + "# differs: nothing\n")
    device = profile.load(path)
    assert device.attention == attention
    assert device.fitted["attention"] == "fitted"
    assert device.provenance["attention"]["source"] == 'a "quoted" source'
    assert device.residuals["attention"] == {"mean": 0.1, "median": 0.08, "p90": 0.2}
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_fitting_without_measurements_ends_in_one_line(tmp_path: Path) -> None:
    """The measurements are the user's: a wrong folder is the commonest mistake."""
    fit = pytest.importorskip("validate.fit", exc_type=ImportError)
    with pytest.raises(UserError, match="no such folder"):
        fit.run(tmp_path / "nowhere", leave_one_out=False, write=False)
    with pytest.raises(UserError, match=r"has no gemm_bf16_a100_sxm\.parquet"):
        fit.run(tmp_path, leave_one_out=False, write=False)
    with pytest.raises(UserError, match="did you mean 'h100-sxm'"):
        fit.fit_kernels(tmp_path, devices=["h100-sxn"], write=False)
