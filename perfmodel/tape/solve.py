"""Small dense linear systems and block matrices (torch.linalg), with their gradients."""

from collections.abc import Sequence

from ..program.op import Op, Spec
from .autograd import differentiate
from .core import append_op, emit, new_tensor, record
from .linalg import bmm
from .pointwise import neg
from .shape import expand, transpose
from .tensor import Grads, Node, Tensor

Grad = Tensor | None


def solve_right(a: Tensor, b: Tensor) -> Tensor:
    """`torch.linalg.solve(a, b, left=False)` of (n, k, k): X with X·a = b; the host asks whether one is singular."""
    node = differentiate("LinalgSolveExBackward0", (a, b), _solve_right_backward)
    if node:
        node.save(a)
    n, k, _ = a.shape
    x = new_tensor(a.shape, a.dtype)
    lu, pivots, info = new_tensor(a.shape, a.dtype), new_tensor((n, k), "i32"), new_tensor((n,), "i32")
    record("_linalg_solve_ex", (a, b), (x, lu, pivots, info))
    record("_linalg_check_errors", (info,), ())
    if node:
        node.save(x.alias(), lu, pivots)
        node.produces(x)
    return x


def _solve_right_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (_, x, lu, pivots) = grads, node.unpack()
    assert g is not None
    grad_b = emit("linalg_lu_solve", (lu, pivots, g), g.shape, g.dtype)
    if not node.needs[0]:
        return (None, grad_b)
    left = transpose(x, 1, 2)
    grad_a = neg(bmm(expand(left, left.shape), expand(grad_b, grad_b.shape)))
    return (grad_a, grad_b if node.needs[1] else None)


def block_diagonal(x: Tensor) -> Tensor:
    """`torch.block_diag(*x.unbind())` of (n, k, k): a matrix (n·k, n·k)."""
    n, k, _ = x.shape
    node = differentiate("BlockDiagBackward0", (x,), _block_diagonal_backward, (x.shape,))
    out = new_tensor((n * k, n * k), x.dtype)
    blocks = (Spec(x.dtype, (k, k), n),)
    append_op(Op("block_diag", blocks, (out.spec,), x.nbytes, out.nbytes), (x,), (out,))
    if node:
        node.produces(out)
    return out


def _block_diagonal_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (shape,) = grads, node.attrs
    assert g is not None
    n, k, _ = shape
    out = new_tensor(shape, g.dtype)
    pieces = (Spec(g.dtype, (k, k), n),)
    append_op(Op("stack", pieces, (out.spec,), out.nbytes, out.nbytes), (g,), (out,))
    return (out,)
