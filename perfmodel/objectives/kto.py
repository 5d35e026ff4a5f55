"""KTO as TRL's trainer runs it, with the local variables of its `_compute_loss`.

A sample is one sequence, desirable or not; the first half of a batch is taken to be. A mismatched sequence for each, of
as many tokens, goes through model and reference without gradients: it says how far they are apart.

Source: https://arxiv.org/abs/2402.01306; trl/trainer/kto_trainer.py (1.8), loss_type kto.
"""

from collections.abc import Callable

from ..architectures.masks import read_scalar
from ..program.dims import Dim, decide
from ..tape.core import emit, tape
from ..tape.pointwise import cat, mul, sigmoid, sub
from ..tape.scores import complement, mean_all, nan_sum, samples_at
from ..tape.shape import detach
from ..tape.tensor import Tensor
from .dpo import logps_of
from .parts.base import Objective, Passes, objective
from .parts.logps import log_entropy, log_sum, log_tokens, nan_mean, without_first, without_last


@objective("kto", title="KTO", source="trl/trainer/kto_trainer.py (1.8)")
class Kto(Objective):
    """Kahneman-Tversky optimisation: desirable sequences up, others down, as against a reference."""

    compares = "always"

    def loss(self, passes: Passes) -> Tensor:
        samples = passes.setup.batch
        inputs, kl_inputs = ([passes.tensor() for _ in range(3)] for _ in range(2))
        with tape().no_grad():
            kl_logps = _logps(passes.logits, *kl_inputs)[1]
        logits, completion_logps = _logps(passes.logits, *inputs)
        chosen_and_rejected = [passes.tensor(n) for n in _kinds(samples)]
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
        kl = mean_all(detach(mean_all(sub(kl_logps, ref_kl_logps))))
        kl = emit("clamp", (kl,), (), kl.dtype)
        all_losses, rewards = [], []
        for kind, (logps, ref_logps) in enumerate(zip(kinds_of_logps, ref_kinds, strict=True)):
            logratios = sub(logps, ref_logps)
            margin = sub(kl, logratios) if kind else sub(logratios, kl)
            all_losses.append(complement(sigmoid(mul(margin, 0.1))))
            rewards.append(mul(detach(logratios), 0.1))
        losses = cat([mul(x, 1.0) for x in all_losses], 0)
        read_scalar(kl)
        log_entropy(detach(without_last(logits)), without_first(inputs[2]))
        log_tokens(inputs[1])
        for _ in range(2):
            log_sum(passes.tensor(1))  # how many of each kind
        for each in zip(rewards, kinds_of_logps, kinds_of_logits, strict=True):
            for value in each:
                read_scalar(nan_sum(nan_sum(value)))
        return nan_mean(losses)


def _kinds(samples: Dim) -> list[Dim]:
    """How many samples are desirable, and how many are not, if there are any."""
    desirable = (samples + 1) // 2
    return [desirable, samples - desirable] if decide(samples > 1) else [desirable]


def _logps(
    logits_of: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits, and log-probabilities of completions."""
    logits = logits_of(input_ids, attention_mask)
    return logits, logps_of(without_last(logits), without_first(input_ids), without_first(completion_mask))
