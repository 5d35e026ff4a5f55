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


@pytest.mark.parametrize("device", ["p100", "v100-32gb-pcie", "a100-40gb-pcie", "a100-80gb-pcie", "h100-sxm"])
def test_fp32_gemms_are_priced_as_promised(device: str) -> None:
    """PEFT's adapters run in fp32 beside a 16-bit base."""
    assert residuals(device, "gemm", "fp32")["mean"] <= 0.10


@pytest.mark.parametrize("device", ["t4", "l4"])
def test_boards_whose_clock_jumps_are_said_to(device: str) -> None:
    """On 70 W cards measurements scatter more between neighbouring batch sizes than the error that is allowed.

    The same shapes scatter by less than 2 % on an A100. The products without a batch are held to 11 %, and the batched
    ones to 1.6 times their scatter: these boards miss the 10 % of the others.
    """
    errors = residuals(device, "gemm", "fp32")
    assert errors["bmm_scatter"]["mean"] > 0.10 > 5 * residuals("a100-80gb-pcie", "gemm", "fp32")["bmm_scatter"]["mean"]
    assert errors["linear"]["mean"] <= 0.11
    assert errors["bmm"]["mean"] < 1.6 * errors["bmm_scatter"]["mean"]


@pytest.mark.parametrize("device", ["a100-80gb-sxm", "h100-sxm"])
def test_memory_bound_kernels_are_priced_as_promised(device: str) -> None:
    """Norms, rotary embedding, losses and element-wise kernels, eager and fused."""
    families = {k: v for k, v in residuals(device, "pointwise").items() if isinstance(v, dict)}
    promised = {k: v["mean"] for k, v in families.items() if "embedding_fused" not in k}
    assert promised
    assert all(mean <= 0.12 for mean in promised.values()), promised
