"""Log-probabilities of tokens and what TRL logs of them, with the local variables of TRL.

Every token is one of a completion but the first, which no token predicts.

Source: trl/trainer/utils.py (1.8: `selective_log_softmax`, `entropy_from_logits`).
"""

from ...architectures.masks import read_scalar
from ...program.dims import only
from ...program.op import Op, Spec
from ...tape.core import append_op, emit, new_tensor, tape
from ...tape.elementary import sum_dim
from ...tape.nn import log_softmax
from ...tape.pointwise import mul, neg, sub, unary
from ...tape.scores import gather_last, logsumexp, mean_all, sum_all, unbound
from ...tape.shape import detach, narrow, reshape, squeeze, unsqueeze
from ...tape.split import stack
from ...tape.tensor import Tensor
from ...tape.transfers import of_all_ranks

ROWS = 128  # tokens whose entropy is computed at once


def without_first(x: Tensor) -> Tensor:
    """`x[:, 1:]` of (sequences, seq)."""
    return narrow(x, 1, x.shape[1] - 1)


def without_last(logits: Tensor) -> Tensor:
    """`logits[:, :-1]` of (sequences, seq, vocab)."""
    return narrow(logits, 1, logits.shape[1] - 1)


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of the tokens `index`, (n, seq), by logits (n, seq, vocab): row by row, to save memory."""
    index = unsqueeze(index, -1)
    if logits.dtype == "fp32":
        selected_logits = gather_last(logits, index)
        logsumexp_values = stack([logsumexp(row) for row in unbound(logits)], 0)
        return squeeze(sub(selected_logits, unsqueeze(logsumexp_values, -1)), -1)
    per_token_logps = []
    for row_logits, row_labels in zip(unbound(logits), unbound(index), strict=True):
        row_logps = log_softmax(row_logits)
        per_token_logps.append(gather_last(row_logps, row_labels))
    return squeeze(stack(per_token_logps, 0), -1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropies (n, seq) of constant logits (n, seq, vocab), `ROWS` tokens at once.

    Raises:
        MixedStructure: a grid whose points have other numbers of chunks.
    """
    flat_logits = reshape(logits, (logits.shape[0] * logits.shape[1], logits.shape[2]))
    after, count = tape().part.name, flat_logits.shape[0]
    whole, rest = only(count // ROWS), only(count % ROWS)
    entropies = []
    for tokens, times in ((ROWS, whole), (rest, 1)):
        if tokens and times:
            tape().begin("entropy", "forward").repeat = times
            entropies.append((_entropy(narrow(flat_logits, 0, tokens)), times))
    tape().begin(after, "forward")
    out = new_tensor((count,), logits.dtype)
    chunks = tuple(Spec(e.dtype, e.shape, times) for e, times in entropies)
    append_op(Op("cat", chunks, (out.spec,), out.nbytes, out.nbytes), (), (out,))
    for e, times in entropies:
        e.storage.copies = times
    return reshape(out, logits.shape[:-1])


def _entropy(chunk: Tensor) -> Tensor:
    logps = log_softmax(chunk)
    return neg(sum_dim(mul(unary("exp", logps), logps), -1))


def log_mean(x: Tensor) -> None:
    """`gather(x).mean().item()`."""
    read_scalar(mean_all(of_all_ranks(x)))


def log_sum(x: Tensor) -> None:
    """`gather(x).sum().item()`."""
    read_scalar(sum_all(of_all_ranks(x)))


def log_ratio(part: Tensor, whole: Tensor) -> None:
    """`(part / whole).item() if whole > 0 else 0.0` of two numbers."""
    read_scalar(emit("gt.Scalar", (whole,), (), "bool"))
    read_scalar(emit("div.Tensor", (part, whole), (), part.dtype if part.is_floating else "fp32"))


def log_entropy(shift_logits: Tensor, mask: Tensor) -> None:
    """The mean entropy of the tokens that a mask has."""
    per_token_entropy = entropy_from_logits(detach(shift_logits))
    entropy_sum = sum_all(mul(per_token_entropy, mask))
    total_tokens = sum_all(mask)
    entropy_sum, total_tokens = sum_all(of_all_ranks(entropy_sum)), sum_all(of_all_ranks(total_tokens))
    log_ratio(entropy_sum, total_tokens)


def log_tokens(attention: Tensor) -> None:
    """How many tokens there were."""
    log_sum(sum_all(attention))
