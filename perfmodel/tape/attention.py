"""Scaled dot product attention: the kernel that each device picks, and the eager form of transformers.

CPU: one flash kernel without dropout and for values as wide as the keys, else the written-out "math" path. CUDA: see
`calls.sdpa`. That the memory-efficient kernel gets a mask padded to rows of multiples of eight elements
(`preprocess_mask`) is left out: programs would differ from length to length.
Source: ATen/native/transformers/attention.cpp; transformers/integrations/sdpa_attention.py. How outputs lie in memory:
torch/_meta_registrations.py.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

from ..calls import sdpa
from ..errors import UserError
from ..program.dims import Shape, by_stride, elementwise_strides, is_one, same, same_shape, strides_in_order
from ..program.op import Attrs
from .autograd import differentiate
from .core import new_tensor, record, tape
from .elementary import div
from .gather import largest_last
from .linalg import autocast_operand, matmul
from .nn import softmax
from .pointwise import add, cast, cat, dropout, fill, mul, scale, sub, tanh, where
from .shape import clone, contiguous, expand, narrow, pad_last, reshape, transpose, unsqueeze, view
from .tensor import Grads, Node, Tensor

Grad = Tensor | None
_FLASH = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu",
    "flash": "_scaled_dot_product_flash_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "flash2": "flash_attn::_flash_attn_forward",
}
_FLASH_BACKWARD = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu_backward",
    "flash": "_scaled_dot_product_flash_attention_backward",
    "cudnn": "_scaled_dot_product_cudnn_attention_backward",
    "efficient": "_scaled_dot_product_efficient_attention_backward",
    "flash2": "flash_attn::_flash_attn_backward",
}


def repeat_heads(x: Tensor, groups: int) -> Tensor:
    """transformers' `repeat_kv`: (b, kv, s, d) → (b, kv·groups, s, d), a copy unless groups is 1."""
    if groups == 1:
        return x
    b, heads, s, d = x.shape
    return reshape(expand(unsqueeze(x, 2), (b, heads, groups, s, d)), (b, heads * groups, s, d))


def _interleaved(x: Tensor, groups: int) -> Tensor:
    """`x.repeat_interleave(groups, 1)`: as `repeat_heads`, but a copy of a single head too."""
    if groups == 1:
        return x
    b, heads, s, d = x.shape
    return view(clone(expand(unsqueeze(x, 2), (b, heads, groups, s, d))), (b, heads * groups, s, d))


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, form: str, p: float, capped: bool = False,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """transformers' `eager_attention_forward`: q (b, h, s, d), k and v (b, kv, s, d) → (b, s, h, d) and the weights.

    Args:
        form: "upcast", softmax in fp32, then the query's dtype; "value", then the value's dtype; "plain", no cast.
        capped: whether the scores have a soft cap.
        bias: what is added to the scores of all samples, (1, h, s, s).
    """
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    weights = mul(matmul(q, transpose(k, 2, 3)), 1.0)
    if capped:
        weights = soft_capped(weights)
    if bias is not None:
        weights = add(weights, bias)
    if mask is not None:
        weights = add(weights, mask)
    weights = softmax(weights, "fp32" if form == "upcast" else None)
    if form != "plain":
        weights = cast(weights, q.dtype if form == "upcast" else v.dtype)
    weights = dropout(weights, p)
    out = matmul(weights, v)
    return contiguous(transpose(out, 1, 2)), weights


