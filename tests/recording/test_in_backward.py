"""The optimizer inside backward: the same update, weight by weight, and no gradient outlives it."""

from functools import partial
from typing import Any

import pytest

pytest.importorskip("transformers")

import reference_optim
from helpers import architecture_of, config_of, setup_of

from perfmodel import Setup, explain, methods, predict
from perfmodel.errors import UserError
from perfmodel.recording.record import build
from perfmodel.tracing.programs import models, updates
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import Case

INSIDE = {"in_backward": True, "clip_grad": False}


class InBackward:
    """An optimizer for each weight, stepped by a hook on its gradient."""

    def __init__(self, model: Any, make: Any) -> None:
        self.each = {p: make(p) for p in model.parameters() if p.requires_grad}
        for p in self.each:
            p.register_post_accumulate_grad_hook(self.update)

    def update(self, p: Any) -> None:
        self.each[p].step()
        self.each[p].zero_grad()

    @property
    def state(self) -> dict[Any, Any]:
        return {p: optimizer.state[p] for p, optimizer in self.each.items()}

    def step(self) -> None:
        """Nothing is left to do."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing is left."""


def of_form(model: Any, form: str) -> InBackward:
    return InBackward(model, lambda p: updates.make_optimizer([p], form))


def of_apollo(model: Any, form: str, method: Any) -> InBackward:
    low = {p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    rank = {"rank": method.r, "scale_type": method.scale_type}
    return InBackward(model, lambda p: reference_optim.ApolloAdamW([{"params": [p], **(rank if p in low else {})}]))


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "full", {"optimizer": "adamw-foreach"}),
        ("qwen2", "full", {"optimizer": "adamw-fused", "dtype": "fp32", "amp": "bf16", "checkpoint": "block"}),
        ("gpt2", "full", {"optimizer": "adamw-loop"}),
        ("llama", "lora:r=4", {"optimizer": "sgd-momentum", "checkpoint": "block-reentrant"}),
        ("llama", "apollo:r=4", {"checkpoint": "block"}),
    ],
)
def test_the_tape_equals_the_program_with_hooks(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: all calls of the update are calls of backward; peak memory within 2 %."""
    config, architecture, setup = config_of(name), architecture_of(name), setup_of(name, **options, **INSIDE)
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = models.build_model(config, setup)
    model = model if method.name == "apollo" else models.apply_method(model, method, architecture)
    make = partial(of_apollo, method=method) if method.name == "apollo" else of_form
    trace = trace_step(model, setup, step.optimizer, make=make)
    assert counts.judge_step(Case(config, spec, setup), step, trace).differences == []


def test_gradients_are_gone_before_the_next_ones_are_there() -> None:
    """Llama-3-8B: 16 GB less, which decides whether full fine-tuning fits a card; the update is as long."""
    after, inside = (
        predict("llama-3-8b", "full", device="h100-sxm", seq=1024, checkpoint="block", **{**INSIDE, "in_backward": on})
        for on in (False, True)
    )
    assert inside.memory.gradients == 0
    assert after.memory.peak - inside.memory.peak > 0.75 * after.memory.gradients
    assert inside.memory.optimizer == after.memory.optimizer
    assert inside.bytes["total"] == pytest.approx(after.bytes["total"], rel=1e-6)
    assert inside.time.phases["total"] == pytest.approx(after.time.phases["total"], rel=0.05)


def test_the_update_is_told_apart_in_backward() -> None:
    """The waterfall would call it pointwise work of the model."""
    told = explain("gpt2", "full", "lora:r=8", device="l40s", axes=(), **INSIDE)
    assert told.before.parts["optimizer"] > 10 * told.after.parts["optimizer"] > 0


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("loraplus", {}, "loraplus updates several weights together"),
        ("full", {"optimizer": "ao-adamw-8bit"}, "is not modelled"),
        ("full", {"engine": "deepspeed-zero3"}, "DeepSpeed updates several weights"),
    ],
)
def test_what_cannot_go_weight_by_weight_is_refused(method: str, options: dict[str, Any], words: str) -> None:
    """One line that says why."""
    with pytest.raises(UserError, match=words):
        predict("llama-3.2-1b", method, **options, **INSIDE)


@pytest.mark.parametrize("options", [{"grad_accum": 2}, {"clip_grad": True}, {"compile": "default"}])
def test_what_needs_all_gradients_is_refused(options: dict[str, Any]) -> None:
    """Clipping and sums over micro-batches come before the update."""
    with pytest.raises(UserError, match="in_backward goes with"):
        Setup(**{**INSIDE, **options})
