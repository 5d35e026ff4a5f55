"""What kernels cost is as promised: on rows that no fit saw, priced here, and in the errors that device files state.

The rows priced here are few (`fixtures/kernels`), those behind the stated errors are all that were published.
"""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel.devices import profile
from perfmodel.devices.attention import attention_forward_time
from perfmodel.devices.profile import DEVICES
from perfmodel.devices.residual import FOLDER

pd = pytest.importorskip("pandas")
flash_papers = pytest.importorskip("validate.fitting.attention.flash_papers", exc_type=ImportError)
gemm = pytest.importorskip("validate.fitting.gemm", exc_type=ImportError)
pointwise = pytest.importorskip("validate.fitting.pointwise", exc_type=ImportError)
serving = pytest.importorskip("validate.fitting.attention.serving", exc_type=ImportError)
common = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
profiles = pytest.importorskip("validate.fitting.profiles", exc_type=ImportError)


def keeps(predicted: Any, plain: Any, measured: Any, limit: float) -> None:
    """The mean error of a few rows is at most the promised one and two standard errors of a mean of so few."""
    errors = np.abs(predicted / measured - 1.0)
    assert len(errors) >= 8
    assert errors.mean() <= limit + 2 * errors.std() / np.sqrt(len(errors))
    assert errors.mean() <= 1.3 * limit
    assert errors.mean() < np.abs(plain / measured - 1.0).mean()


def residuals(device: str, *block: str) -> dict[str, Any]:
    """The residuals of a fitted block."""
    found = tomllib.loads((DEVICES / f"{device}.toml").read_text(encoding="utf-8"))["fitted"]
    for key in block:
        found = found[key]
    return dict(found["residuals"])


@pytest.mark.parametrize(("device", "left_out"), [("h100-sxm", True), ("b200", True), ("rtx-4090", False)])
def test_errors_of_attention_are_of_the_published_speeds(device: str, left_out: bool) -> None:
    """A speed that was mistyped, or corrected without a new fit: a plain roofline's error would be another one."""
    rows, on = flash_papers.flash_rows(device), profile.load(device)
    found = flash_papers.published_errors(rows[rows.left_out == left_out], on.hardware, on.attention)
    told = residuals(device, "attention")
    assert (found.rows, found.roofline_mean) == (told["rows"], pytest.approx(told["roofline_mean"], abs=6e-5))


BF16 = [("a100-80gb-sxm", 0.07), ("h100-sxm", 0.07), ("b200", 0.08), ("l40s", 0.11)]


@pytest.mark.parametrize(("device", "limit"), BF16)
def test_bf16_gemms_are_priced_as_promised(device: str, limit: float) -> None:
    """Nine tenths of a training step are these: all shapes with 64 rows or more, and the thin ones of adapters."""
    errors = residuals(device, "gemm", "bf16")
    assert errors["m_from_64"]["mean"] <= limit
    assert errors["adapter_shapes"]["mean"] <= 0.10
    assert errors["m_from_64"]["mean"] < errors["m_from_64"]["roofline_mean"] / 2


@pytest.mark.parametrize(("device", "limit"), BF16)
def test_published_bf16_gemms_are_priced_as_promised(kernels: Path, device: str, limit: float) -> None:
    """The device file at work: shapes of training steps and of adapters, in short bursts that no board throttles."""
    on, rows = profile.load(device), gemm.gemm_rows(kernels, device, "bf16")
    thin = ((rows.n <= 128) | (rows.k <= 128)) & (rows.m >= 512)
    for chosen, promised in ((rows.left_out & (rows.m >= 64), limit), (rows.left_out & thin, 0.10)):
        some = rows[chosen]
        seconds = common.Shapes.of(some).price(on.hardware, on.gemm["bf16"].in_bursts())
        keeps(seconds, gemm.roofline_seconds(some, on.hardware), common.column(some, "seconds"), promised)


LEARNED = [  # with the learned factor: rows from 64, below, adapter shapes
    ("a100-80gb-sxm", 0.05, 0.06, 0.06), ("h100-sxm", 0.05, 0.06, 0.06), ("b200", 0.06, 0.06, 0.08),
    ("l40s", 0.07, 0.10, 0.08),
]  # fmt: skip


