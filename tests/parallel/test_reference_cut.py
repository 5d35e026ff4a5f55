"""Laws of a reference that GPUs share, which need no torch.

Its messages: tests/oracle/test_zero_reference.py, test_parallel_objectives.py.
"""

from typing import Any

import pytest
from helpers import step_of

from perfmodel.recording.deepspeed.module_trace import TraceCoverage, trace_coverage
from perfmodel.recording.record import held_bytes
from perfmodel.recording.step import Step

BASE, ADAPTED = ["words.", "block."], ["words.", "a.lora_A.weight", "block."]
NOTHING, ALL, FORWARD = TraceCoverage(False, False), TraceCoverage(True, True), TraceCoverage(True, False)


@pytest.mark.parametrize(
    ("passes", "trained", "expected"),
    [
        ([BASE], True, [ALL]),
        ([BASE, BASE], True, [NOTHING, FORWARD]),
        ([BASE, BASE], False, [FORWARD, FORWARD]),
    ],
)
def test_a_trace_holds_from_one_call_of_the_model_to_the_next(
    passes: list[list[str]], trained: bool, expected: list[TraceCoverage]
) -> None:
    """By hand: of two calls the first is noted, the second is known up to its backward pass, which the first lacks."""
    assert trace_coverage(passes, trained=trained) == expected


def test_adapters_that_are_switched_off_break_it() -> None:
    """No pass is ever like the one before it, so nothing is known of any."""
    both = trace_coverage([ADAPTED, BASE, ADAPTED, BASE])
    assert not any(seen.forward or seen.backward for seen in both)
    assert [bool(seen.off) for seen in both] == [False, True, False, True]


def gathered(step: Step, phase: str) -> int:
    """Elements of all weights that are gathered in 16 bits."""
    return sum(
        count * op.outputs[0].numel
        for part, op, count in step.ops()
        if op.name == "c10d::_allgather_base_" and op.outputs[0].dtype == "bf16" and part.phase == phase
    )


def preferring(method: str, **setup: Any) -> Step:
    """DPO under ZeRO-3, without what it logs from all ranks in 16 bits."""
    return step_of("llama", method, device="cpu", **{"gpus": 4, "parallel": "zero3", "dtype": "bf16", **setup})


def test_a_reference_adds_its_shards_and_no_states() -> None:
    """A second model in full fine-tuning: 2 bytes a weight over all ranks, and what is small of it whole."""
    alone, beside = (preferring("full", objective="dpo", reference=how) for how in ("precomputed", "model"))
    assert beside.weight_bytes == 2 * alone.weight_bytes
    assert beside.state_bytes == alone.state_bytes
    assert beside.trainable == beside.total == alone.total


def test_without_adapters_a_model_is_gathered_once_more_forward_and_again_backward() -> None:
    """The trace of modules, by which DeepSpeed keeps weights of so small a model from forward to backward, is lost."""
    kept, lost = (preferring("lora:r=4", objective="dpo", reference=how) for how in ("precomputed", "adapter-off"))
    assert gathered(kept, "backward") == 0
    assert gathered(lost, "forward") > 2 * gathered(kept, "forward")
    assert gathered(lost, "backward") > 0.9 * gathered(kept, "forward")
    assert [len(step.form.notes) for step in (kept, lost) if step.form is not None] == [0, 1]


@pytest.mark.parametrize("reshard", [True, False])
def test_the_root_of_a_flat_reference_is_never_gathered_again(reshard: bool) -> None:
    """It has no backward pass that would free it, so it is whole in memory; kept gathered, all of the reference is."""
    alone, beside = (
        preferring("full", parallel="fsdp1", objective="dpo", reference=how, reshard=reshard)
        for how in ("precomputed", "model")
    )
    more = gathered(beside, "forward") - gathered(alone, "forward")
    kept = held_bytes(beside) - held_bytes(alone)
    assert 2 * more + kept == pytest.approx(2 * beside.total, rel=0.01)
    assert (more < 100) is not reshard  # what is logged has another dtype
