"""FLOPs of fused attention, a causal mask not deducted, as `torch.utils.flop_counter` counts them.

It knows nothing of flash-attn's windows. A window of w is the band of 2w - 1 keys that causal tokens see a half of, so
that as wide as a sequence it is the whole.
"""

from ..program.dims import Dim, Shape
from ..program.lengths import band
from ..program.op import Op, Spec


def one_product(q: Shape, k: Shape, width: Dim) -> Dim:
    """One product of the attention's size: 2·b·h·sq·skv·width, of (b, h, s, d)."""
    return 2 * q[0] * q[1] * q[2] * k[2] * width


def forward(op: Op) -> Dim:
    """qkᵀ and pv; values may be of another width than keys."""
    q, k, v = (spec.shape for spec in op.inputs[:3])
    return one_product(q, k, q[3] + v[3])


def backward(op: Op) -> Dim:
    """qkᵀ again, then the gradients of p, v, q and k."""
    q, k, v = (spec.shape for spec in op.inputs[1:4])
    return one_product(q, k, 3 * q[3] + 2 * v[3])


def forward_heads_last(op: Op) -> Dim:
    """As `forward`, of the flash-attn package's (b, s, h, d), whose widths are one."""
    return 2 * _heads_last(op, *op.inputs[:2])


def backward_heads_last(op: Op) -> Dim:
    """As `backward`, of (b, s, h, d)."""
    return 5 * _heads_last(op, *op.inputs[1:3])


def forward_documents(op: Op) -> Dim:
    """As `forward`, of documents behind one another, (tokens, h, d): each attends within itself."""
    return 2 * _within_documents(op, *op.inputs[:1])


def backward_documents(op: Op) -> Dim:
    """As `backward`, of documents behind one another."""
    return 5 * _within_documents(op, *op.inputs[1:2])


def _within_documents(op: Op, q: Spec) -> Dim:
    assert op.attrs.documents is not None
    tokens, heads, head_dim = q.shape
    return 2 * heads * op.attrs.documents.pairs(tokens, op.attrs.window) * head_dim


def _heads_last(op: Op, q: Spec, k: Spec) -> Dim:
    """One product of (b, s, h, d)."""
    batch, rows, heads, head_dim = q.shape
    window = op.attrs.window
    pairs = rows * k.shape[1] if window is None else band(rows, window)
    return 2 * batch * heads * pairs * head_dim