@pytest.mark.parametrize(("device", "most", "few", "thin"), LEARNED)
def test_bf16_gemms_with_the_learned_factor_are_priced_as_promised(
    device: str, most: float, few: float, thin: float
) -> None:
    """What a prediction's products cost on measured silicon, on shapes that neither fit saw."""
    errors = tomllib.loads((FOLDER / f"{device}.toml").read_text(encoding="utf-8"))["with_residual"]
    for rows, limit in (("m_from_64", most), ("m_below_64", few), ("adapter_shapes", thin)):
        assert errors[rows]["mean"] <= limit, rows


@pytest.mark.parametrize("device", ["v100-32gb-pcie", "a100-40gb-pcie", "a100-80gb-pcie", "h100-sxm"])
def test_published_fp32_gemms_are_priced_as_promised(kernels: Path, device: str) -> None:
    """Boards that need not slow down; what those of 70 W ran before decides how fast they run a product alone."""
    on, rows = profile.load(device), gemm.gemm_rows(kernels, device, "fp32")
    some = rows[rows.left_out]
    seconds = common.Shapes.of(some).price(on.hardware, on.gemm["fp32"])
    keeps(seconds, gemm.roofline_seconds(some, on.hardware), common.column(some, "seconds"), 0.10)


@pytest.mark.parametrize(
    ("device", "block"), [("a100-80gb-sxm", ""), ("l40s", ""), ("h100-sxm", "cudnn_"), ("b200", "cudnn_")]
)
def test_published_attention_is_priced_as_promised(kernels: Path, device: str, block: str) -> None:
    """Serving measured it, with a copy of keys and values to a cache beside it, so the kernel alone is quicker."""
    on, parameters = profile.load(device), getattr(profile.load(device), f"{block}attention")
    for campaign in (serving.FLASH | serving.CUDNN)[device]:
        rows = serving.attention_rows(kernels, campaign)
        some = rows[rows.left_out & (rows.isl >= 512)]
        b, s, h, kv, dim = (common.column(some, c) for c in serving.SHAPE)
        seconds = attention_forward_time(b, s, s, h, kv, dim, hardware=on.hardware, parameters=parameters)
        plain = serving.attention_flops(b, s, s, h, dim) / on.hardware.peak("bf16")
        keeps(seconds, plain, common.column(some, "seconds"), 0.10 if not block else 0.16)


@pytest.mark.parametrize(
    ("device", "block"), [(d, "attention") for d in serving.FLASH] + [(d, "attention_cudnn") for d in serving.CUDNN]
)
def test_attention_keeps_its_limit(device: str, block: str) -> None:
    """Forward from 512 tokens, on rows that no fit saw: what the README says of each kernel that PyTorch can pick."""
    told = residuals(device, block)
    assert told["mean"] <= 0.08 < told["roofline_mean"] / 2


def test_published_times_of_attention_go_with_its_work() -> None:
    """A slip of the finger in a table of times is seen: twice the length is four times the work, twice the batch twice.

    Short calls fill the GPU less, and the longest draw more power than the board gives: 1.75 to 4.4 times.
    """
    rows = pd.concat([flash_papers.cudnn_rows("h200", "b200", "gb200"), flash_papers.flash_rows("b200")])
    rows["device"] = rows.device.fillna("b200, FlashAttention-2")
    lines = ["device", "causal", "heads", "kv_heads", "head_dim", "direction"]
    for _, of in rows[rows.seq >= 2048].groupby([*lines, "batch"]):
        times, sizes = of.sort_values("seq").seconds.to_numpy(), np.sort(of.seq.to_numpy())
        assert (sizes[1:] == 2 * sizes[:-1]).all()
        assert ((times[1:] > 1.75 * times[:-1]) & (times[1:] < 4.4 * times[:-1])).all(), of
    twice = [of.sort_values("batch").seconds.to_numpy() for _, of in rows.groupby([*lines, "seq"])]
    assert all(1.7 < b / a < 2.45 for a, b in (of for of in twice if len(of) == 2))
    assert sum(len(of) == 2 for of in twice) == 40
    assert set(np.log2(rows.seq) % 1) == {0}


@pytest.mark.parametrize(("device", "siblings"), [("h100-sxm", ("h200",)), ("b200", ("b200", "gb200"))])
def test_cudnns_own_figures_are_priced_as_its_kernels(device: str, siblings: tuple[str, ...]) -> None:
    """What stands for cuDNN's kernels must not run away from them: NVIDIA's own benchmark, forward and backward."""
    p = profile.load(device).cudnn_attention
    for sibling in siblings:
        rows, hardware = flash_papers.cudnn_rows(sibling), profile.load(sibling).hardware
        for direction, limit in (("forward", 0.14), ("backward", 0.08)):
            some = rows[rows.direction == direction]
            if len(some):
                assert flash_papers.published_errors(some, hardware, p).mean <= limit, (sibling, direction)


