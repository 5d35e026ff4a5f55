"""KTO as TRL's trainer runs it, with the local variables of its `_compute_loss`.

A sample is one sequence, desirable or not; the first half of a batch is taken to be. A mismatched sequence for each, of
as many tokens, goes through model and reference without gradients: it says how far they are apart.

Source: https://arxiv.org/abs/2402.01306; trl/trainer/kto_trainer.py (1.8), loss_type kto.
"""

from collections.abc import Callable

from ..architectures.masks import read_scalar
from ..program.dims import decide
from ..program.op import ON_HOST, OVER_BUS
from ..tape.core import emit, record, tape
from ..tape.pointwise import cat, mul, sigmoid, sub
from ..tape.scores import complement, mean_all, nan_mean, nan_sum, samples_at, sum_all
from ..tape.shape import detach, view
from ..tape.tensor import Tensor
from ..tape.transfers import of_all_ranks
from .dpo import logps_of
from .parts.base import Objective, Passes, objective
from .parts.logps import log_entropy, log_sum, log_tokens, without_first, without_last


@objective("kto", title="KTO", source="trl/trainer/kto_trainer.py (1.8)")
class Kto(Objective):
    """Kahneman-Tversky optimisation: desirable sequences up, others down, as against a reference."""

    compares = "always"

    def loss(self, passes: Passes) -> Tensor:
        samples = passes.setup.batch
        counts = _counts(passes)
        inputs, kl_inputs = ([passes.tensor() for _ in range(3)] for _ in range(2))
        with tape().no_grad():
            kl_logps = _logps(passes.logits, *kl_inputs)[1]
        logits, completion_logps = _logps(passes.logits, *inputs)
        chosen_and_rejected = _indices(passes)
        kinds_of_logps = [samples_at(completion_logps, indices) for indices in chosen_and_rejected]
        kinds_of_logits = [samples_at(logits, indices) for indices in chosen_and_rejected]
        if passes.precomputed:
            ref_kl_logps, ref_completion_logps = (passes.tensor(samples, dtype="fp32") for _ in range(2))
        else:
            with tape().no_grad():
                ref_kl_logps = _logps(passes.reference_logits, *kl_inputs)[1]
            _ref_logits, ref_completion_logps = _logps(passes.reference_logits, *inputs)
        ref_kinds = [samples_at(ref_completion_logps, indices) for indices in chosen_and_rejected]
        tape().begin("loss", "forward")
        kl = mean_all(of_all_ranks(detach(mean_all(sub(kl_logps, ref_kl_logps)))))
        kl = emit("clamp", (kl,), (), kl.dtype)
        all_losses, rewards = [], []
        for kind, (logps, ref_logps) in enumerate(zip(kinds_of_logps, ref_kinds, strict=True)):
            if kind and not decide(samples > 1):
                all_losses.append(passes.tensor(0, dtype="fp32"))
                continue
            logratios = sub(logps, ref_logps)
            margin = sub(kl, logratios) if kind else sub(logratios, kl)
            all_losses.append(complement(sigmoid(mul(margin, 0.1))))
            rewards.append(mul(detach(logratios), 0.1))
        losses = cat([mul(x, 1.0) for x in all_losses], 0)
        read_scalar(kl)
        log_entropy(detach(without_last(logits)), without_first(inputs[2]))
        log_tokens(inputs[1])
        for count in counts:
            log_sum(count)
        for each in zip(rewards, kinds_of_logps, kinds_of_logits, strict=False):  # what there is none of is not logged
            for value in each:
                read_scalar(nan_sum(of_all_ranks(nan_sum(value))))
        return nan_mean(losses)


def _counts(passes: Passes) -> list[Tensor]:
    """How many samples are desirable and how many are not: counted on the host."""
    labels = passes.tensor(passes.setup.batch, dtype="bool")
    if tape().device == "cpu":
        chosen = sum_all(labels)
        return [chosen, emit("rsub.Scalar", (chosen,), (), "i64")]
    chosen, rejected = passes.scalar(), passes.scalar()
    record("sum", (labels,), (chosen,), ON_HOST)
    copied = emit("_to_copy", (chosen,), (), "i64", attrs=OVER_BUS)
    return [copied, emit("rsub.Scalar", (copied,), rejected.shape, "i64")]


def _indices(passes: Passes) -> list[Tensor]:
    """Which samples are desirable, and which are not."""
    samples = passes.setup.batch
    flags = passes.tensor(samples, dtype="bool")
    desirable = (samples + 1) // 2
    found = [emit("nonzero", (flags,), (desirable, 1), "i64")]
    others = emit("bitwise_not", (flags,), (samples,), "bool")
    found.append(emit("nonzero", (others,), (samples - desirable, 1), "i64"))
    return [view(x, (x.numel,)) for x in found]


def _logps(
    logits_of: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits, and log-probabilities of completions."""
    logits = logits_of(input_ids, attention_mask)
    return logits, logps_of(without_last(logits), without_first(input_ids), without_first(completion_mask))