def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor, *, p: float
) -> tuple[Tensor, Tensor]:
    """gpt-oss's `eager_attention_forward`: as `eager_attention`, with a score of each head for nothing, (h,)."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    weights = mul(matmul(q, transpose(k, 2, 3)), 1.0)
    if mask is not None:
        weights = add(weights, mask)
    sinks = expand(view(sinks, (1, q.shape[1], 1, 1)), (*weights.shape[:3], 1))
    combined = cat((weights, sinks), -1)
    combined = sub(combined, largest_last(combined))
    probabilities = softmax(combined, combined.dtype)
    scores = narrow(probabilities, -1, k.shape[2])
    weights = cast(dropout(scores, p), v.dtype)
    out = matmul(weights, v)
    return contiguous(transpose(out, 1, 2)), weights


def soft_capped(x: Tensor) -> Tensor:
    """`tanh(x / cap) * cap`, written out."""
    x = div(x, 1.0)
    x = tanh(x)
    return mul(x, 1.0)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, p: float, broadcast: bool = False
) -> Tensor:
    """`F.scaled_dot_product_attention` as transformers calls it; same shapes as `eager_attention`.

    Args:
        broadcast: whether the one head of k and v is left to PyTorch's broadcasting (Falcon), which only the math path
            does.
    """
    groups = q.shape[1] // k.shape[1]
    if (mask is not None or not tape().stack.groups_heads) and not broadcast:
        k, v = repeat_heads(k, groups), repeat_heads(v, groups)
    q, k, v = autocast_operand(q), autocast_operand(k), autocast_operand(v)
    mask = mask if mask is None else autocast_operand(mask)
    kernel = "math" if broadcast and groups > 1 else _choose(q, k, v, mask, p)
    causal = causal and mask is None and not is_one(q.shape[2])
    if mask is not None and kernel != "math":
        mask = additive_mask(mask, q.dtype)
    if kernel == "math":
        out = _math(q, k, v, mask, causal=causal, p=p, broadcast=broadcast)
    else:
        out = _fused(q, k, v, mask, kernel, Attrs(causal=causal))
    return contiguous(transpose(out, 1, 2))


def flash2_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """The flash-attn package on (b, s, h, d), as transformers calls it with a dense batch."""
    return flash_attn(*heads_last(q, k, v), causal=causal, window=window)


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(b, h, s, d) as flash-attn takes it: (b, s, h, d), in 16 bit, values padded to the width of the keys."""
    q, k, v = (transpose(x, 1, 2) for x in (q, k, v))
    if not same(v.shape[-1], q.shape[-1]):
        v = pad_last(v, q.shape[-1] - v.shape[-1])
    low = tape().autocast
    return (cast(q, low), cast(k, low), cast(v, low)) if low else (q, k, v)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window: int | None = None) -> Tensor:
    """`flash_attn_func`: all (b, s, h, d)."""
    return _fused(q, k, v, None, "flash2", Attrs(causal=causal, window=window))


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernel that the device picks, causal and without a mask, of (b, h, s, d); heads stay in groups.

    Raises:
        UserError: the device has none for them.
    """
    kernel = _choose(q, k, v, None, 0.0)
    if kernel not in _FLASH:
        raise UserError(f"the device has no fused attention of {q.shape[1]} heads over {k.shape[1]} in {q.dtype}")
    return _fused(q, k, v, None, kernel, Attrs(causal=not is_one(q.shape[2])))


def _choose(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> str:
    """The kernel for (b, h, s, d) operands; that of the CPU gives a mask no gradient."""
    current, trained = tape(), mask is not None and mask.requires_grad
    if current.device == "cpu":
        return "math" if p > 0 or trained or not same(q.shape[3], v.shape[3]) else "cpu"
    return sdpa.choose(
        current.capability, q.shape[3], v.shape[3], cudnn_first=current.stack.prefers_cudnn(current.capability),
        half=q.dtype != "fp32", grouped=q.shape[1] != k.shape[1], masked=mask is not None, mask_trained=trained,
    )  # fmt: skip


def additive_mask(mask: Tensor, dtype: str) -> Tensor:
    """A boolean mask as 0 / -inf of the query's dtype."""
    if mask.dtype != "bool":
        return mask
    low, zero = fill("scalar_tensor", (), dtype), fill("scalar_tensor", (), dtype)
    return where(mask, zero, low)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: str, attrs: Attrs) -> Tensor:
    if mask is not None and mask.requires_grad:  # of every sample there is a gradient, and they are summed
        mask = expand(mask, (*q.shape[:3], k.shape[2]))
    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    node = differentiate("ScaledDotProductAttentionBackward0", inputs, _fused_backward, (kernel, attrs))
    seq_first = kernel == "flash2"
    heads, seq = (q.shape[2], q.shape[1]) if seq_first else (q.shape[1], q.shape[2])
    shape = (*q.shape[:3], v.shape[3])
    out = new_tensor(shape, q.dtype, _seq_first(shape) if kernel == "efficient" else _empty_like(q, shape))
    statistics = new_tensor((q.shape[0], heads, seq), "fp32")
    if node:
        node.save(q, k, v, mask)
    record(_FLASH[kernel], inputs, (out, statistics), attrs=attrs)
    if node:
        node.save(out.alias(), statistics)
        node.produces(out)
    return out


