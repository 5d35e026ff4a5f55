"""Decompositions of matrices (`torch.linalg`), as optimizers use them: nothing here is differentiated.

On CUDA each is a call of cuSOLVER that launches kernels of its own and mostly waits for its status;
`perfmodel.calls.costs` and `perfmodel.devices.solver` say what that costs. Factors come out column-major, as LAPACK
writes them.
"""

from ..program.dims import Dim, Shape, decide
from .core import emit, new_tensor, record
from .tensor import Tensor


def smaller(a: Dim, b: Dim) -> Dim:
    """The smaller of two dims."""
    return a if decide(a <= b) else b


def _columns(shape: Shape, dtype: str) -> Tensor:
    return new_tensor(shape, dtype, (1, shape[0]))


def pinv(x: Tensor) -> Tensor:
    """`torch.linalg.pinv`: an SVD, the inverse of its larger singular values, a product."""
    return emit("linalg_pinv.atol_rtol_tensor", (x,), (x.shape[1], x.shape[0]), x.dtype)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.linalg.svd(x, full_matrices=False)`: U (m, k), S (k,), Vᴴ (k, n)."""
    m, n = x.shape
    k = smaller(m, n)
    u, s, vh = _columns((m, k), x.dtype), new_tensor((k,), x.dtype), _columns((k, n), x.dtype)
    record("_linalg_svd", (x,), (u, s, vh))
    return u, s, vh


def qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.qr(x)`: Q (m, k), R (k, n)."""
    m, n = x.shape
    k = smaller(m, n)
    q, r = _columns((m, k), x.dtype), _columns((k, n), x.dtype)
    record("linalg_qr", (x,), (q, r))
    return q, r


def eigh(x: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of a symmetric matrix: eigenvalues (n,), vectors (n, n)."""
    values, vectors = new_tensor((x.shape[0],), x.dtype), _columns(x.shape, x.dtype)
    record("_linalg_eigh", (x,), (values, vectors))
    return values, vectors


def eig(x: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eig` of a real fp32 matrix: complex eigenvalues (n,) and vectors (n, n)."""
    values, vectors = new_tensor((x.shape[0],), "c64"), _columns(x.shape, "c64")
    record("linalg_eig", (x,), (values, vectors))
    return values, vectors


def solve(a: Tensor, b: Tensor) -> Tensor:
    """`torch.linalg.solve(a, b)` of matrices: LU, two triangular solves, and a look at the status."""
    out, lu, n = _columns(b.shape, b.dtype), _columns(a.shape, a.dtype), a.shape[0]
    pivots, info = new_tensor((n,), "i32"), new_tensor((), "i32")
    record("_linalg_solve_ex", (a, b), (out, lu, pivots, info))
    record("_linalg_check_errors", (info,), ())
    return out


def inverse(x: Tensor) -> Tensor:
    """`torch.linalg.inv`: as `solve` with the identity."""
    out, info = _columns(x.shape, x.dtype), new_tensor((), "i32")
    record("linalg_inv_ex", (x,), (out, info))
    record("_linalg_check_errors", (info,), ())
    return out
