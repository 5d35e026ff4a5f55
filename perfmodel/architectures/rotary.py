"""Rotary positions: queries and keys (batch, heads, seq, head_dim) turned by tables of cos and sin (1, seq, dims)."""

from collections.abc import Callable

from ..tape.pointwise import add, cat, mul, neg, sub
from ..tape.shape import every_other, narrow, unsqueeze, view, whole_slice
from ..tape.split import stack
from ..tape.tensor import Tensor

Turn = Callable[[Tensor], Tensor]


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb`: every dim of a head turns; `turn` is the program's `rotate_half`."""
    cos, sin = unsqueeze(cos, 1), unsqueeze(sin, 1)
    q = add(mul(q, cos), mul(turn(q), sin))
    return q, add(mul(k, cos), mul(turn(k), sin))


def rotate_part(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
    """As many dims of a head turn as the tables (1, 1, seq, dims) have, the others pass; sliced even if all turn."""
    dims = cos.shape[-1]
    (q_rot, q_pass), (k_rot, k_pass) = ((_first(x, dims), narrow(x, -1, x.shape[-1] - dims)) for x in (q, k))
    q_embed = cat((add(mul(q_rot, cos), mul(turn(q_rot), sin)), q_pass), -1)
    return q_embed, cat((add(mul(k_rot, cos), mul(turn(k_rot), sin)), k_pass), -1)


def _first(x: Tensor, dims: int) -> Tensor:
    return whole_slice(x) if dims == x.shape[-1] else narrow(x, -1, dims)


def rotate_half(x: Tensor) -> Tensor:
    """Dims that lie half a head apart turn together."""
    half = x.shape[-1] // 2
    first, second = narrow(x, -1, half), narrow(x, -1, half)
    return cat((neg(second), first), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    """Neighbouring dims turn together."""
    half = x.shape[-1] // 2
    first, second = narrow(x, -1, half, 2), narrow(x, -1, half, 2)
    return view(stack((neg(second), first), -1), x.shape)


def rotate_interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb_interleave`: neighbours turn together and come out half a head apart."""
    half = cos.shape[-1] // 2
    cos, sin = unsqueeze(narrow(cos, -1, half), 1), unsqueeze(narrow(sin, -1, half), 1)
    (q1, q2), (k1, k2) = ((every_other(x), every_other(x)) for x in (q, k))
    return turned(q1, q2, cos, sin), turned(k1, k2, cos, sin)


def turned(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both coordinates of planes, each turned by its angle, one after the other."""
    across = sub(mul(first, cos), mul(second, sin))
    return cat((across, add(mul(second, cos), mul(first, sin))), -1)
