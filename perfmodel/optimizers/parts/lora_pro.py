"""LoRA-Pro's adjustment of the gradients of a pair A (r, n), B (m, r), with Adam on the m x n gradient that they make.

Every step but the first, line by line as its authors run it, their `s` the adapter's scale and `δ` 1e-8. Source:
mrflogs/LoRA-Pro, `lorapro_full_adjustment` and `solve_sylvester` in its DeepSpeed.
"""

from ...tape.core import emit
from ...tape.decompositions import eig, inverse, pinv, solve
from ...tape.elementary import eye
from ...tape.linalg import matmul
from ...tape.pointwise import add, cast, mul, neg, sub
from ...tape.shape import t, unsqueeze, view_as
from ...tape.tensor import Parameter, Tensor
from .ops import in_place, new, read_item
from .update import Update, gradient, replace_gradient


def adjust(update: Update, a: Parameter, b: Parameter) -> None:
    """Replace the gradients of A and B by those whose product is nearest to Adam's direction for BA."""
    aa_t, b_tb = matmul(a, t(a)), matmul(t(b), b)
    aa_t_inv, b_tb_inv = _inverse(aa_t, a.dtype), _inverse(b_tb, a.dtype)
    grad_a = matmul(mul(b_tb_inv, 1.0), gradient(a))
    grad_b = _off_b(b, b_tb_inv, gradient(b), aa_t_inv)
    equiv_grad = add(matmul(mul(b, 1.0), grad_a), matmul(mul(grad_b, 1.0), a))
    denom, g = _adam(update, a, equiv_grad, b.dtype)
    grad_a_orin = matmul(mul(t(b), 1.0), g)
    grad_b_orin = matmul(mul(g, 1.0), t(a))
    replace_gradient(a, grad_a_orin)
    replace_gradient(b, grad_b_orin)
    rest = matmul(matmul(mul(b_tb_inv, 1.0), grad_a_orin), t(a))
    x = emit("_to_copy", (_sylvester(matmul(t(b), b), matmul(a, t(a)), rest),), (a.shape[0],) * 2, b.dtype)
    grad_a = add(matmul(mul(b_tb_inv, 1.0), grad_a_orin), matmul(x, a))
    grad_b = sub(_off_b(b, b_tb_inv, grad_b_orin, aa_t_inv), matmul(b, x))
    replace_gradient(a, grad_a)
    replace_gradient(b, grad_b)
    del denom, equiv_grad


def _inverse(gram: Tensor, dtype: str) -> Tensor:
    return cast(pinv(add(gram, mul(eye(gram.shape[0], "fp32"), 1e-8))), dtype)


def _off_b(b: Parameter, b_tb_inv: Tensor, grad: Tensor, aa_t_inv: Tensor) -> Tensor:
    """(I - B(BᵀB)⁻¹Bᵀ)·grad·(AAᵀ)⁻¹: the m x m projector is made in full."""
    projector = sub(eye(b.shape[0], b.dtype), matmul(matmul(b, b_tb_inv), t(b)))
    return mul(matmul(matmul(projector, grad), aa_t_inv), 1.0)


def _adam(update: Update, a: Parameter, equiv_grad: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Moments of the size of the adapted weight; its squares are taken in bf16. Returns the denominator, too."""
    exp_avg, exp_avg_sq = (update.state(a, equiv_grad.shape, equiv_grad.dtype) for _ in range(2))
    in_place("lerp_.Scalar", exp_avg, equiv_grad)
    in_place("addcmul_", in_place("mul_.Tensor", exp_avg_sq), cast(equiv_grad, "bf16"), cast(equiv_grad, "bf16"))
    denom = in_place("add_.Tensor", new("div.Tensor", new("sqrt", exp_avg_sq)))
    return denom, cast(new("div.Tensor", new("div.Tensor", exp_avg), denom), dtype)


def _sylvester(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """X with AX + XB = C, all (r, r), by the eigenvectors of A and -B, in complex numbers."""
    a, b, c = (cast(x, "fp32") for x in (a, b, c))
    b = neg(b)
    r, u = eig(a)
    s, v = eig(b)
    f = solve(u, matmul(new("add.Tensor", c, dtype="c64"), v))
    w = new("sub.Tensor", unsqueeze(r, 1), unsqueeze(s, 0))
    y = new("div.Tensor", f, w)
    x = matmul(matmul(u, y), inverse(v))
    for real in (a, b, c):  # `torch.isreal` of their first elements
        read_item(emit("ones_like", (Tensor((), real.dtype, (), 1, real.storage),), (), "bool"))
    return view_as("real", Tensor(x.shape, "fp32", (2 * x.strides[0], 2), x.numel, x.storage), x.shape, (2, 2))


__all__ = ["adjust"]
