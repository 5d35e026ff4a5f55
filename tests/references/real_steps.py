"""Training steps with real numbers on the CPU, watched by the recorder that otherwise sees fake tensors."""

from contextlib import nullcontext
from typing import Any

import torch

from perfmodel.setup import Setup
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES
from perfmodel.tracing.programs.updates import make_optimizer
from perfmodel.tracing.trace import CallRecorder


def real_steps(model: Any, setup: Setup, optimizer: str, steps: int) -> tuple[CallRecorder, list[float]]:
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
    recorder, losses = CallRecorder(), []
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
