"""What of Megatron-Core's GPT is no linear layer: words, rotary positions, SwiGLU, residual sums, the loss over ranks.

What `torch.compile` fuses for Megatron (its `jit_fuser`) is one kernel each. Words and logits are cut over the ranks
that share layers; the loss sums over them three figures a token. Logits are kept as their softmax, in fp32.

Source: megatron-core 0.16.1, tensor_parallel/layers.py (`VocabParallelEmbedding`), fusions/{fused_bias_swiglu,
fused_bias_dropout,fused_cross_entropy}.py; TransformerEngine 2.11, pytorch/attention/rope.py.
"""

from collections.abc import Sequence

from ...program.dims import product
from ...program.op import Attrs
from ..autograd import differentiate
from ..core import emit, new_tensor, record, tape
from ..custom import python_function
from ..gather import zero_where
from ..pointwise import binary_bool, sub
from ..shape import clone, contiguous, transpose
from ..tensor import Grads, Node, Parameter, Storage, Tensor
from .megatron import LayerRanks, await_sent, send_gather, send_scatter, send_sum

Grad = Tensor | None


def jit_kernel(x: Tensor, *others: Tensor, width: object = None) -> Tensor:
    """One kernel that a compiler makes of elementwise operations: as x, or with another last dim."""
    shape = x.shape if width is None else (*x.shape[:-1], width)
    loops = Attrs(loops=(product(shape), 1))
    return emit("inductor::pointwise", (x, *others), shape, x.dtype, attrs=loops)


def words(weight: Parameter, ids: Tensor, shared: LayerRanks) -> Tensor:
    """Words of (batch, seq) ids by the rows (words / ranks, width) that a rank has: (seq, batch, width)."""
    node = differentiate("EmbeddingBackward0", (weight,), _words_backward, (weight.shape,))
    with tape().no_grad():
        absent, mine = None, ids
        if shared.several:
            low, high = emit("lt.Scalar", (ids,), ids.shape, "bool"), emit("ge.Scalar", (ids,), ids.shape, "bool")
            absent = binary_bool("__or__.Tensor", low, high)
            del low, high
            mine = sub(clone(ids), 1.0)
            zero_where(mine, absent)
        out = emit("embedding", (weight, mine), (*ids.shape, weight.shape[1]), weight.dtype)
        if absent is not None:
            zero_where(out, absent)
    if node:
        node.save(mine, absent)
        node.produces(out)
    if shared.tokens:
        return _scattered(contiguous(transpose(out, 0, 1)), shared)
    return contiguous(transpose(_summed(out, shared) if shared.several else out, 0, 1))


def _words_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (ids, absent), (shape,) = grads, node.unpack(), node.attrs
    assert g is not None
    if absent is not None:  # their zeros pass no gradient
        g = emit("index_put", (g, absent, Tensor((), g.dtype, (), 1, Storage(0, None))), g.shape, g.dtype)
    return (emit("embedding_dense_backward", (g, ids), shape, g.dtype),)


def _summed(x: Tensor, shared: LayerRanks) -> Tensor:
    node = differentiate("_ReduceFromModelParallelRegionBackward", (x,), _as_it_is)
    out = send_sum(x, shared.ranks).alias()
    await_sent()
    if node:
        node.produces(out)
    return out


def _as_it_is(node: Node, grads: Sequence[Grad]) -> Grads:
    return tuple(grads)


def _scattered(x: Tensor, shared: LayerRanks) -> Tensor:
    node = differentiate("_ReduceScatterToSequenceParallelRegionBackward", (x,), _gathered, (shared,))
    out = send_scatter(x, shared.ranks)
    await_sent()
    if node:
        node.produces(out)
    return clone(out)  # `clone_scatter_output_in_embedding`, so that what was scattered can go


