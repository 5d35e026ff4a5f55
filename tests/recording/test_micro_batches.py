"""Further micro-batches follow from the first one: as if each had been recorded by itself."""

from typing import Any

import numpy as np
import pytest

from perfmodel import predict
from perfmodel.recording.step import Step
from perfmodel.tape.core import Tape

METHODS = ("full", "lora:r=4", "lora:targets=all-linear,implementation=unsloth", "dora", "reslora", "prefix_tuning")
SETUPS: tuple[dict[str, Any], ...] = (
    {},
    {"checkpoint": "block"},
    {"checkpoint": "block-reentrant"},
    {"dtype": "fp32", "amp": "bf16"},
    {"compile": "default"},
    {"seq": np.array([32, 48, 64])},
)


def described(step: Step) -> list[Any]:
    """All that later rooms read of the parts of further micro-batches."""
    return [
        (
            part.name, part.phase, part.repeat, part.host,
            np.asarray(part.delta).tolist(), np.asarray(part.peak).tolist(),
            [(op.name, repr(op), op.owner, op.recompute) for op in part.ops],
        )
        for part in step.groups[1].parts
    ]  # fmt: skip


THROWN_AWAY = ("gpt2", "dora:r=4,dropout=0.1")  # PEFT makes a parameter of a weight's transpose in every forward pass


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: ",".join(s) or "plain")
@pytest.mark.parametrize("method", METHODS)
def test_further_micro_batches_are_what_recording_them_gives(
    monkeypatch: pytest.MonkeyPatch, method: str, setup: dict[str, Any]
) -> None:
    """Ops, counts and memory of the second micro-batch: derived where it is like the first, else recorded."""
    if method in ("reslora", "prefix_tuning") and "checkpoint" in setup:
        pytest.skip("does not go with checkpoints")
    if method.endswith("unsloth") and "amp" in setup:
        pytest.skip("needs 16-bit weights")
    asked: dict[str, Any] = {"device": "l40s", "batch": 2, "seq": 64, "grad_accum": 3, **setup}
    check(monkeypatch, "smollm2-135m", method, asked)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: ",".join(s) or "plain")
def test_a_parameter_of_one_forward_pass_has_no_gradient_to_add_to(
    monkeypatch: pytest.MonkeyPatch, setup: dict[str, Any]
) -> None:
    """Each micro-batch has another one, whose gradient dies with the graph."""
    check(monkeypatch, *THROWN_AWAY, {"device": "l40s", "batch": 2, "seq": 64, "grad_accum": 3, **setup})


@pytest.mark.parametrize("compiled", ["none", "default"])
@pytest.mark.parametrize("method", ["vblora:length=64", "adalora"])
def test_a_parameter_that_gets_several_gradients_adds_them_in_every_micro_batch(
    monkeypatch: pytest.MonkeyPatch, method: str, compiled: str
) -> None:
    """Under reentrant checkpoints every block is a backward pass by itself: what blocks share gets one from each."""
    asked = {"device": "l40s", "batch": 2, "seq": 64, "grad_accum": 3, "checkpoint": "block-reentrant"}
    check(monkeypatch, "smollm2-135m", method, {**asked, "compile": compiled})


def check(monkeypatch: pytest.MonkeyPatch, model: str, method: str, asked: dict[str, Any]) -> None:
    """Derived and recorded micro-batches are the same."""
    derived = predict(model, method, **asked)
    monkeypatch.setattr(Tape, "alike", property(lambda tape: False, lambda tape, value: None), raising=False)
    recorded = predict(model, method, **asked)
    assert derived.as_dict() == recorded.as_dict()
    if derived.step is not None and recorded.step is not None:
        assert described(derived.step) == described(recorded.step)
        firsts = [op for part in derived.step.groups[0].parts for op in part.ops]
        assert not any(op.attrs.later for op in firsts)
