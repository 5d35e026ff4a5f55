"""Eager PyTorch ops as the kernels that Hugging Face's code and autograd launch, with the bytes of each.

`n` counts elements, `size` is bytes an element. Written by hand from transformers' modeling_llama.py and PyTorch's
derivatives.yaml; they serve to read Liger's measurements, whose rows are whole ops. Predictions use the tape instead.
"""

from typing import NamedTuple

import numpy as np

UNARY = 2.0 / 3.0  # a unary kernel computes two addresses an element, a binary one three
WAITS = 24  # launches' worth of time that passes beside: small kernels of the sort, the host that asks for segments


class TimedKernel(NamedTuple):
    """One launch: bytes read, bytes written, kind of `pointwise_time`, elements, rows, elements of a row."""

    read: float
    written: float
    kind: str = "pointwise"
    elements: float | None = None
    rows: float | None = None
    row_elements: float | None = None


Kernels = list[TimedKernel]


def _small(rows: float) -> TimedKernel:
    return TimedKernel(4.0 * rows, 4.0 * rows)


def _cast(n: float, source: int, target: int) -> Kernels:
    return [] if source == target else [TimedKernel(n * source, n * target, "cast", n)]


def rms_norm_forward(rows: float, hidden: float, size: int = 2, weight_size: int = 2) -> Kernels:
    """LlamaRMSNorm: to fp32, pow, mean, add, rsqrt, mul, to the input's dtype, times the weight."""
    n, out = rows * hidden, max(size, weight_size)
    return [
        *_cast(n, size, 4),
        TimedKernel(4 * n, 4 * n),
        TimedKernel(4 * n, 4.0 * rows, "reduction"),
        _small(rows),
        _small(rows),
        TimedKernel(4 * n, 4 * n, "strided", n),
        *_cast(n, 4, size),
        TimedKernel(n * size, n * out, "strided", n),
    ]


def rms_norm_backward(rows: float, hidden: float, size: int, weight_size: int, grad_size: int) -> Kernels:
    """Autograd of `rms_norm_forward` with a trained weight."""
    n, out = rows * hidden, max(size, weight_size)
    return [
        *_cast(n, grad_size, out),
        TimedKernel(n * out, n * out, "strided", n),  # gradient of the normalised input: grad * weight
        *_cast(n, out, size),
        TimedKernel(n * (out + size), n * out, "strided" if out != size else "pointwise", n),  # grad * hidden
        TimedKernel(n * out, 4.0 * hidden, "column_reduction"),  # summed over the rows
        *_cast(n, size, 4),
        TimedKernel(4 * n, 4 * n, "strided", n),
        TimedKernel(8 * n, 4 * n),
        TimedKernel(4 * n, 4.0 * rows, "reduction"),
        *[_small(rows)] * 4,  # rsqrt: pow, mul, mul; mean: div
        TimedKernel(4.0 * rows, 4 * n, "strided", n * UNARY),  # mean: expand and divide
        *[TimedKernel(4 * n, 4 * n)] * 2,  # pow: x, 2x
        TimedKernel(8 * n, 4 * n),  # times grad
        TimedKernel(8 * n, 4 * n),  # the two uses of hidden
        *_cast(n, 4, size),
    ]


def rope_forward(n: float, size: int = 2) -> Kernels:
    """apply_rotary_pos_emb on one tensor of n elements: q*cos + cat(-x2, x1)*sin."""
    return [
        TimedKernel(n * size, n * size, "strided", n),
        TimedKernel(n * size / 2, n * size / 2, "strided", n / 2 * UNARY),
        TimedKernel(n * size, n * size, "cat", n * UNARY),
        TimedKernel(n * size, n * size, "strided", n),
        TimedKernel(2 * n * size, n * size, "strided", n),
    ]


def rope_backward(n: float, size: int = 2) -> Kernels:
    """Two products, neg, two slice backwards (zeros and copy), two sums of gradients."""
    half, zeros = TimedKernel(n * size / 2, n * size / 2, "strided", n / 2 * UNARY), TimedKernel(0.0, n * size)
    return [
        *[TimedKernel(n * size, n * size, "strided", n)] * 2,
        half,
        *[zeros, half] * 2,
        TimedKernel(2 * n * size, n * size),
        TimedKernel(2 * n * size, n * size, "strided", n),
    ]


def cross_entropy_forward(rows: float, vocab: float, nll_threads: int) -> Kernels:
    """fp32 log_softmax and nll_loss: one CTA of nll_threads (32 in PyTorch of 2024, up to 1024 since)."""
    n = rows * vocab
    steps = float(np.ceil(rows / nll_threads))
    return [TimedKernel(4 * n, 4 * n, "softmax", n, rows, vocab), TimedKernel(8.0 * rows, 8.0, "serial", steps)]


def cross_entropy_backward(rows: float, vocab: float) -> Kernels:
    """nll backward into zeros, log_softmax backward (sum of grad, then exp(y) * sum)."""
    n = rows * vocab
    return [
        TimedKernel(0.0, 4 * n),
        _small(rows),
        TimedKernel(4 * n, 4.0 * rows, "reduction"),
        TimedKernel(8 * n, 4 * n),
    ]


def accumulate_grad(n: float, size: int = 2) -> Kernels:
    """grad += new: what .backward() does when .grad exists."""
    return [TimedKernel(2 * n * size, n * size)]


def layer_norm_forward(rows: float, hidden: float, size: int = 4) -> Kernels:
    """One native kernel, a row a CTA, two passes."""
    n = rows * hidden
    return [TimedKernel(n * size, n * size, "norm", n, rows, hidden)]


def layer_norm_backward(rows: float, hidden: float, size: int = 4) -> Kernels:
    """Input gradient (two passes over dy and x), and the column sums for weight and bias."""
    n = rows * hidden
    gradient = TimedKernel(4 * n * size, n * size, "norm_backward", n, rows, hidden)
    return [gradient, TimedKernel(2 * n * size, 8.0 * hidden, "column_reduction")]


def embedding_forward(tokens: float, hidden: float, vocab: float, size: int) -> Kernels:
    """index_select; rows that repeat are read once if the vocabulary is smaller than the batch."""
    n = tokens * hidden
    return [TimedKernel(min(n, vocab * hidden) * size, n * size, "embedding", n, tokens)]


def embedding_backward(tokens: float, hidden: float, vocab: float, size: int) -> Kernels:
    """Dense: zeros of the whole table, sort of the indices, then gradients summed per distinct token."""
    n, table = tokens * hidden, vocab * hidden
    distinct = distinct_rows(tokens, vocab) * hidden
    return [
        TimedKernel(0.0, table * size),
        *[TimedKernel(8.0 * tokens, 8.0 * tokens)] * 6,
        *[TimedKernel(0.0, 0.0)] * WAITS,
        TimedKernel(n * size, 4.0 * distinct, "strided", n),
        TimedKernel(4.0 * distinct, 4.0 * distinct, "embedding", distinct),
        TimedKernel(4.0 * distinct, size * distinct, "embedding", distinct),
    ]


def distinct_rows(tokens: float, vocab: float) -> float:
    """Of a table, rows that some of so many random tokens have."""
    return vocab * -float(np.expm1(tokens * np.log1p(-1.0 / max(vocab, 2.0))))


def fused_norm_backward(rows: float, hidden: float, size: int, read: int = 2) -> Kernels:
    """Liger's backward of an RMS norm since its version 0.3: one CTA an SM, rows in series."""
    n = rows * hidden
    return [TimedKernel(read * n * size, n * size, "fused_norm_backward", n, rows, hidden)]
