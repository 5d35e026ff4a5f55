"""Matrix products, and small systems of equations over blocks, with their gradients.

FLOPs follow from the shapes (see `perfmodel.calls.costs`); layouts decide copies and transposes.
"""

from collections.abc import Sequence

from ..program.dims import Shape, product, remembered, same
from ..program.op import STRIDED, Attrs, Op, Spec
from .autograd import differentiate
from .core import append_op, emit, new_tensor, record, tape
from .pointwise import broadcast, cast, mul, neg, reduce_dims, scale
from .shape import expand, reshape, t, transpose, view
from .tensor import Grads, Node, Storage, Tensor

Grad = Tensor | None


def autocast_operand(x: Tensor) -> Tensor:
    """Autocast's cast to 16 bit. A trainable fp32 leaf is cast once per forward, anything else every time."""
    current = tape()
    if current.autocast is None or not x.is_floating or x.dtype == current.autocast:
        return x
    is_leaf = x.node is None or x.node.name == "AccumulateGrad"
    if not (is_leaf and x.requires_grad and x.dtype == "fp32"):
        return cast(x, current.autocast)
    if id(x) not in current.cast_cache:
        current.cast_cache[id(x)] = (x, cast(x, current.autocast))
    return current.cast_cache[id(x)][1]


def mm(a: Tensor, b: Tensor) -> Tensor:
    """(p, q)·(q, t) → (p, t)."""
    columns = (_column_major(a), _column_major(b))
    node = differentiate("MmBackward0", (a, b), _mm_backward, columns)
    if node:
        node.save(a if node.needs[1] else None, b if node.needs[0] else None)
    attrs = Attrs(_layout(*columns), _copied(a, b))
    return emit("mm", (a, b), (a.shape[0], b.shape[1]), a.dtype, node=node, attrs=attrs)


def _layout(a_columns: bool, b_columns: bool) -> str:
    """BLAS layout by what it serves: tn forward (x·Wᵀ), nt weight gradient (gᵀ·x), nn input gradient (g·W)."""
    return "nt" if a_columns else ("tn" if b_columns else "nn")


def _column_major(x: Tensor) -> bool:
    return same(x.strides[0], 1) and same(x.strides[1], x.shape[0])


def layout_of(a: Tensor, b: Tensor) -> Attrs:
    """What a product a·b of two matrices that no graph follows says of how they lie."""
    return Attrs(_layout(_column_major(a), _column_major(b)))


def product_into(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`torch.mm(a, b, out=out)`: (m, k) by (k, n) into memory that is there, outside of any graph."""
    record("mm.out", (a, b, out), (out,), attrs=layout_of(a, b))
    return out


def _copied(a: Tensor, b: Tensor) -> tuple[int, ...]:
    """Operands of which neither of the last two dims is contiguous: the call copies them before it asks cuBLAS."""
    return _scattered(a.strides[-2:], b.strides[-2:])


@remembered
def _scattered(*strides: Shape) -> tuple[int, ...]:
    return tuple(i for i, of_operand in enumerate(strides) if not any(same(s, 1) for s in of_operand))


def _mm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b) = grads, node.unpack()
    assert g is not None
    a_columns, b_columns = node.attrs
    grad_b = _right_grad(g, a, b_columns) if node.needs[1] else None
    return (_left_grad(g, b, a_columns) if node.needs[0] else None, grad_b)


def _left_grad(g: Tensor, b: Tensor, columns: bool) -> Tensor:
    """g·bᵀ, or (b·gᵀ)ᵀ where the left operand was column-major."""
    return t(mm(b, t(g))) if columns else mm(g, t(b))


def _right_grad(g: Tensor, a: Tensor, columns: bool) -> Tensor:
    """aᵀ·g, or (gᵀ·a)ᵀ where the right operand was column-major: a weight's gradient comes out row-major."""
    return t(mm(t(g), a)) if columns else mm(t(a), g)


def addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias + a·b with the bias in the GEMM's epilogue."""
    columns = (_column_major(a), _column_major(b))
    node = differentiate("AddmmBackward0", (bias, a, b), _addmm_backward, columns)
    if node:
        node.save(a if node.needs[2] else None, b if node.needs[1] else None)
    return emit("addmm", (bias, a, b), (a.shape[0], b.shape[1]), a.dtype, node=node, attrs=Attrs(_layout(*columns)))


def _addmm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b) = grads, node.unpack()
    assert g is not None
    a_columns, b_columns = node.attrs
    grad_a = _left_grad(g, b, a_columns) if node.needs[1] else None
    grad_b = _right_grad(g, a, b_columns) if node.needs[2] else None
    grad_bias = view(reduce_dims(g, (0,)), (g.shape[1],)) if node.needs[0] else None
    return (grad_bias, grad_a, grad_b)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """(h, p, q)·(h, q, t) → (h, p, t)."""
    node = differentiate("BmmBackward0", (a, b), _bmm_backward)
    if node:
        node.save(a if node.needs[1] else None, b if node.needs[0] else None)
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return emit("bmm", (a, b), shape, a.dtype, node=node, attrs=Attrs(copied=_copied(a, b)))


def _bmm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b) = grads, node.unpack()
    assert g is not None
    grad_b = bmm(transpose(a, 1, 2), g) if node.needs[1] else None
    return (bmm(g, transpose(b, 1, 2)) if node.needs[0] else None, grad_b)