def _gathered(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (shared,) = grads, node.attrs
    assert g is not None
    whole = send_gather(contiguous(g), shared.ranks)
    await_sent()
    return (whole,)


def fused_rotary(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions of (seq, batch, heads, d) in one kernel, by fp32 angles (seq, 1, 1, d)."""
    python_function()
    node = differentiate("FusedRoPEFuncBackward", (x,), _rotary_backward)
    with tape().no_grad():
        out = emit("te::fused_rope_forward", (x, turns), x.shape, x.dtype)
    if node:
        node.save(turns)
        node.produces(out)
    return out


def _rotary_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (turns,) = grads, node.unpack()
    assert g is not None
    python_function()
    return (emit("te::fused_rope_backward", (g, turns), g.shape, g.dtype),)


def swiglu(x: Tensor) -> Tensor:
    """silu of the first half of the last dim times the second; keeps x."""
    python_function()
    node = differentiate("SwiGLUFunctionBackward", (x,), _swiglu_backward)
    with tape().no_grad():
        out = jit_kernel(x, width=x.shape[-1] // 2)
    if node:
        node.save(x)
        node.produces(out)
    return out


def _swiglu_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (x,) = grads, node.unpack()
    assert g is not None
    python_function()
    return (jit_kernel(x, g),)


def with_residual(x: Tensor, residual: Tensor) -> Tensor:
    """`bias_dropout_add_fused_train` without bias and dropout: the residual stream with a layer's output."""
    python_function()
    node = differentiate("CompiledFunctionBackward", (x, residual), _to_both)
    with tape().no_grad():
        out = jit_kernel(x, residual)
    if node:
        node.produces(out)
    return out


def _to_both(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,) = grads
    return (g, g)


def vocab_parallel_loss(logits: Tensor, labels: Tensor, shared: LayerRanks) -> Tensor:
    """The loss of each token, (seq, batch), by (seq, batch, words / ranks) logits.

    It is `fused_vocab_parallel_cross_entropy`, four compiled programs with sums over ranks between
    them: the largest logit; exponentials, their sums and the logit of the label; the softmax, in place; backward its
    gradient.
    """
    node = differentiate("_VocabParallelCrossEntropyBackward", (logits,), _loss_backward, (logits.dtype,))
    with tape().no_grad():
        tokens, rows = labels.shape, Attrs(loops=(labels.numel, logits.shape[-1]))
        wide, largest = new_tensor(logits.shape, "fp32"), new_tensor(tokens, "fp32")
        python_function()
        record("inductor::rows", (logits,), (wide, largest), rows)
        _over_ranks(largest, shared)
        python_function()
        sums, label = (new_tensor(tokens, "fp32") for _ in range(2))
        record("inductor::rows", (wide, largest), (wide, sums), rows._replace(exponential=True))
        absent, mine = new_tensor(tokens, "bool"), new_tensor(tokens, "i64")
        each = Attrs(loops=(labels.numel, 1))
        record("inductor::pointwise", (labels,), (absent, mine), each)
        record("inductor::pointwise", (mine, largest), (label,), each)
        both = new_tensor((2 * tokens[0], *tokens[1:]), "fp32")
        record("inductor::pointwise", (label, sums), (both,), each)
        del label, sums, largest
        _over_ranks(both, shared)
        python_function()
        record("inductor::pointwise", (wide, both), (wide,), Attrs(loops=(wide.numel, 1)))
        loss = new_tensor(tokens, "fp32")
        record("inductor::pointwise", (both,), (loss,), each)
    if node:
        node.save(wide, absent, mine)
        node.produces(loss)
    return loss


def _over_ranks(x: Tensor, shared: LayerRanks) -> None:
    if shared.several:
        send_sum(x, shared.ranks)
        await_sent()


def _loss_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    """Of the softmax that it changes twice the compiler makes a copy, and writes what comes of it back, too."""
    (g,), (softmax, absent, mine), (dtype,) = grads, node.unpack(), node.attrs
    assert g is not None
    python_function()
    loops = Attrs(loops=(softmax.numel, 1))
    copied, made = new_tensor(softmax.shape, softmax.dtype), new_tensor(softmax.shape, dtype)
    record("inductor::pointwise", (softmax,), (copied,), loops)
    of_labels = Tensor(mine.shape, copied.dtype, mine.strides, mine.numel, copied.storage)
    record("inductor::scatter", (of_labels, absent, mine), (of_labels,), Attrs(loops=(mine.numel, 1)))
    record("inductor::pointwise", (copied, g), (made, softmax), loops)
    return (made,)
