"""Losses of objectives over the logits of a traced model, as TRL's trainers make them (1.8), without what they log.

The tape has its own models' steps with what is logged (`perfmodel.objectives`). A reference is the model without its
adapters: a second model is not traced.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import UserError
from ...objectives import found
from ...setup import Setup
from .family import Inputs

BETA = 0.1  # any number: it changes no call


def asked_loss(setup: Setup, model: Any, of_model: Callable[[Any, Inputs], torch.Tensor]) -> Callable[[Inputs], Any]:
    """What makes the loss of a setup's objective from inputs.

    Args:
        of_model: makes the model's own.

    Raises:
        UserError: the objective needs a second model.
    """
    if setup.objective == "sft":
        return lambda inputs: of_model(model, inputs)
    compares = setup.objective == "dpo" or setup.reference != "auto"
    if compares and (not hasattr(model, "disable_adapter") or setup.reference not in ("auto", "adapter-off")):
        raise UserError(f"--traced cannot follow --objective {setup.objective} beside a second model; use lora")
    loss = {"dpo": _dpo, "grpo": _grpo}[setup.objective]
    return lambda inputs: loss(setup, model, inputs)


def quietened(setup: Setup, model: Any) -> None:
    """Switch dropout off where an objective's trainer does, in blocks that no trace runs, too.

    Source: trl/trainer/utils.py, `disable_dropout_in_model`.
    """
    if found(setup.objective).quiet:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0


def _logits(setup: Setup, model: Any, inputs: Inputs, kept: int = 0, *, reference: bool = False) -> torch.Tensor:
    """Logits of (the last `kept`) tokens, in fp32 under autocast, as accelerate gives them."""
    given: dict[str, Any] = {name: value for name, value in inputs.items() if name != "labels"}
    if kept:
        given["logits_to_keep"] = kept
    with model.disable_adapter() if reference else nullcontext(), torch.set_grad_enabled(not reference):
        logits: torch.Tensor = model(**given, use_cache=False).logits
    return logits.float() if setup.amp else logits


def _log_probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of tokens (n, seq) by logits (n, seq, vocab), row by row."""
    places = tokens.unsqueeze(-1)
    if logits.dtype == torch.float32:
        normalizers = torch.stack([torch.logsumexp(row, -1) for row in logits])
        return (logits.gather(-1, places) - normalizers.unsqueeze(-1)).squeeze(-1)
    rows = [F.log_softmax(row, -1).gather(-1, place) for row, place in zip(logits, places, strict=True)]
    return torch.stack(rows).squeeze(-1)


def _dpo(setup: Setup, model: Any, inputs: Inputs) -> torch.Tensor:
    """The sigmoid loss of pairs: chosen sequences, then as many rejected ones (dpo_trainer.py)."""
    tokens, mask = inputs["input_ids"][:, 1:], inputs["attention_mask"][:, 1:]

    def of_halves(*, reference: bool) -> tuple[torch.Tensor, ...]:
        logits = _logits(setup, model, inputs, reference=reference)
        with torch.autocast("cpu", enabled=False), torch.set_grad_enabled(not reference):
            each = _log_probabilities(logits[:, :-1], tokens)
            each[mask == 0] = 0.0
            return each.sum(1).chunk(2)

    (chosen, rejected), (ref_chosen, ref_rejected) = of_halves(reference=False), of_halves(reference=True)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (-F.logsigmoid(BETA * margin)).mean()


def _grpo(setup: Setup, model: Any, inputs: Inputs) -> torch.Tensor:
    """The clipped loss of completions, each by its advantage (grpo_trainer.py, loss_type dapo)."""
    completion = int(setup.seq) - int(setup.prompt_tokens)
    tokens, mask = inputs["input_ids"][:, -completion:], inputs["attention_mask"][:, -completion:]

    def of_completions(*, reference: bool) -> torch.Tensor:
        logits = _logits(setup, model, inputs, completion + 1, reference=reference)[:, :-1, :][:, -completion:, :]
        with torch.autocast("cpu", enabled=False), torch.set_grad_enabled(not reference):
            logits.div_(1.0)  # the temperature
            return _log_probabilities(logits, tokens)

    other = of_completions(reference=True) if setup.reference != "auto" else None
    each, advantages = of_completions(reference=False), mask[:, :1].float()
    with torch.autocast("cpu", enabled=False):
        ratio = torch.exp(each - each.detach())
        loss = -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
        if other is not None:
            loss = loss + BETA * (torch.exp(other - each) - (other - each) - 1)
        return (loss * mask).sum() / mask.sum()