def baddbmm(base: Tensor, a: Tensor, b: Tensor, *, scaled: bool) -> Tensor:
    """base + s·a·b of (h, p, t), (h, p, q), (h, q, t), whatever autocast says; `scaled`: s is another number than 1."""
    node = differentiate("BaddbmmBackward0", (base, a, b), _baddbmm_backward, (scaled,))
    if node:
        node.save(a if node.needs[2] else None, b if node.needs[1] else None)
    return emit("baddbmm", (base, a, b), base.shape, base.dtype, node=node)


def _baddbmm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (a, b), (scaled,) = grads, node.unpack(), node.attrs
    assert g is not None
    grad_a = bmm(g, transpose(b, 1, 2)) if node.needs[1] else None
    grad_a = scale(grad_a) if grad_a is not None and scaled else grad_a
    grad_b = bmm(transpose(a, 1, 2), g) if node.needs[2] else None
    return (g if node.needs[0] else None, grad_a, scale(grad_b) if grad_b is not None and scaled else grad_b)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` with leading dims broadcast, which ATen folds into bmm, or by a matrix b, into mm if it can."""
    a, b = autocast_operand(a), autocast_operand(b)
    if len(b.shape) == 2:
        if _folds(a, b):
            return _fold(a, b, None, "_unsafe_view")
        b = expand(b, (*a.shape[:-2], *b.shape))
    lead = broadcast(a.shape[:-2], b.shape[:-2])
    left = reshape(expand(a, (*lead, *a.shape[-2:])), (product(lead), *a.shape[-2:]))
    right = reshape(expand(b, (*lead, *b.shape[-2:])), (product(lead), *b.shape[-2:]))
    out = bmm(left, right)
    return view(out, (*lead, a.shape[-2], b.shape[-1]), "_unsafe_view")


def _folds(a: Tensor, b: Tensor) -> bool:
    """ATen's `should_fold`: rows of a that do not follow one another are not copied for a matrix without gradient."""
    shape, strides = a.shape, a.strides
    return b.requires_grad or all(same(strides[i], strides[i + 1] * shape[i + 1]) for i in range(len(shape) - 2))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, or what an engine has put in its place: y = x·Wᵀ + b, W of shape (out, in)."""
    own = tape().linear
    if own is not None:
        return own(x, weight, bias)
    if bias is not None:
        bias = autocast_operand(bias)
    weight, x = autocast_operand(weight), autocast_operand(x)
    return matmul(x, t(weight)) if bias is None else _fold(x, t(weight), bias, "view")


def matmul_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Falcon's `FalconLinear`: y = x @ Wᵀ; what autocast casts is a view of W, which it does not keep."""
    return matmul(x, t(weight))


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GPT-2's `Conv1D`: y = x·W + b, W of shape (in, out), called as addmm on a view of x."""
    shape = x.shape
    if len(shape) > 2:
        x = view(x, (product(shape[:-1]), shape[-1]))
    weight, x, bias = autocast_operand(weight), autocast_operand(x), autocast_operand(bias)
    y = addmm(bias, x, weight)
    return view(y, (*shape[:-1], weight.shape[1]))


def _fold(x: Tensor, w: Tensor, bias: Tensor | None, unfold: str) -> Tensor:
    shape = x.shape
    if len(shape) > 2:
        x = reshape(x, (product(shape[:-1]), shape[-1]))
    y = mm(x, w) if bias is None else addmm(bias, x, w)
    return view(y, (*shape[:-1], w.shape[1]), unfold) if len(shape) > 2 else y


def hadamard_weight(w1a: Tensor, w1b: Tensor, w2a: Tensor, w2b: Tensor) -> Tensor:
    """LoHa's `HadaWeight`: (w1a·w1b) ∘ (w2a·w2b) · scale; backward computes both products again."""
    inputs = (w1a, w1b, w2a, w2b)
    node = differentiate("HadaWeightBackward", inputs, _hadamard_backward)
    scale = Tensor((), "fp32", (), 1, Storage(0, None))
    with tape().no_grad():
        out = mul(mul(matmul(w1a, w1b), matmul(w2a, w2b)), scale)
    if node:
        node.save(*inputs, scale)
        node.produces(out)
    return out


def _hadamard_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (w1a, w1b, w2a, w2b, scale) = grads, node.unpack()
    assert g is not None
    g = mul(g, scale)
    temp = mul(g, matmul(w2a, w2b))
    grad_w1a = matmul(temp, t(w1b))
    grad_w1b = matmul(t(w1a), temp)
    temp = mul(g, matmul(w1a, w1b))
    grad_w2a = matmul(temp, t(w2b))
    return (grad_w1a, grad_w1b, grad_w2a, matmul(t(w2a), temp))


def kron(a: Tensor, b: Tensor) -> Tensor:
    """`torch.kron` of two matrices."""
    (p, q), (r, s) = a.shape, b.shape
    blocks = mul(view(a, (p, 1, q, 1)), view(b, (1, r, 1, s)))
    return view(blocks, (p * r, q * s), "_unsafe_view")


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
    append_op(Op("stack", pieces, (out.spec,), out.nbytes, out.nbytes, attrs=STRIDED), (g,), (out,))
    return (out,)
