"""GRPO's training step as TRL's trainer runs it, with the local variables of its `_compute_loss`.

Generation and rewards are outside of it. A sample is one sequence, a prompt and its completion, of which only the
completion has logits (`Setup.prompt`). A reference that is named gives its log-probabilities in every step.

Source: https://arxiv.org/abs/2402.03300; trl/trainer/grpo_trainer.py (1.8), loss_type dapo.
"""

from ..architectures.masks import read_scalar
from ..tape.core import emit, record, tape
from ..tape.elementary import div
from ..tape.gather import clamp
from ..tape.inplace import divide_view
from ..tape.pointwise import add, binary_bool, cast, cat, fill, mul, neg, sub
from ..tape.scores import lesser, nan_mean, natural_exp, sum_all
from ..tape.shape import detach, narrow, unsqueeze
from ..tape.tensor import Tensor
from ..tape.transfers import of_all_ranks
from .parts.base import Objective, Passes, objective
from .parts.logps import entropy_from_logits, selective_log_softmax, without_last

Pair = tuple[Tensor, Tensor]  # of prompts and of completions


@objective("grpo", title="GRPO", source="trl/trainer/grpo_trainer.py (1.8)", quiet=False)
class Grpo(Objective):
    """Group relative policy optimisation: sequences by their advantage over others to the same prompt."""

    compares = "if named"
    beside = "generation and rewards are outside of it"
    scaled = False

    def loss(self, passes: Passes) -> Tensor:
        samples, prompt = passes.setup.batch, passes.setup.prompt_tokens
        completion = passes.setup.seq - prompt
        ids, masks = ((passes.tensor(samples, prompt), passes.tensor(samples, completion)) for _ in range(2))
        ref_per_token_logps = None
        if passes.setup.reference == "precomputed":
            ref_per_token_logps = passes.tensor(samples, completion, dtype="fp32")
        elif passes.setup.reference != "auto":
            ref_per_token_logps = _of_reference(passes, ids, masks)
        per_token_logps, entropies = _of_model(passes, ids, masks)
        tape().begin("loss", "forward")
        mask, advantages = masks[1], unsqueeze(passes.tensor(samples, dtype="fp32"), 1)
        old_per_token_logps = detach(per_token_logps)
        coef_1 = natural_exp(sub(per_token_logps, old_per_token_logps))
        per_token_kl = None if ref_per_token_logps is None else _divergence(ref_per_token_logps, per_token_logps)
        coef_2 = clamp(coef_1, low=True, high=True)
        per_token_loss1, per_token_loss2 = mul(coef_1, advantages), mul(coef_2, advantages)
        per_token_loss = neg(lesser(per_token_loss1, per_token_loss2))
        if per_token_kl is not None:
            per_token_loss = add(per_token_loss, mul(per_token_kl, 0.1))
        normalizer = emit("div.Tensor", (passes.scalar(),), (), "fp32")
        loss = div(sum_all(mul(per_token_loss, mask)), normalizer)
        _log(mask, per_token_kl, entropies, coef_1, advantages)
        return loss


def _of_model(passes: Passes, ids: Pair, masks: Pair) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of the completions."""
    input_ids, attention_mask, completion = cat(ids, 1), cat(masks, 1), ids[1].shape[1]
    logits = passes.logits(input_ids, attention_mask, completion + 1)
    logits = divide_view(logits, lambda x: narrow(without_last(x), 1, completion))
    all_logps = selective_log_softmax(logits, narrow(input_ids, 1, completion))
    with tape().no_grad():
        all_entropies = entropy_from_logits(logits)
    return cat((all_logps,), 0), cat((all_entropies,), 0)


def _of_reference(passes: Passes, ids: Pair, masks: Pair) -> Tensor:
    """Log-probabilities of the completions by the reference."""
    input_ids, attention_mask, completion = cat(ids, 1), cat(masks, 1), ids[1].shape[1]
    logits = passes.reference_logits(input_ids, attention_mask, completion + 1)
    with tape().no_grad():
        logits = divide_view(logits, lambda x: narrow(without_last(x), 1, completion))
        return cat((selective_log_softmax(logits, narrow(input_ids, 1, completion)),), 0)


def _divergence(ref_per_token_logps: Tensor, per_token_logps: Tensor) -> Tensor:
    """The estimate of the divergence from the reference, token by token."""
    apart = natural_exp(sub(ref_per_token_logps, per_token_logps))
    return sub(sub(apart, sub(ref_per_token_logps, per_token_logps)), 1.0)


def _log(mask: Tensor, per_token_kl: Tensor | None, entropies: Tensor, coef_1: Tensor, advantages: Tensor) -> None:
    """What is logged: means over the completions' tokens, and how many ratios were clipped."""
    completion_token_count = emit("clamp", (sum_all(mask),), (), "fp32")

    def masked_batch_mean(x: Tensor) -> Tensor:
        return div(sum_all(mul(x, mask)), completion_token_count)

    for value in (per_token_kl, entropies):
        if value is not None:
            read_scalar(nan_mean(of_all_ranks(masked_batch_mean(value))))
    low, high = (
        binary_bool(
            "bitwise_and.Tensor", *(emit(f"{side}.Scalar", (x,), x.shape, "bool") for x in (coef_1, advantages))
        )
        for side in ("lt", "gt")
    )
    region = binary_bool("bitwise_or.Tensor", low, high)
    ratios = [masked_batch_mean(cast(clipped, "fp32")) for clipped in (low, high, region)]
    for ratio, extreme in zip(ratios, ("min", "max", None), strict=True):
        ratio = of_all_ranks(ratio)
        read_scalar(nan_mean(ratio))
        if extreme is not None:
            read_scalar(_nan_extreme(extreme, ratio))


def _nan_extreme(name: str, x: Tensor) -> Tensor:
    """The least or the greatest number among numbers, after a look whether there is any."""
    read_scalar(emit("all", (emit("isnan", (x,), x.shape, "bool"),), (), "bool"))
    numbers = emit("bitwise_not", (emit("isnan", (x,), x.shape, "bool"),), x.shape, "bool")
    if x.shape:
        return emit(name, (emit("index.Tensor", (x, numbers), x.shape, x.dtype),), (), x.dtype)
    read_scalar(numbers)
    index = fill("empty.memory_format", (1,), "i64")  # one flag picks by the index that it makes
    record("fill_.Scalar", (index,), (index,))
    return emit(name, (emit("index.Tensor", (unsqueeze(x, 0), index), (1,), x.dtype),), (), x.dtype)
