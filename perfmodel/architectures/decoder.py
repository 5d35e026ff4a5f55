"""What decoders with rotary positions and blocks of other kinds than Llama's share: GPT-NeoX, Phi, Falcon.

Positions may turn the first part of every head only; the rest passes by.
"""

from collections.abc import Callable
from typing import Any

from ..errors import UserError
from ..program.dims import same
from ..tape.pointwise import cat, dropout
from ..tape.shape import narrow
from ..tape.tensor import Tensor
from . import masks
from .base import Scope
from .config import Config
from .rotary import rotate, rotate_half


def rotary_width(config: Config, head_dim: int, key: str, default: float) -> int:
    """How many dims of a head are rotated: the share of them that stands under `key`, or in `rope_parameters`.

    Raises:
        UserError: the share leaves none, an odd number, or more dims than there are.
    """
    rope = config.values.get("rope_parameters")
    share = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = config.number(key, default) if share is None else share
    width = int(head_dim * share) if isinstance(share, (int, float)) else 0
    if not 0 < width <= head_dim or width % 2:
        raise UserError(f"{config.origin}: {key} {share!r} of head_dim {head_dim} must be an even number of dims")
    return width


def decoded(
    model: Scope, ids: Tensor, attention: Tensor, block: Callable[..., Tensor], words: str, norm: str, *, width: int,
    p: float = 0.0, skip: bool = True,
) -> Tensor:  # fmt: skip
    """The last hidden states: embedding, blocks, norm.

    Args:
        block: gets its scope, the hidden states, the mask, and cos and sin of as many dims as `width`.
        words, norm: paths of the embedding and of the last norm.
        p: dropout of the embedding.
        skip: see `masks.causal_mask`.
    """
    architecture, setup = model.build.architecture, model.build.setup
    embedded = model.embedding(words, architecture.vocab, architecture.hidden, ids)
    embedded = model.build.method.embedded(model, embedded)
    seq = embedded.shape[1]
    position_ids = masks.positions_of(model, ids, seq)
    mask = masks.causal_mask(
        attention, seq, setup.attention, embedded.dtype, None, padded=setup.explicit_mask, skip=skip,
        packed=model.build.packed,
    )  # fmt: skip
    hidden = dropout(embedded, p)
    rotary = masks.rotary_tables(position_ids, width // 2, hidden.dtype)
    hidden = model.layers(block, hidden, mask, *rotary)
    model.begin("head")
    return model.norm(norm, hidden)


def rotate_partly(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of the first dims of q and k, (batch, heads, seq, head_dim), as many as the tables are wide."""
    width = cos.shape[-1]
    q_rot, q_pass = _cut(q, width)
    k_rot, k_pass = _cut(k, width)
    q_rot, k_rot = rotate(q_rot, k_rot, cos, sin, rotate_half)
    return cat((q_rot, q_pass), -1), cat((k_rot, k_pass), -1)


def _cut(x: Tensor, width: Any) -> tuple[Tensor, Tensor]:
    whole = same(width, x.shape[-1])
    return x if whole else narrow(x, -1, width), narrow(x, -1, x.shape[-1] - width)
