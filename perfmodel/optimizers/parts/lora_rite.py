"""LoRA-RITE on pairs A (r, n), B (m, r): a step that does not depend on how BA is split into its factors.

Two loops over all pairs, in the adapters' dtype, as the authors' optimizer runs them with its defaults: no escape mass
is computed. The step is of ordinary size: no update is skipped, the global norm of the unmagnified gradients is
clipped. Source: gkevinyen5418/LoRA-RITE at 8ece053, lora_rite.py.
"""

from dataclasses import dataclass

from ...tape.core import emit
from ...tape.decompositions import eigh, pinv, qr
from ...tape.elementary import div
from ...tape.linalg import matmul
from ...tape.pointwise import add, mul
from ...tape.shape import t, unsqueeze
from ...tape.tensor import Parameter, Tensor
from .ops import in_place, new, read_item
from .update import Update, existing, gradient


@dataclass
class Factor:
    """A factor between the loops: QR of its long form (n or m, r), and its unmagnified gradient in its own shape.

    Attributes:
        inverse: pseudo-inverse of R.
    """

    p: Parameter
    basis: Tensor
    inverse: Tensor
    grad: Tensor


class Norm:
    """The sum of squared norms that grows from factor to factor."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def include(self, x: Tensor) -> None:
        """Add ‖x‖²; the first is added to the number 0, which makes a new tensor."""
        square = new("pow.Tensor_Scalar", emit("linalg_vector_norm", (x,), (), x.dtype))
        if self.total is None:
            self.total = new("add.Tensor", square)
        else:
            in_place("add_.Tensor", self.total, square)


def lora_rite_step(update: Update) -> None:
    """One step on all pairs of parameters in their order."""
    norm, pairs = Norm(), []
    for run in update.runs(update.parameters):
        for a, b in zip(run[::2], run[1::2], strict=True):
            pairs.append(_unmagnify(update, a, b, norm))
    update.part()
    assert norm.total is not None
    total, left = new("sqrt", norm.total), iter(pairs)
    for run in update.runs(update.parameters):
        for _ in run[::2]:
            _move(update, *next(left), total)
    update.part()


def _move(update: Update, of_a: Factor, of_b: Factor, norm: Tensor) -> None:
    read_item(new("gt.Scalar", norm, dtype="bool"))  # is it to be clipped?
    _precondition(update, of_a, of_b, norm)
    _precondition(update, of_b, of_a, norm)
    update.renew(of_a.basis)
    update.renew(of_b.basis)


def _long(x: Tensor, p: Parameter) -> Tensor:
    """A tensor of a factor's shape with the rank as its last dim, or such a one in the factor's shape."""
    return t(x) if p.name.endswith("lora_A.weight") else x


def _unmagnify(update: Update, a: Parameter, b: Parameter, norm: Norm) -> tuple[Factor, Factor]:
    """First loop: orthonormal bases of both factors, and gradients freed of the other factor's magnitude."""
    grads = [new("nan_to_num", gradient(p)) for p in (a, b)]
    (basis_a, rotation_a), (basis_b, rotation_b) = (qr(_long(p, p)) for p in (a, b))
    inverse_a, inverse_b = pinv(rotation_a), pinv(rotation_b)
    factors = (
        Factor(a, basis_a, inverse_a, _long(matmul(_long(grads[0], a), inverse_b), a)),
        Factor(b, basis_b, inverse_b, _long(matmul(_long(grads[1], b), inverse_a), b)),
    )
    for f in factors:
        mean = emit("mean", (new("pow.Tensor_Scalar", f.grad),), (), f.grad.dtype)
        read_item(new("gt.Scalar", new("nan_to_num", new("sqrt", mean)), dtype="bool"))  # is it to be skipped?
    for f in factors:
        norm.include(f.grad)
        for kept in (f.basis, f.inverse, f.grad):
            update.state(f.p, kept.shape)
        update.renew(f.inverse)
        update.renew(f.grad)  # but the old basis is needed till the second loop
    return factors


def _precondition(update: Update, mine: Factor, other: Factor, norm: Tensor) -> None:
    """Second loop: moments carried into the new bases, the preconditioned update, the factor moved by it."""
    p, r = mine.p, mine.inverse.shape[0]
    v, m, old_basis = update.state(p, (r, r)), update.state(p), existing(other.basis.shape, p.dtype)
    clipped = mul(div(mine.grad, norm), 1.0)
    grad = _long(clipped, p)
    second = _symmetric(div(matmul(t(grad), grad), 1.0))
    v = update.renew(_symmetric(_mixed(second, _carried_second(v, old_basis, other.basis))))
    direction = new("nan_to_num", matmul(grad, _symmetric(_inverse_sqrt(_symmetric(v)))))
    carried = matmul(_long(m, p), t(matmul(t(other.basis), old_basis)))
    m = update.renew(_mixed(_long(direction, p), _long(carried, p)))
    step = _long(matmul(_long(m, p), t(other.inverse)), p)
    in_place("add_.Tensor", p, mul(step, 1.0))


def _symmetric(x: Tensor) -> Tensor:
    return div(add(x, t(x)), 2.0)


def _mixed(new_value: Tensor, old: Tensor) -> Tensor:
    """(1-β)·new + β·old."""
    return add(mul(new_value, 1.0), mul(old, 1.0))


def _carried_second(v: Tensor, old_basis: Tensor, basis: Tensor) -> Tensor:
    """PVPᵀ with P from the old to the new basis; both traces are taken and not used."""
    p = matmul(t(basis), old_basis)
    carried = _symmetric(matmul(matmul(p, v), t(p)))
    for x in (v, carried):
        emit("trace", (x,), (), x.dtype)
    return new("nan_to_num", carried)


def _inverse_sqrt(x: Tensor) -> Tensor:
    """X^(-½) by its eigenvectors."""
    values, vectors = eigh(x)
    values = mul(new("reciprocal", add(new("sqrt", add(values, 0.0)), 1e-6)), 1.0)
    return _symmetric(matmul(mul(vectors, unsqueeze(values, 0)), t(vectors)))
