"""FLOPs of fused attention, a causal mask not deducted, as `torch.utils.flop_counter` counts them."""

from ..program.dims import Dim, Shape
from ..program.op import Op, Spec


def one_product(q: Shape, k: Shape) -> Dim:
    """One product of the attention's size: 2·b·h·sq·skv·d, of (b, h, s, d)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * q[3]


def forward(op: Op) -> Dim:
    """qkᵀ and pv."""
    q, k = (spec.shape for spec in op.inputs[:2])
    return 2 * one_product(q, k)


def backward(op: Op) -> Dim:
    """qkᵀ again, then the gradients of p, v, q and k."""
    q, k = (spec.shape for spec in op.inputs[1:3])
    return 5 * one_product(q, k)


def forward_heads_last(op: Op) -> Dim:
    """As `forward`, of the flash-attn package's (b, s, h, d)."""
    q, k = (_heads_first(spec.shape) for spec in op.inputs[:2])
    return 2 * one_product(q, k)


def backward_heads_last(op: Op) -> Dim:
    """As `backward`, of (b, s, h, d)."""
    q, k = (_heads_first(spec.shape) for spec in op.inputs[1:3])
    return 5 * one_product(q, k)


def forward_documents(op: Op) -> Dim:
    """As `forward`, of documents behind one another, (tokens, h, d): each attends within itself."""
    return 2 * _within_documents(op, *op.inputs[:1])


def backward_documents(op: Op) -> Dim:
    """As `backward`, of documents behind one another."""
    return 5 * _within_documents(op, *op.inputs[1:2])


def _within_documents(op: Op, q: Spec) -> Dim:
    assert op.attrs.documents is not None
    tokens, heads, head_dim = q.shape
    return 2 * heads * op.attrs.documents.pairs(tokens) * head_dim


def _heads_first(x: Shape) -> Shape:
    return (x[0], x[2], x[1], x[3])
