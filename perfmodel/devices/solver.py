"""Seconds of dense decompositions (cuSOLVER): a rough model, within a factor of two of what was measured.

    time = start + step · k^power + FLOPs / (share · fp32 peak)        k = min(m, n)

A decomposition of a small matrix is a chain of dependent steps, one or more for each of its k columns, that no GPU can
run side by side: `step` is their latency, and it hardly depends on the card. For large matrices the FLOPs decide, at a
few per cent of the fp32 peak. The coefficients follow published latencies of `torch.linalg` on fp32 matrices:

- QR: 8², 64², 256², 512², 1024², 4096² in 0.055, 0.21, 0.76, 1.8, 4.5, 32 ms and 8192 x 8 in 0.11 ms (FlagGems #5586);
  16 x 4, 16², 128 x 32 in 0.053, 0.060, 0.19 ms on an H100 (pytorch #173788).
- SVD (gesvdj): 8², 16², 32², 64² in 0.14, 0.21, 0.26, 1.1 ms (FlagGems #4817), values only of 256², 1024², 2048², 4096²
  in 6.6, 54, 184, 1090 ms (#4033, #4256), all on an H20. GaLore 2 (2504.20437) reports up to 20 minutes, Q-GaLore
  (2407.08296) 10 for the 224 gradients of a Llama 7B, which are 4.9e14 FLOPs: 2 to 4 % of an A100's fp32 peak.
- Pseudo-inverse: 4², 8² in 0.18, 0.21 ms on an H20 (FlagGems #5329), an SVD and nine small kernels.
- Symmetric eigenvalues: 16², 32², 64² in 0.18, 0.43, 0.83 ms with a rank's few kernels (FlagGems #5942).
- LU: 32 x 16, 128 x 64, 256² in 0.13, 0.39, 0.65 ms (FlagGems #4945).
- Eigenvalues of a general matrix: 0.35 ms each for 3 x 3 on a GH200, 1.1 ms on an RTX 5090 (pytorch #183806); how they
  grow is a guess.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .hardware import Hardware

Flops = Callable[[Any, Any], Any]  # of the longer and the shorter side


class Routine(NamedTuple):
    """Coefficients of one decomposition.

    Attributes:
        start: seconds of the smallest matrix.
        step: seconds of one dependent step.
        power: how the number of steps grows with the shorter side.
        share: of the fp32 peak that large matrices reach.
        flops: FLOPs by the longer and the shorter side (Golub & Van Loan, Matrix Computations).
    """

    start: float
    step: float
    power: float
    share: float
    flops: Flops


def _svd_flops(m: Any, n: Any) -> Any:
    return 14 * m * n**2 + 8 * n**3


ROUTINES = {
    "linalg_qr": Routine(45e-6, 3e-6, 1.0, 0.2, lambda m, n: 4 * m * n**2 - 4 / 3 * n**3),
    "_linalg_svd": Routine(60e-6, 6.8e-6, 1.2, 0.03, _svd_flops),
    "linalg_pinv.atol_rtol_tensor": Routine(115e-6, 6.8e-6, 1.2, 0.03, _svd_flops),
    "_linalg_eigh": Routine(40e-6, 12e-6, 1.0, 0.05, lambda m, n: 9 * n**3),
    "linalg_eig": Routine(400e-6, 40e-6, 1.0, 0.03, lambda m, n: 25 * n**3),
    "_linalg_solve_ex": Routine(90e-6, 3e-6, 1.0, 0.1, lambda m, n: 8 / 3 * n**3),
    "linalg_inv_ex": Routine(90e-6, 3e-6, 1.0, 0.1, lambda m, n: 8 / 3 * n**3),
}


def solver_time(
    name: str, batch: ArrayLike, rows: ArrayLike, columns: ArrayLike, *, hardware: Hardware
) -> NDArray[np.float64]:
    """Seconds of the decomposition of `batch` matrices (rows, columns); sizes broadcast.

    The matrices of a batch go through the chain of steps side by side: they share its latency, their FLOPs add up.

    Args:
        name: an ATen call of `ROUTINES`.
    """
    routine = ROUTINES[name]
    longer, shorter = np.maximum(rows, columns), np.minimum(rows, columns)
    steps = routine.step * np.power(shorter, routine.power)
    return np.asarray(
        routine.start + steps + batch * routine.flops(longer, shorter) / (routine.share * hardware.peak("fp32")),
        dtype=np.float64,
    )
