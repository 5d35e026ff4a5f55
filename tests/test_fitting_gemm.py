"""How GEMM measurements are read: noise is told from error, and who stands for a device that is left out."""

import numpy as np
import pytest

pd = pytest.importorskip("pandas")
sgemm = pytest.importorskip("validate.fitting.sgemm", exc_type=ImportError)
gemm = pytest.importorskip("validate.fitting.gemm", exc_type=ImportError)

BATCHES = np.array([8.0, 12, 16, 24, 32, 48, 64, 96, 128, 192])


def products(noise: np.ndarray) -> "pd.DataFrame":
    """Batched products of forty shapes; `noise` (40, batches) is ln(measured / true)."""
    rows = [
        {"group": "bmm", "m": 512.0, "n": 64.0, "k": 64.0 + i, "b": b, "seconds": 1e-3 * b**0.97 * np.exp(noise[i, j])}
        for i in range(len(noise))
        for j, b in enumerate(BATCHES)
    ]
    return pd.DataFrame(rows)


def test_scatter_of_a_smooth_series_is_zero() -> None:
    """A model's own curve along the batch must not be taken for noise."""
    found = sgemm.scatter(products(np.zeros((40, len(BATCHES)))))
    assert found.rows == 40 * (len(BATCHES) - 2)
    assert found.mean < 1e-12


def test_scatter_recovers_the_noise_of_one_measurement() -> None:
    """The figure is set against a model's error, so it must be that of one row, not of three."""
    noise = np.random.default_rng(0).normal(0.0, 0.1, (40, len(BATCHES)))
    assert sgemm.scatter(products(noise)).mean == pytest.approx(np.abs(noise).mean(), rel=0.1)


def test_scatter_needs_rows() -> None:
    """Devices without batched products have no such figure."""
    rows = products(np.zeros((2, len(BATCHES))))
    assert sgemm.scatter(rows) is None
    assert sgemm.scatter(rows.assign(group="linear")) is None


@pytest.mark.parametrize(("dtype", "slugs"), [("bf16", gemm.BF16_FILES), ("fp32", sgemm.GPUS)])
def test_a_device_never_stands_for_itself(dtype: str, slugs: dict[str, str]) -> None:
    """Leaving a device out must leave it out; the shares of the others make a whole."""
    for slug in slugs:
        shares = gemm.donors(slug, dtype)
        assert slug not in shares
        assert sum(shares.values()) == pytest.approx(1.0)
    assert gemm.donors("l40s", "bf16")["a100-80gb-sxm"] > 0.5  # the same instructions, mma.sync and cp.async
