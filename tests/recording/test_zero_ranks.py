"""DeepSpeed's ZeRO over several ranks, as the tape records it; the messages themselves: tests/oracle/test_zero.py."""

from typing import Any

import pytest
from helpers import step_of

from perfmodel.recording.deepspeed.stages import messages_of
from perfmodel.recording.parallel.messages import LayerGradient
from perfmodel.recording.step import Step
from perfmodel.tape.tensor import Parameter

STAGES = ("zero1", "zero2", "zero3")


def sent(step: Step, name: str, phase: str) -> int:
    """Elements of the larger buffer of all collectives of that name."""
    return sum(
        count * max(sum(s.numel for s in specs) for specs in (op.inputs, op.outputs))
        for part, op, count in step.ops()
        if op.attrs.ranks is not None and name in op.name and part.phase == phase
    )


def sharded(method: str, parallel: str, **setup: Any) -> Step:
    return step_of("llama", method, device="cpu", gpus=4, parallel=parallel, **setup)


@pytest.mark.parametrize("method", ["full", "lora:r=4"])
@pytest.mark.parametrize("parallel", STAGES)
def test_every_gradient_is_reduced_once_a_micro_batch_or_once_a_step(method: str, parallel: str) -> None:
    """ZeRO-1 waits for the last micro-batch, the others do not: with accumulation that is most of their traffic."""
    step = sharded(method, parallel, grad_accum=3)
    times = 1 if parallel == "zero1" else 3
    name = "reduce_scatter" if parallel == "zero3" else "allreduce"
    assert sent(step, name, "backward") == times * step.trainable


@pytest.mark.parametrize("parallel", ["zero1", "zero2"])
def test_what_was_updated_is_gathered(parallel: str) -> None:
    """Under LoRA that is little: the base never changes."""
    for method in ("full", "lora:r=4"):
        step = sharded(method, parallel)
        assert step.trainable <= sent(step, "allgather", "optimizer") < step.trainable + 8


def test_frozen_weights_are_gathered_as_trained_ones_are() -> None:
    """Why LoRA saves little of ZeRO-3's traffic."""
    full, lora = (sharded(method, "zero3") for method in ("full", "lora:r=4"))
    assert sent(full, "allgather", "forward") == sent(lora, "allgather", "forward") > 0


def test_states_are_cut() -> None:
    """Masters and two moments in fp32, of one rank of four; a step of one GPU has the whole."""
    steps = [sharded("full", parallel) for parallel in STAGES]
    for step in steps:
        assert step.state_bytes == pytest.approx(12 * step.trainable / 4, rel=0.01)
    whole, cut = steps[1].weight_bytes, steps[2].weight_bytes
    assert cut == pytest.approx(whole / 4, rel=0.01)


def test_engine_and_form_are_two_names_of_one_thing() -> None:
    """A config that asks for ZeRO-3 on several GPUs must not get DDP."""
    named = step_of("llama", device="cpu", gpus=4, engine="deepspeed-zero3")
    form = sharded("full", "zero3")
    assert named.setup == form.setup
    assert [str(op) for _, op, _ in named.ops()] == [str(op) for _, op, _ in form.ops()]


def test_on_one_gpu_a_form_changes_nothing() -> None:
    """There is nobody to exchange anything with."""
    alone, form = (step_of("llama", device="cpu", parallel=parallel) for parallel in ("ddp", "zero2"))
    assert [str(op) for _, op, _ in alone.ops()] == [str(op) for _, op, _ in form.ops()]


def test_a_large_gradient_goes_out_by_the_ranks_that_keep_it() -> None:
    """By hand: 10 elements from place 3 on, parts of 4 elements, messages of more than 4: 1 + 4 and 4 + 1."""
    p = Parameter("p", (10,), "bf16", kind="weight", trainable=True)
    assert messages_of([LayerGradient(p, 0)], {LayerGradient(p, 0): 3}, 4, 4) == (5, 5)
    assert messages_of([LayerGradient(p, 0)], {LayerGradient(p, 0): 3}, 100, 4) == (10,)


@pytest.mark.parametrize(("optimizer", "runs"), [("adamw", "adamw-fused"), ("adamw-loop", "adamw-loop")])
def test_deepspeed_brings_its_own_adamw(optimizer: str, runs: str) -> None:
    """FusedAdam takes the place of PyTorch's AdamW; another that is asked for runs as it is."""
    assert sharded("full", "zero1", optimizer=optimizer).optimizer == runs
