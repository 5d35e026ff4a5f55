"""PiSSA's start, once per run: the principal part of every target's weight goes into A and B, the rest stays.

Source: peft/tuners/lora/layer.py (`pissa_init`), torch/_lowrank.py (`svd_lowrank`).
"""

from ...program.dims import Dim, decide
from ...tape.core import emit, new_tensor, record
from ...tape.decompositions import smaller
from ...tape.linalg import mm
from ...tape.pointwise import cast, mul, sub
from ...tape.shape import t
from ...tape.tensor import Parameter, Tensor
from .merging import LORA
from .periodic import Recorded, adapted_layers, layers_alike


def decompose(step: Recorded, niter: int) -> None:
    """In every adapted layer: a whole SVD, or a randomised one with `niter` power iterations if that is not 0."""
    for weight, a, b in adapted_layers(step, *LORA):
        with layers_alike("SVD", a.count):
            _start(weight, a.shape[0], turned=weight.shape[0] != b.shape[0], niter=niter)


def _start(weight: Parameter, r: Dim, *, turned: bool, niter: int) -> None:
    """A = √S·V, B = U·√S of the r largest singular values, W - (α/r)·BA, all in fp32; Conv1D's weight is turned."""
    matrix = cast(weight, "fp32")
    matrix = t(matrix) if turned else matrix
    m, n = matrix.shape
    if niter:
        _randomised(matrix, r, niter)
    else:
        _svd(matrix)
    u, s, v = new_tensor((m, r), "fp32"), new_tensor((r,), "fp32"), new_tensor((r, n), "fp32")
    record("div_.Tensor", (s,), (s,))
    a = mm(_diagonal(s), v)
    b = mm(u, _diagonal(s))
    rest = sub(matrix, mm(mul(b, 1.0), a))
    cast(rest, weight.dtype)


def _diagonal(s: Tensor) -> Tensor:
    root = emit("sqrt", (s,), s.shape, s.dtype)
    return emit("diag_embed", (root,), (s.shape[0], s.shape[0]), s.dtype)


def _svd(x: Tensor) -> None:
    (m, n), k = x.shape, smaller(*x.shape)
    record("_linalg_svd", (x,), [new_tensor(shape, x.dtype) for shape in ((m, k), (k,), (k, n))])


def _randomised(x: Tensor, r: Dim, niter: int) -> None:
    """`torch.svd_lowrank`: an orthonormal basis of x's range by power iteration, then the SVD of x in that basis."""
    if decide(x.shape[0] < x.shape[1]):
        x = t(x)
    basis = _orthonormal(mm(x, emit("randn", (), (x.shape[1], r), x.dtype)))
    for _ in range(niter):
        basis = _orthonormal(mm(t(x), basis))
        basis = _orthonormal(mm(x, basis))
    _svd(mm(t(basis), x))
    mm(basis, new_tensor((r, r), x.dtype))


def _orthonormal(x: Tensor) -> Tensor:
    q, triangle = new_tensor(x.shape, x.dtype), new_tensor((x.shape[1], x.shape[1]), x.dtype)
    record("linalg_qr", (x,), (q, triangle))
    return q
