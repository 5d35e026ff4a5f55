"""Normalisation, softmax, embedding and loss."""

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..program.dims import contiguous_strides, product
from .autograd import differentiate
from .core import emit, new_tensor, record, region, tape
from .pointwise import autocast_fp32, cast
from .shape import contiguous, narrow, view, view_as
from .tensor import Grads, Node, Tensor

Grad = Tensor | None


def embedding(weight: Tensor, indices: Tensor) -> Tensor:
    """Rows of (vocab, width) by int64 indices; the gradient is a dense (vocab, width) tensor."""
    node = differentiate("EmbeddingBackward0", (weight,), _embedding_backward, (weight.shape,))
    if node:
        node.save(indices)
    return emit("embedding", (weight, indices), (*indices.shape, weight.shape[1]), weight.dtype, node=node)


def _embedding_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (indices,) = grads, node.unpack()
    assert g is not None
    return (emit("embedding_dense_backward", (g, indices), node.attrs[0], g.dtype),)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """LayerNorm over the last dim; statistics in fp32 on CUDA, on the CPU in the weight's dtype.

    Fake tensors have them in x's dtype there (`Tape.view_replay`).
    """
    if tape().device == "cuda":
        x, weight = autocast_fp32(x), autocast_fp32(weight)
        bias = None if bias is None else autocast_fp32(bias)
    given = (x, weight) if bias is None else (x, weight, bias)
    node = differentiate("NativeLayerNormBackward0", given, _layer_norm_backward)
    on_cpu = x.dtype if tape().view_replay else weight.dtype
    statistics = on_cpu if tape().device == "cpu" else "fp32"
    out = new_tensor(x.shape, x.dtype)
    mean, rstd = (new_tensor((*x.shape[:-1], 1), statistics) for _ in range(2))
    if node:
        node.save(*given)
    record("native_layer_norm", given, (out, mean, rstd))
    if node:
        node.save(mean, rstd)
        node.produces(out)
    return out


def _layer_norm_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (*given, mean, rstd) = grads, node.unpack()
    assert g is not None
    outs = [new_tensor(s.shape, s.dtype) if need else None for s, need in zip(given, node.needs, strict=True)]
    made = [o for o in outs if o is not None]
    record("native_layer_norm_backward", (g, given[0], mean, rstd, *given[1:]), made)
    return tuple(outs)


def softmax(x: Tensor, dtype: str | None = None, name: str = "_softmax") -> Tensor:
    """Softmax over the last dim, in `dtype` if given; saves its output."""
    x = cast(x, dtype) if dtype else autocast_fp32(x)
    node = differentiate("SoftmaxBackward0", (x,), _softmax_backward)
    out = emit(name, (x,), x.shape, x.dtype, strides=contiguous_strides(x.shape), node=node)
    if node:
        node.save_output(out)
    return out


def _softmax_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (y,) = grads, node.unpack()
    assert g is not None
    return (emit("_softmax_backward_data", (g, y), y.shape, g.dtype),)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of (tokens, vocab) logits: log-softmax, then negative log-likelihood."""
    if tape().autocast:
        logits = cast(logits, "fp32")
    log_probs = log_softmax(logits)
    node = differentiate("NllLossBackward0", (log_probs,), _nll_backward)
    if node:
        node.save(log_probs, labels)
    loss, weight = new_tensor((), log_probs.dtype), new_tensor((), log_probs.dtype)
    record("nll_loss_forward", (log_probs, labels), (loss, weight))
    if node:
        node.save(weight)
        node.produces(loss)
    return loss


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of each token, (tokens,), by (tokens, vocab) logits."""
    log_probs = log_softmax(logits)
    node = differentiate("NllLossBackward0", (log_probs,), _nll_backward)
    losses, weight = new_tensor(labels.shape, log_probs.dtype), new_tensor((), log_probs.dtype)
    record("nll_loss_forward", (log_probs, labels), (losses, weight))
    if node:
        node.save(log_probs, labels)
        node.save(weight)
        node.produces(losses)
    return losses


def log_softmax(x: Tensor) -> Tensor:
    """`F.log_softmax(x, dim=-1)`; saves its output."""
    node = differentiate("LogSoftmaxBackward0", (x,), _log_softmax_backward)
    out = emit("_log_softmax", (x,), x.shape, x.dtype, node=node)
    if node:
        node.save_output(out)
    return out


def _log_softmax_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (y,) = grads, node.unpack()
    assert g is not None
    return (emit("_log_softmax_backward_data", (g, y), y.shape, g.dtype),)


def _nll_backward(node: Node, grads: Sequence[Grad]) -> Grads:
    (g,), (log_probs, labels, weight) = grads, node.unpack()
    assert g is not None
    return (emit("nll_loss_backward", (g, log_probs, labels, weight), log_probs.shape, log_probs.dtype),)


@region
def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """transformers' `ForCausalLMLoss`: fp32 logits, labels shifted by one; in old versions the logits were.

    Raises:
        UserError: the logits were, and none is left.
    """
    logits = cast(logits, "fp32")
    if tape().stack.shifts_logits:
        seq = logits.shape[1] - 1
        if np.min(seq) < 1:
            raise UserError("seq 1: one token has no next one to predict; use 2 or more")
        logits, labels = contiguous(narrow(logits, 1, seq)), contiguous(narrow(labels, 1, seq))
        target = view(labels, (labels.numel,))
    elif tape().context is not None:  # they were shifted before the sequence was cut
        target = view(labels, (labels.numel,))
    else:
        target = shifted_labels(labels)
    flat = view(logits, (product(logits.shape[:-1]), logits.shape[-1]))
    del logits
    return cross_entropy(flat, target)


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of (batch, seq, classes) logits with a label for each token, in the logits' dtype."""
    return cross_entropy(view(logits, (product(logits.shape[:-1]), logits.shape[-1])), view(labels, (labels.numel,)))


def shifted_labels(labels: Tensor) -> Tensor:
    """(batch, seq) labels moved by one token, as (batch·seq,)."""
    batch, seq = labels.shape
    padded = emit("constant_pad_nd", (labels,), (batch, seq + 1), "i64")
    shifted = contiguous(view_as("slice.Tensor", padded, labels.shape, padded.strides))
    return view(shifted, (product(shifted.shape),))
