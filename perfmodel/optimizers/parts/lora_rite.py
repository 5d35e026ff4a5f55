"""LoRA-RITE on pairs A (r, n), B (m, r): a step that does not depend on how BA is split into its factors.

Two loops over all pairs, in fp32 whatever the adapters are, as the authors' optimizer runs them with its defaults: it
also computes the scalars and escape masses that those do not apply. The step is of ordinary size: no update is skipped,
the global norm of the unmagnified gradients is clipped. Source: gkevinyen5418/LoRA-RITE, lora_rite.py.
"""

from dataclasses import dataclass

from ...tape.core import emit, new_tensor, record
from ...tape.decompositions import eigh, pinv, qr
from ...tape.elementary import div, eye, sum_dim
from ...tape.linalg import matmul
from ...tape.pointwise import add, cast, mul, sub
from ...tape.shape import t, unsqueeze
from ...tape.tensor import Parameter, Tensor
from .ops import in_place, new, read_item
from .update import Update, existing, gradient


@dataclass
class Factor:
    """A factor between the loops, in its long form (n or m, r): QR of its weight, unmagnified gradient."""

    p: Parameter
    basis: Tensor
    rotation: Tensor
    grad: Tensor


class Norm:
    """The sum of squared norms that grows from factor to factor."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def include(self, x: Tensor) -> None:
        """Add ‖x‖²; the first is added to the number 0, which makes a new tensor."""
        square = new("pow.Tensor_Scalar", emit("linalg_vector_norm", (x,), (), "fp32"))
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
    pair = (a, b)
    grads = [cast(new("nan_to_num", gradient(p)), "fp32") for p in pair]
    (basis_a, rotation_a), (basis_b, rotation_b) = (qr(_long(cast(p, "fp32"), p)) for p in pair)
    factors = (
        Factor(a, basis_a, rotation_a, matmul(_long(grads[0], a), pinv(rotation_b))),
        Factor(b, basis_b, rotation_b, matmul(_long(grads[1], b), pinv(rotation_a))),
    )
    for f in factors:
        mean = emit("mean", (new("pow.Tensor_Scalar", f.grad),), (), "fp32")
        read_item(new("gt.Scalar", new("nan_to_num", new("sqrt", mean)), dtype="bool"))  # is it to be skipped?
    for f in factors:
        norm.include(f.grad)
        for kept in (f.basis, f.rotation, f.grad):
            update.state(f.p, kept.shape, "fp32")
        update.renew(f.rotation)
        update.renew(f.grad)  # but the old basis is needed till the second loop
    return factors


def _precondition(update: Update, mine: Factor, other: Factor, norm: Tensor) -> None:
    """Second loop: moments carried into the new bases, the preconditioned update, the factor moved by it."""
    p, r = mine.p, mine.rotation.shape[0]
    v, c, m = (update.state(p, s, "fp32") for s in ((r, r), (mine.basis.shape[0],), mine.basis.shape))
    escape, trace = update.state(p, (), "fp32"), update.state(p, (), "fp32")
    old_basis = existing(other.basis.shape, "fp32")
    grad = mul(div(mine.grad, norm), 1.0)
    second = _symmetric(div(matmul(t(grad), grad), 1.0))
    carried = _carried_second(v, old_basis, other.basis)
    escape = update.renew(add(mul(add(_escape(carried, v), escape), 1.0), 0.0))
    v = update.renew(_symmetric(_mixed(second, carried)))
    update.renew(_mixed(_trace(second), trace))
    c = _scalars(c, carried, v, t(grad), escape)
    update.renew(div(add(c, 1e-8), add(emit("mean", (c,), (), "fp32"), 1e-8)))
    direction = new("nan_to_num", matmul(grad, _symmetric(_inverse_sqrt(_symmetric(v)))))
    m = update.renew(_mixed(direction, matmul(m, t(matmul(t(other.basis), old_basis)))))
    step = mul(matmul(m, t(pinv(other.rotation))), 1.0)
    in_place("add_.Tensor", p, cast(_long(step, p), p.dtype))


def _symmetric(x: Tensor) -> Tensor:
    return div(add(x, t(x)), 2.0)


def _mixed(new_value: Tensor, old: Tensor) -> Tensor:
    """(1-β)·new + β·old."""
    return add(mul(new_value, 1.0), mul(old, 1.0))


def _trace(x: Tensor) -> Tensor:
    return emit("trace", (x,), (), x.dtype)


def _carried_second(v: Tensor, old_basis: Tensor, basis: Tensor) -> Tensor:
    """PVPᵀ with P from the old to the new basis; both traces are taken and not used."""
    p = matmul(t(basis), old_basis)
    carried = _symmetric(matmul(matmul(p, v), t(p)))
    _trace(v), _trace(carried)
    return new("nan_to_num", carried)


def _escape(carried: Tensor, v: Tensor) -> Tensor:
    """What the change of basis lost: the lesser of the largest eigenvalue's and the trace's loss."""
    of_old, of_new = _eigenvalues(v), _eigenvalues(carried)
    eigen = emit("max", (sub(of_old, of_new),), (), "fp32")
    eigen = new("maximum", eigen, _zero())
    return new("minimum", eigen, new("maximum", sub(_trace(v), _trace(carried)), _zero()))


def _eigenvalues(x: Tensor) -> Tensor:
    """`torch.sort(torch.linalg.eigvalsh(x))[0]`."""
    values, _ = eigh(x)
    ordered, index = new_tensor(values.shape, "fp32"), new_tensor(values.shape, "i64")
    record("sort", (values,), (ordered, index))
    return ordered


def _zero() -> Tensor:
    """`torch.tensor(0).to(x)`: an integer on the host becomes fp32 on the device."""
    return emit("_to_copy", (existing((), "i64"),), (), "fp32")


def _scalars(c: Tensor, old_v: Tensor, v: Tensor, grad: Tensor, escape: Tensor) -> Tensor:
    """The scalar of every column of the short form (r, n) of the gradient."""
    e = new("mul.Tensor", add(escape, 1e-12), eye(v.shape[0], "fp32"))
    inverse = _symmetric(pinv(add(v, e)))
    of_e = new("nan_to_num", _positive(c, _trace(matmul(e, inverse))))
    of_old = new("nan_to_num", mul(c, _positive(c, _trace(matmul(old_v, inverse)))))
    of_new = new("nan_to_num", _positive(c, sum_dim(mul(matmul(inverse, grad), grad), 0)))
    return div(new("nan_to_num", add(_mixed(of_new, of_old), of_e)), 1.0)


def _positive(c: Tensor, x: Tensor) -> Tensor:
    return new("maximum", emit("zeros_like", (c,), c.shape, "fp32"), x)


def _inverse_sqrt(x: Tensor) -> Tensor:
    """X^(-½) by its eigenvectors."""
    values, vectors = eigh(x)
    values = mul(new("reciprocal", add(new("sqrt", add(values, 0.0)), 1e-6)), 1.0)
    return _symmetric(matmul(mul(vectors, unsqueeze(values, 0)), t(vectors)))
