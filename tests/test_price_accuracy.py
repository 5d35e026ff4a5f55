"""The errors that device files state, on rows that no fit saw, stay within what the project promises."""

import tomllib
from typing import Any

import pytest

from perfmodel.devices.profile import DEVICES


def residuals(device: str, *block: str) -> dict[str, Any]:
    """The residuals of a fitted block."""
    found = tomllib.loads((DEVICES / f"{device}.toml").read_text(encoding="utf-8"))["fitted"]
    for key in block:
        found = found[key]
    return dict(found["residuals"])


@pytest.mark.parametrize(
    ("device", "limit"),
    [("a100-80gb-sxm", 0.07), ("h100-sxm", 0.07), ("b200", 0.08), ("l40s", 0.11)],
)
def test_bf16_gemms_are_priced_as_promised(device: str, limit: float) -> None:
    """Nine tenths of a training step are these: all shapes with 64 rows or more, and the thin ones of adapters."""
    errors = residuals(device, "gemm", "bf16")
    assert errors["m_from_64"]["mean"] <= limit
    assert errors["adapter_shapes"]["mean"] <= 0.10
    assert errors["m_from_64"]["mean"] < errors["m_from_64"]["roofline_mean"] / 2


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
    promised = {k: v["mean"] for k, v in families.items() if "embedding_fused" not in k}
    assert promised
    assert all(mean <= 0.12 for mean in promised.values()), promised
