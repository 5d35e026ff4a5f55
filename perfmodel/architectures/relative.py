"""T5's relative positions: distances in buckets, each with a score of its own for every head, added to attention's.

Source: transformers/models/t5/modeling_t5.py (`T5Attention.compute_bias`), integrations/sdpa_attention.py
(`create_position_bias_mask`).
"""

from ..program.dims import Dim
from ..tape.core import emit, record
from ..tape.elementary import div
from ..tape.pointwise import add, binary_bool, cast, fill, masked, mul, sub, unary, where
from ..tape.scores import lesser
from ..tape.shape import contiguous, permute, unsqueeze, view
from ..tape.tensor import Tensor
from .base import Scope


def position_bias(layer: Scope, name: str, seq: Dim, *, buckets: int, heads: int, both_ways: bool) -> Tensor:
    """The score of every head for every distance: (1, heads, seq, seq).

    Args:
        name: of the embedding of (buckets, heads) scores.
        both_ways: whether keys behind a query have buckets of their own (an encoder's).
    """
    context = add(unsqueeze(fill("arange", (seq,), "i64"), 1), 0)
    memory = unsqueeze(fill("arange", (seq,), "i64"), 0)
    relative = sub(memory, context)
    values = layer.embedding(name, buckets, heads, _buckets(relative, both_ways=both_ways))
    return unsqueeze(permute(values, (2, 0, 1)), 0)


def _buckets(relative: Tensor, *, both_ways: bool) -> Tensor:
    """The bucket of each distance: one each for small ones, logarithmic ones for larger."""
    found = None
    if both_ways:
        found = add(mul(cast(emit("gt.Scalar", (relative,), relative.shape, "bool"), "i64"), 1), 0)
        relative = unary("abs", relative)
    else:
        relative = unary("neg", lesser(relative, fill("zeros_like", relative.shape, "i64", relative)))
    small = emit("lt.Scalar", (relative,), relative.shape, "bool")
    large = cast(mul(div(unary("log", div(cast(relative, "fp32"), 1.0)), 1.0), 1.0), "i64")
    large = add(large, 0)
    large = lesser(large, fill("full_like", large.shape, "i64", large))
    chosen = where(small, relative, large)
    if found is None:
        return add(chosen, 0)
    record("add_.Tensor", (found, chosen), (found,))
    return found


def biased_mask(bias: Tensor, mask: Tensor | None, seq: Dim, *, causal: bool) -> Tensor:
    """What SDPA adds to the scores of `seq` queries: the bias, and the lowest number where a query may not look.

    Every block has a copy of its own.
    """
    if mask is None and causal:
        rows, columns = unsqueeze(fill("arange", (seq,), "i64"), 1), unsqueeze(fill("arange", (seq,), "i64"), 0)
        mask = view(binary_bool("ge.Tensor", rows, columns), (1, 1, seq, seq))
    if mask is None:
        return contiguous(bias)
    return contiguous(masked(mask, bias, fill("scalar_tensor", (), bias.dtype)))
