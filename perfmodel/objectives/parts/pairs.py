"""What TRL's losses on pairs without a reference share (ORPO, CPO, SimPO), with its local variables.

Source: trl/experimental/orpo/orpo_trainer.py and cpo/cpo_trainer.py (1.8: `concatenated_forward`, `get_batch_logps`).
"""

from ...program.dims import Dim, product
from ...program.op import Attrs
from ...tape.core import emit
from ...tape.elementary import div, sum_dim
from ...tape.inplace import zero_in_view
from ...tape.nn import cross_entropy
from ...tape.pointwise import binary_bool, cast, cat, fill, mul, where
from ...tape.shape import clone, contiguous, detach, narrow, view
from ...tape.tensor import Tensor
from .base import Passes
from .logps import selective_log_softmax, without_first, without_last


def concatenated(passes: Passes) -> Tensor:
    """One of the batch's tensors, chosen above rejected sequences: (sequences, seq)."""
    shape = passes.setup.batch, passes.setup.seq
    return cat((passes.tensor(*shape), passes.tensor(*shape)), 0)


def one_half(x: Tensor, pairs: Dim) -> Tensor:
    """`x[:pairs]` or `x[pairs:]`."""
    return narrow(x, 0, pairs)


def loss_of_chosen(all_logits: Tensor, labels: Tensor, pairs: Dim) -> Tensor:
    """Cross entropy of the chosen sequences, prompt and all."""
    logits = contiguous(without_last(one_half(all_logits, pairs)))
    labels = contiguous(without_first(one_half(labels, pairs)))
    logits = view(logits, (product(logits.shape[:-1]), logits.shape[-1]))
    return cross_entropy(logits, view(labels, (labels.numel,)))


def batch_logps(all_logits: Tensor, labels: Tensor, *, average: bool, in_place: bool) -> Tensor:
    """Log-probabilities of sequences, (sequences,), summed over their tokens or averaged.

    Args:
        in_place: whether labels that are ignored are overwritten.
    """
    labels, logits = clone(without_first(labels)), without_last(all_logits)
    loss_mask = emit("ne.Scalar", (labels,), labels.shape, "bool")
    ignored = emit("eq.Scalar", (labels,), labels.shape, "bool")
    labels = zero_in_view(labels, ignored) if in_place else where(ignored, fill("scalar_tensor", (), "i64"), labels)
    per_token_logps = selective_log_softmax(logits, labels)
    logps = sum_dim(mul(per_token_logps, loss_mask), -1)
    if not average:
        return logps
    lengths = emit("sum.dim_IntList", (loss_mask,), loss_mask.shape[:1], "i64", attrs=Attrs(dims=(1,)))
    return div(logps, lengths)


def rewards_of(*logps: Tensor) -> list[Tensor]:
    """β times log-probabilities, for the log."""
    return [mul(detach(x), 0.1) for x in logps]


def accuracies(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Which chosen sequence is above its rejected one."""
    return cast(binary_bool("gt.Tensor", chosen_rewards, rejected_rewards), "fp32")