def test_flash_attention_of_its_papers_is_priced_as_promised() -> None:
    """Forward and backward on an H100: the points of the figures that the fit left out."""
    on, rows = profile.load("h100-sxm"), flash_papers.flash_rows("h100-sxm")
    assert set(rows.batch * rows.seq) == {16384}
    assert set(rows.heads * rows.head_dim) == {2048}
    assert flash_papers.published_errors(rows[rows.left_out], on.hardware, on.attention).mean <= 0.05


@pytest.mark.parametrize("device", flash_papers.SOURCES)
def test_no_figure_of_flash_attention_stands_for_two_shapes(device: str) -> None:
    """One filed under another mask would give the fit two times for one kernel, a factor of two apart."""
    rows = flash_papers.flash_rows(device)
    assert len(rows)
    assert not rows.duplicated(flash_papers.SHAPE).any()


@pytest.mark.parametrize("device", ["a100-40gb-pcie", "a100-80gb-pcie", "a100-80gb-sxm", "h100-sxm"])
def test_published_memory_bound_kernels_are_priced_as_promised(kernels: Path, device: str) -> None:
    """Norms, softmax, element-wise kernels and embeddings that no fit saw, of three sources."""
    on, rows = profile.load(device), pointwise.pointwise_rows(kernels)
    some = rows[(rows.gpu == device) & (rows.fold == 0) & ~rows.host_bound].reset_index(drop=True)
    batch = pointwise.Batch(some)
    errors = np.abs(batch.price(on.hardware, on.pointwise) / common.column(some, "seconds") - 1.0)
    assert len(errors) >= 8
    assert errors.mean() <= 0.12


def test_memory_bound_kernels_of_a_real_program_take_what_they_took() -> None:
    """Within a program a kernel finds in L2 what was just written: all kernels of a forward, one of each kind."""
    on, rows = profile.load("h100-sxm"), profiles.profiled_rows().assign(source="tracelens")
    seconds, measured = pointwise.Batch(rows).price(on.hardware, on.pointwise), common.column(rows, "seconds")
    assert seconds.sum() == pytest.approx(measured.sum(), rel=0.08)
    assert np.abs(seconds / measured - 1.0).mean() <= 0.15


FP32_BOARDS = ["p100", "v100-32gb-pcie", "t4", "a100-40gb-pcie", "a100-80gb-pcie", "l4", "h100-sxm"]


@pytest.mark.parametrize("device", FP32_BOARDS)
def test_fp32_gemms_are_priced_as_promised(device: str) -> None:
    """PEFT's adapters run in fp32 beside a 16-bit base; boards of 70 W run them far below their highest clock."""
    errors = residuals(device, "gemm", "fp32")
    assert errors["mean"] <= 0.10
    assert errors["mean"] < errors["roofline_mean"] / 2


def test_fp32_gemms_of_all_boards_together_are_priced_as_promised() -> None:
    """The P4, measured with two libraries of which one picks poor tiles, misses the figure alone."""
    every = [residuals(device, "gemm", "fp32") for device in [*FP32_BOARDS, "p4"]]
    assert sum(e["rows"] * e["mean"] for e in every) / sum(e["rows"] for e in every) <= 0.10


@pytest.mark.parametrize(
    "block", [("bf16", "sync_mma"), ("bf16", "any"), ("fp32", "any"), ("fp32", "wgmma")], ids=lambda b: "-".join(b)
)
def test_a_device_without_rows_is_priced_as_promised(block: tuple[str, str]) -> None:
    """Class defaults, on the rows of devices that were left out of them: a GEMM from the datasheet alone."""
    errors = residuals("classes", "gemm", *block)
    assert errors["mean"] <= 0.20
    assert errors["mean"] < errors["roofline_mean"] / 2


@pytest.mark.parametrize("device", ["a100-80gb-sxm", "h100-sxm"])
def test_memory_bound_kernels_are_priced_as_promised(device: str) -> None:
    """Norms, rotary embedding, losses and element-wise kernels, eager and fused."""
    families = {k: v for k, v in residuals(device, "pointwise").items() if isinstance(v, dict)}
    promised = {k: v["mean"] for k, v in families.items()}
    assert promised
    assert all(mean <= 0.12 for mean in promised.values()), promised
    assert residuals(device, "pointwise")["mean"] <= 0.06
