"""EBFT's strided training step as Axolotl's trainer runs it, with the local variables of its `compute_loss`.

A sample is one rollout: a document (`Setup.prompt`) and what was generated behind it, block by block. Generation is
outside of the step, and so is what becomes of the frozen network's hidden states (rewards); its forward pass is not.
Where adapters train, Axolotl takes one rollout after another and the head on generated tokens alone; here they go
through the model together.

Source: https://arxiv.org/abs/2603.12248; axolotl/core/trainers/ebft/strided.py (067b021).
"""

from functools import partial

from ..architectures.masks import read_scalar
from ..methods.parts.targeted import Targeted
from ..program.dims import Dim, only
from ..tape.core import emit, record, tape
from ..tape.elementary import div
from ..tape.inplace import put_in_part
from ..tape.nn import log_softmax
from ..tape.pointwise import add, cast, fill, mul, neg
from ..tape.scores import gather_last, sum_all
from ..tape.shape import detach, narrow, squeeze, unsqueeze
from ..tape.tensor import Storage, Tensor
from ..tape.transfers import scalar
from .parts.base import Objective, Passes, objective
from .parts.logps import without_first, without_last

CHUNK = 256  # tokens whose log-probabilities are made at once


@objective("ebft", title="EBFT", source="axolotl/core/trainers/ebft/strided.py (067b021)", quiet=False)
class Ebft(Objective):
    """Energy-based fine-tuning: generated blocks by how alike their features are to the document's own."""

    compares = "always"
    beside = "generation and rewards are outside of it, but for the frozen network's forward pass"
    reference_in_amp = True

    def loss(self, passes: Passes) -> Tensor:
        full_sequences, attn_mask = passes.tensor(), passes.tensor()
        generated = full_sequences.shape[1] - passes.setup.prompt_tokens
        adapters = isinstance(passes.method, Targeted)
        keep = generated + 1 if adapters else None
        logits = passes.logits(full_sequences, attn_mask, keep)
        tape().begin("loss", "forward")
        per_token_logps, chunk_logits = _of_generated(logits, without_first(full_sequences), generated)
        del logits
        if adapters:  # else Python holds on to the last chunk, and with it to all logits, until the loss returns
            del chunk_logits
        action_mask = fill("zeros", per_token_logps.shape, "bool")
        part = narrow(action_mask, 1, generated)
        record("fill_.Tensor", (part, _number("bool")), (part,))
        passes.reference_logits(full_sequences, attn_mask)
        tape().begin("loss", "forward")
        full_advantages = fill("zeros_like", per_token_logps.shape, "fp32", like=per_token_logps)
        part = narrow(full_advantages, 1, generated)
        record("copy_", (part, passes.tensor(passes.setup.batch, generated, dtype="fp32")), (part,))
        rl_loss_per_token = mul(neg(per_token_logps), detach(full_advantages))
        mask = cast(action_mask, "fp32")
        count = emit("clamp", (sum_all(cast(action_mask, "fp32")),), (), "fp32")
        rl_loss, ce_loss = div(sum_all(mul(rl_loss_per_token, mask)), count), scalar("fp32")
        loss = add(mul(rl_loss, 1.0), mul(ce_loss, 0.0))
        read_scalar(rl_loss)
        read_scalar(ce_loss)
        return loss


def _of_generated(logits: Tensor, shift_labels: Tensor, generated: Dim) -> tuple[Tensor, Tensor]:
    """Log-probabilities (rollouts, seq - 1) of generated tokens, 0 for those of documents; the last chunk of logits."""
    region_logits, region_labels = narrow(without_last(logits), 1, generated), narrow(shift_labels, 1, generated)
    per_token_logps = fill("zeros", shift_labels.shape, "fp32")
    count, chunk_logits = only(generated), region_logits
    for i in range(0, count, CHUNK):
        here = min(CHUNK, count - i)
        chunk_logits = region_logits if here == count else _last(region_logits, here)
        chunk_lp = log_softmax(cast(chunk_logits, "fp32"))
        value = squeeze(gather_last(chunk_lp, unsqueeze(_last(region_labels, here), -1)), -1)
        per_token_logps = put_in_part(per_token_logps, partial(_last, count=here), value)
    return per_token_logps, chunk_logits


def _number(dtype: str) -> Tensor:
    """A number of Python's as a tensor on the host."""
    return Tensor((), dtype, (), 1, Storage(0, None))


def _last(x: Tensor, count: int) -> Tensor:
    return narrow(x, 1, count)
