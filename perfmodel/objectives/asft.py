"""ASFT as LLaMA-Factory runs it: tokens weighted by their probability, held to a frozen model by a divergence.

With the local variables of its `asft_loss_func`. The model gets the labels, so that it computes its own loss, too,
which nobody uses. The reference is loaded in the dtype of autocast.

Source: https://arxiv.org/abs/2509.23753; llamafactory/train/trainer_utils.py, train/sft/trainer.py (0.9.5).
"""

from ..architectures.masks import read_scalar
from ..program.dims import product
from ..tape.core import emit, tape
from ..tape.elementary import div, sum_dim
from ..tape.gather import picked
from ..tape.nn import log_softmax, softmax, token_losses
from ..tape.pointwise import add, cast, mul, neg, sub, unary
from ..tape.scores import mean_all, sum_all
from ..tape.shape import contiguous, view
from ..tape.tensor import Tensor
from .parts.base import Objective, Passes, objective
from .parts.logps import without_first, without_last


@objective("asft", title="ASFT", source="llamafactory/train/trainer_utils.py (0.9.5)", quiet=False)
class Asft(Objective):
    """Anchored supervised fine-tuning."""

    compares = "always"
    scaled = False
    reference_in_amp = True
    reference_by_blocks = True

    def loss(self, passes: Passes) -> Tensor:
        input_ids, attention_mask, labels = (passes.tensor() for _ in range(3))
        ref_logits = passes.reference_logits(input_ids, attention_mask)
        outputs = passes.logits_and_loss(input_ids, attention_mask, labels)
        tape().begin("loss", "forward")
        logits = cast(outputs[0], "fp32")
        shift_logits, shift_labels = contiguous(without_last(logits)), contiguous(without_first(labels))
        shift_ref_logits = contiguous(without_last(ref_logits))
        shift_logits, shift_ref_logits = _flat(shift_logits), _flat(shift_ref_logits)
        shift_labels = view(shift_labels, (shift_labels.numel,))
        dft_loss = _weighted(shift_logits, shift_labels)
        kl_loss = _divergence(shift_logits, shift_ref_logits, shift_labels)
        return add(dft_loss, mul(kl_loss, 0.1))


def _flat(logits: Tensor) -> Tensor:
    return view(logits, (product(logits.shape[:-1]), logits.shape[-1]))


def _weighted(source: Tensor, target: Tensor) -> Tensor:
    """The mean loss of tokens, each by its probability (`_dft_cross_entropy`)."""
    per_token_loss = token_losses(source, target)
    valid_mask = _labelled(target)
    read_scalar(emit("any", (valid_mask,), (), "bool"))
    valid_losses = picked(per_token_loss, valid_mask)
    with tape().no_grad():
        target_probs = unary("exp", neg(valid_losses))
    return mean_all(mul(valid_losses, target_probs))


def _divergence(policy_logits: Tensor, ref_logits: Tensor, labels: Tensor) -> Tensor:
    """The mean divergence of the tokens' distributions from those of the reference (`_kl_divergence`)."""
    log_p, q = log_softmax(policy_logits), softmax(ref_logits)
    kl = sum_dim(sub(emit("xlogy.Tensor", (q, q), q.shape, q.dtype), mul(q, log_p)), -1)
    mask = cast(_labelled(labels), "fp32")
    return div(sum_all(mul(kl, mask)), sum_all(mask))


def _labelled(labels: Tensor) -> Tensor:
    return emit("ne.Scalar", (labels,), labels.shape, "bool")
