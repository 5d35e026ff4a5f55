"""A training step with real numbers on the CPU: the oracle's fake tensors must not have changed the program.

`perfmodel.tracing.trace` records the program under FakeTensorMode. Here the same recorder watches tensors that hold
data, and the loss goes down. The one difference that is known: the engine adds gradients in place where nobody else
holds them (`add_` for `add`), which it does not do to fake tensors. So names are compared without the underscore.
"""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
from helpers import config_of

pytest.importorskip("peft")

import torch

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES
from perfmodel.tracing.programs.updates import make_optimizer
from perfmodel.tracing.trace import Recorder
from validate.oracle import counts

SETUPS = {
    "fp32": Setup(batch=2, seq=9, dtype="fp32"),
    "bf16": Setup(batch=2, seq=9),
    "amp": Setup(batch=2, seq=9, dtype="fp32", amp="bf16"),
    "one sample, eager": Setup(batch=1, seq=9, dtype="fp32", attention="eager"),
    "checkpointing": Setup(batch=2, seq=9, dtype="fp32", checkpoint="block", optimizer="adamw-foreach"),
    "two micro-batches": Setup(batch=2, seq=9, dtype="fp32", grad_accum=2, optimizer="adamw-fused"),
}


def real_steps(model: Any, setup: Setup, optimizer: str, steps: int) -> tuple[Recorder, list[float]]:
    """Train for some steps, the last one recorded; returns the losses too."""
    model.train()
    if setup.checkpoint != "none":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    update = make_optimizer(trained, optimizer)
    for group in update.param_groups:
        group["lr"] = 1e-2
    ids = torch.arange(setup.batch * setup.seq).view(setup.batch, setup.seq) % 100
    attention = torch.ones_like(ids)
    recorder, losses = Recorder(), []
    for step in range(steps):
        recorder.recording = step == steps - 1
        total = 0.0
        for _ in range(setup.grad_accum):
            amp = torch.autocast("cpu", TORCH_DTYPES[setup.amp]) if setup.amp else nullcontext()
            with recorder.observe("forward"):
                with amp:
                    loss = model(input_ids=ids, attention_mask=attention, labels=ids).loss
                if setup.grad_accum > 1:
                    loss = loss / setup.grad_accum
            total += loss.item()
            with recorder.observe("backward"):
                loss.backward()
        with recorder.observe("optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            update.step()
            update.zero_grad(set_to_none=True)
        losses.append(total)
    return recorder, losses


def without_underscore(calls: Counter[Any]) -> Counter[Any]:
    """Calls with in-place additions counted as additions."""
    merged: Counter[Any] = Counter()
    for (name, inputs, outputs), n in calls.items():
        merged["add.Tensor" if name == "add_.Tensor" else name, inputs, outputs] += n
    return merged


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("method", ["full", "lora:r=4,targets=all-linear"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_real_step_makes_the_calls_of_the_tape(name: str, method: str, setup: str) -> None:
    """If this fails while test_counts passes, the oracle traces a program that nobody runs."""
    config, chosen = config_of(name, layers=2), SETUPS[setup]
    architecture = from_config(config)
    bound = methods.parse(method).bind(architecture)
    step = build(architecture, bound, chosen, "cpu")
    torch.manual_seed(0)
    model = models.apply(models.build(config, chosen, device="cpu"), bound, architecture)
    recorder, losses = real_steps(model, chosen, step.optimizer, 3)
    assert losses[-1] < losses[0], "the real step does not train"
    tape = counts.tape_calls(step)
    for phase in PHASES:
        expected, real = without_underscore(tape[phase]), without_underscore(recorder.trace.calls[phase])
        assert dict(expected - real) == {}, f"{phase}: on the tape only"
        assert dict(real - expected) == {}, f"{phase}: in the real step only"
        assert sum(real.values()) == sum(n for part, op, n in step.ops() if part.phase == phase and not op.view)