class AttentionKernel(NamedTuple):
    """A fused kernel without autograd.

    Attributes:
        forward: of q, k, v and whether it is causal: the output and the log-sum-exp of scores, (b, h, s).
        backward: of the output's gradient, q, k, v, output, log-sum-exp, and whether it is causal: three gradients.
    """

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[[Sequence[Tensor], bool], tuple[Tensor, Tensor, Tensor]]


def fused_kernel(q: Tensor, k: Tensor, v: Tensor) -> AttentionKernel:
    """The kernel that the device picks for operands without a mask, for who calls it by itself.

    Raises:
        UserError: the device has none for them, and works by parts.
    """
    kernel = _choose(q, k, v, None, 0.0)
    if kernel not in _FLASH:
        heads = f"{q.shape[1]} heads over {k.shape[1]} in {q.dtype}"
        raise UserError(f"cp: the device has no fused attention of {heads}, which shared sequences take; use --cp 1")

    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        shape = (*q.shape[:3], v.shape[3])
        out = new_tensor(shape, q.dtype, _seq_first(shape) if kernel == "efficient" else _empty_like(q, shape))
        statistics = new_tensor(q.shape[:3], "fp32")
        record(_FLASH[kernel], (q, k, v), (out, statistics), Attrs(causal=causal))
        return out, statistics

    def backward(given: Sequence[Tensor], causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        own_order = kernel in ("cpu", "efficient")
        q, k, v = (
            new_tensor(x.shape, x.dtype, _seq_first(x.shape) if own_order else _empty_like(x)) for x in given[1:4]
        )
        record(_FLASH_BACKWARD[kernel], given, (q, k, v), Attrs(causal=causal))
        return q, k, v

    return AttentionKernel(forward, backward)


def _seq_first(shape: Shape) -> Shape:
    """Strides of a (b, h, s, d) tensor that lies in memory as (b, s, h, d), as some kernels write theirs."""
    return strides_in_order(shape, (0, 2, 1, 3))


def _empty_like(x: Tensor, shape: Shape | None = None) -> Shape:
    """Strides of `torch.empty_like(x)`, or of another shape laid out alike: x's order of dims, densely."""
    if shape is None or same_shape(shape, x.shape):
        return elementwise_strides(x.shape, ((x.shape, x.strides),))
    return strides_in_order(shape, by_stride(x.shape, [x.strides]))


def _fused_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    assert g is not None
    kernel, attrs = node.attrs
    q, k, v, mask, out, statistics = node.unpack()
    own_order = kernel in ("cpu", "efficient")
    grad_of = [new_tensor(x.shape, x.dtype, _seq_first(x.shape) if own_order else _empty_like(x)) for x in (q, k, v)]
    if node.needs[3:] == (True,):
        grad_of.append(new_tensor(mask.shape, mask.dtype))
    inputs = [x for x in (g, q, k, v, out, statistics, mask) if x is not None]
    record(_FLASH_BACKWARD[kernel], inputs, grad_of, attrs=attrs)
    return tuple(x if need else None for x, need in zip_longest(grad_of, node.needs))


def _math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, p: float, broadcast: bool) -> Tensor:
    """`_scaled_dot_product_attention_math`: 16-bit inputs are computed in fp32, the scale split over both operands."""
    dtype = q.dtype
    current = tape()
    autocast, current.autocast = current.autocast, None
    try:
        q32, k, v = cast(q, "fp32"), cast(k, "fp32"), cast(v, "fp32")  # C++ holds the unscaled query to the end
        if not broadcast:
            groups = q.shape[1] // k.shape[1]
            k, v = _interleaved(k, groups), _interleaved(v, groups)
        q = scale(q32)
        if causal:
            s = q.shape[2]
            mask = additive_mask(_tril(fill("ones", (s, s), "bool")), "fp32")
        elif mask is not None:
            mask = additive_mask(mask, dtype)
        weights = matmul(q, scale(transpose(k, 2, 3)))
        if mask is not None:
            weights = add(weights, mask)
        weights = softmax(weights, name="_safe_softmax")
        weights = dropout(weights, p)
        if dtype != "fp32":
            _ = cast(weights, dtype)  # the attention weights, which the caller drops
        return cast(matmul(weights, v), dtype)
    finally:
        current.autocast = autocast


def _tril(x: Tensor) -> Tensor:
    from .core import emit

    return emit("tril", (x,), x.shape, "bool")
