"""fp32 products on boards whose SMs have 128 fp32 units, from the rates that square products reach on them.

torch-performance-test-data times n x n products with TF32 off, n from 1,024 to 10,240, and gives the best rate of a
board. Where an SM has 64 units (A100) products come within 3 % of the peak; these boards, whose SMs have twice the
units beside the same shared memory and as many schedulers, stay at 0.61 to 0.75 of it, and the class, fitted mostly to
A100s, priced them up to 45 % too fast. One figure is fitted to them: the share of the peak that the main loop reaches.
An L40S has less power for a FLOP than the others and stays at 0.51: it has its own figure, which the fit does not see.
"""

from dataclasses import replace

import numpy as np
from scipy.optimize import brentq

from perfmodel.devices.gemm import GemmParameters, gemm_time
from perfmodel.program.dims import Array

from .judging import Fit, FitErrors, hardware

SOURCE = "https://github.com/zzc0721/torch-performance-test-data (database.md of 9d828276; issues 107 to 200)"
SIZES = np.array([1024.0, 2048.0, 4096.0, 8192.0, 10240.0])
# TFLOP/s; where there are several entries of desktop or server cards, their median.
BEST = {
    "rtx-3080": 21.07, "rtx-3080-ti": 24.9, "rtx-3090": 24.79, "rtx-a4000": 11.9, "rtx-a6000": 23.92, "a10g": 23.37,
    "a40": 23.73, "rtx-4090": 54.67,
}  # fmt: skip
L40S = 46.88
LEAST, MOST = 0.3, 1.0  # shares that are tried


def wide(fit: Fit) -> Fit:
    """The class of `fit` for SMs of 128 units."""
    assert isinstance(fit.parameters, GemmParameters)
    told = replace(fit.parameters, math_efficiency=_share(fit.parameters, BEST))
    best = np.array([_best(slug, told) for slug in BEST])
    seen = np.array(list(BEST.values()))
    peaks = np.array([hardware(slug).fp32_flops / 1e12 for slug in BEST])
    errors = FitErrors.of(1.0 / best, 1.0 / peaks, 1.0 / seen)
    note = f"{fit.notes} Derived for SMs of 128 units: math_efficiency from the best rates of {len(BEST)} boards' "
    note += f"square products ({errors.mean:.1%} mean error). Residuals: those of the class."
    return replace(fit, parameters=told, source=f"{fit.source}; math_efficiency: {SOURCE}", notes=note)


def of_l40s(fit: Fit) -> Fit:
    """The class with the rate of an L40S."""
    assert isinstance(fit.parameters, GemmParameters)
    told = replace(fit.parameters, math_efficiency=_share(fit.parameters, {"l40s": L40S}))
    found = fit.sibling(told, "the class", fit.errors, "math_efficiency from the board's best rate of square products.")
    return replace(found, source=f"{found.source}; math_efficiency: {SOURCE}")


def _share(p: GemmParameters, seen: dict[str, float]) -> float:
    """The share of the peak with which the rates of the boards are right in the geometric mean."""

    def beyond(share: float) -> float:
        told = replace(p, math_efficiency=share)
        return float(np.mean([np.log(_best(slug, told) / rate) for slug, rate in seen.items()]))

    return float(brentq(beyond, LEAST, MOST))


def _best(slug: str, p: GemmParameters) -> float:
    """TFLOP/s of the size that runs fastest."""
    seconds: Array = gemm_time(SIZES, SIZES, SIZES, hardware=hardware(slug), parameters=p, dtype="fp32")
    return float((2.0 * SIZES**3 / seconds).max() / 1e12)
