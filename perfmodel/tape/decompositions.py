"""Decompositions of small matrices (`torch.linalg`), as optimizers use them: nothing here is differentiated.

On CUDA each is a call of cuSOLVER that launches kernels of its own and mostly waits for its status; `perfmodel.costs`
and `perfmodel.devices.solver` say what that costs. LAPACK's results are column-major.
"""

from .core import Tensor, emit, new_tensor
from .dims import Dim, Shape, decide


def smaller(a: Dim, b: Dim) -> Dim:
    """The smaller of two dims."""
    return a if decide(a <= b) else b


def columns(shape: Shape, dtype: str) -> Tensor:
    """A new column-major matrix."""
    return new_tensor(shape, dtype, (1, shape[0]))


def pinv(x: Tensor) -> Tensor:
    """`torch.linalg.pinv`: an SVD, the inverse of its larger singular values, a product."""
    return emit("linalg_pinv.atol_rtol_tensor", (x,), (x.shape[1], x.shape[0]), x.dtype)
