"""Attention by the implementation that the setup names, as transformers' attention interface does."""

from functools import partial

from ..program.dims import decide, same
from ..program.op import Attrs
from ..tape.attention import eager_attention, flash2_attention, sdpa_attention
from ..tape.core import tape
from ..tape.packages.ring import SharedSequence, ring_attention
from ..tape.packages.ulysses import SharedHeads
from ..tape.packages.varlen import ask_whether_packed, packed_attention, unpadded_attention
from ..tape.pointwise import cat
from ..tape.shape import narrow
from ..tape.tensor import Tensor
from .base import Scope


def attend(
    layer: Scope, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, form: str, p: float,
    capped: bool = False, window: int | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of q (b, h, s, d) over k (b, kv, s, d) and v (b, kv, s, e) → (b, s, h, e), and weights if any (eager).

    The blocks of transformers hold on to the weights until they return, used or not, so ours do too.

    Args:
        form: how the eager form casts around its softmax (see `eager_attention`).
        p: dropout of the attention probabilities.
        capped: whether the scores have a soft cap, which SDPA does not know and flash-attn has inside its kernel.
        window: keys that a query sees at most; flash-attn skips the others, masks of the others leave them out.
        bias: of the eager form's scores, (1, h, s, s); SDPA has it in its mask.
    """
    implementation, packed, positions = layer.build.setup.attention, layer.build.packed, layer.build.positions
    with tape().belonging_to("attention"):
        context = tape().context
        if isinstance(context, SharedHeads):
            assert positions is not None
            one = partial(_with_all_tokens, implementation=implementation, causal=causal, p=p)
            return context.attention(q, k, v, positions, one), None
        if implementation == "eager":
            return eager_attention(q, k, v, mask, form=form, p=p, capped=capped, bias=bias)
        if implementation == "flash2":
            if packed is None:
                out = _flash2(q, k, v, positions, causal=causal, window=window)
            else:
                attrs = Attrs(causal=causal, window=window, documents=packed.documents)
                if mask is not None:
                    out = unpadded_attention(q, k, v, mask, packed, attrs)
                else:
                    out = packed_attention(q, k, v, packed, attrs)
            return out if same(q.shape[-1], v.shape[-1]) else narrow(out, -1, v.shape[-1]), None
        if isinstance(context, SharedSequence):
            return ring_attention(q, k, v, context), None
        return sdpa_attention(q, k, v, mask, causal=causal, p=p), None


def extended(layer: Scope, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (batch, heads, seq, head_dim) behind those of the cache (`DynamicLayer.update`), if any."""
    build = layer.build
    if not build.past:
        return k, v
    past_k, past_v = build.past.pop(0)
    with tape().belonging_to("adapter"):
        k, v = cat((past_k, k), -2), cat((past_v, v), -2)
    build.held += [(k, layer.part), (v, layer.part)]
    return k, v


def _flash2(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, *, causal: bool, window: int | None = None
) -> Tensor:
    """flash-attn's kernel of rows that are not known to be packed."""
    if positions is not None and decide(q.shape[0] == 1):
        ask_whether_packed(positions)
    return flash2_attention(q, k, v, causal=causal, window=window)


def _with_all_tokens(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, implementation: str, causal: bool, p: float
) -> Tensor:
    """What a rank does with its heads of a sequence that several share."""
    if implementation == "flash2":
        return _flash2(q, k, v, positions, causal=causal)
    return sdpa_attention(q, k, v, None, causal=causal, p=p)
