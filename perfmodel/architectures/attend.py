"""Attention by the implementation that the setup names, as transformers' attention interface does."""

from ..tape.attention import eager_attention, flash2_attention, sdpa_attention
from ..tape.core import tape
from ..tape.packages.varlen import PackedRows, packed_attention, unpadded_attention
from ..tape.tensor import Tensor


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    implementation: str,
    *,
    causal: bool,
    form: str,
    p: float,
    capped: bool = False,
    packed: PackedRows | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of q (b, h, s, d) over k, v (b, kv, s, d) → (b, s, h, d), and the weights if they exist (eager).

    The blocks of transformers hold on to the weights until they return, used or not, so ours do too.

    Args:
        form: how the eager form casts around its softmax (see `eager_attention`).
        p: dropout of the attention probabilities.
        capped: whether the scores have a soft cap, which SDPA does not know and flash-attn has inside its kernel.
        bias: of the eager form's scores, (1, h, s, s); SDPA has it in its mask.
        packed: documents that see themselves only, or are padded, for flash-attn; the others have them in their mask.
    """
    with tape().belonging_to("attention"):
        if implementation == "eager":
            return eager_attention(q, k, v, mask, form=form, p=p, capped=capped, bias=bias)
        if implementation == "flash2" and packed is not None:
            if mask is not None:
                return unpadded_attention(q, k, v, mask, packed, causal=causal), None
            return packed_attention(q, k, v, packed, causal=causal), None
        if implementation == "flash2":
            return flash2_attention(q, k, v, causal=causal, p=p), None
        return sdpa_attention(q, k, v, mask, causal=causal, p=p), None
