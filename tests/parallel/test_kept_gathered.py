"""Laws of FSDP that leaves weights gathered between forward and backward (`Setup.reshard`), which need no torch.

What is gathered when is compared with the real programs: tests/oracle/test_parallel.py and test_fsdp1.py.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws_of_ranks import LLAMA, METHODS

from perfmodel import predict
from perfmodel.errors import UserError
from perfmodel.prediction.predict import Prediction
from perfmodel.setup import Setup

USUAL: dict[str, Any] = {"dtype": "bf16", "batch": 2, "seq": 64, "gpus": 4}
FSDP = ("fsdp1", "fsdp2")
WEIGHTS = 2 * (5 * (4 * 512**2 + 3 * 512 * 1024 + 2 * 512) + 2 * 2048 * 512 + 512)  # bytes of LLAMA in bf16


def both(method: str, **options: Any) -> tuple[Prediction, Prediction]:
    """A step that frees what it gathers, and the same that keeps it."""
    setup = Setup(**{**USUAL, **options})
    freed, kept = (predict(LLAMA, method, replace(setup, reshard=reshard), "h100-sxm") for reshard in (True, False))
    return freed, kept


def test_hooks_of_fsdp1_held_hidden_states_around_checkpoints() -> None:
    """QLoRA of 70B on two GPUs in 2024: a hidden state and its gradient a frozen block, till the pass is through."""
    setup = Setup(batch=2, seq=4096, gpus=2, parallel="fsdp1", checkpoint="block-reentrant")
    old, new = (replace(setup, stack=f"transformers={version}") for version in ("4.51", "4.52"))
    method, hidden = "qlora:r=16,targets=q_proj+k_proj+v_proj+o_proj", 2 * 4096 * 8192 * 2
    held, freed = (predict("llama-2-70b", method, each, "a100-80gb-sxm") for each in (old, new))
    assert 70 * hidden < held.memory.peak - freed.memory.peak <= 80 * hidden
    assert held.time.phases == freed.time.phases
    assert any("FSDP1's hooks hold what goes into frozen blocks" in note for note in held.notes)
    full, later = (predict(LLAMA, "full", each, "a100-80gb-sxm").memory for each in (old, new))
    assert full == later


@pytest.mark.parametrize(("parallel", "micro_batches"), [("fsdp1", 1), ("fsdp2", 3)])
def test_all_weights_are_gathered_once_for_what_is_done_with_them(parallel: str, micro_batches: int) -> None:
    """FSDP2 frees them behind every backward pass, FSDP1 behind the one that reduces gradients."""
    freed, kept = both("full", parallel=parallel, grad_accum=3)
    assert kept.time.communication.nbytes["all_gather"] == WEIGHTS * micro_batches
    blocks = WEIGHTS - 2 * (2 * 2048 * 512 + 512)
    assert freed.time.communication.nbytes["all_gather"] >= WEIGHTS * 3 + blocks * 3


@settings(max_examples=12)
@given(
    parallel=st.sampled_from(FSDP), method=st.sampled_from(METHODS), gpus=st.sampled_from((2, 3, 8, 16)),
    grad_accum=st.sampled_from((1, 2, 4)), checkpoint=st.sampled_from(("none", "block")),
)  # fmt: skip
def test_what_stays_takes_room_and_saves_traffic(
    parallel: str, method: str, gpus: int, grad_accum: int, checkpoint: str
) -> None:
    """Never more is gathered, never less held; what is reduced and what is computed stay as they are."""
    freed, kept = both(method, parallel=parallel, gpus=gpus, grad_accum=grad_accum, checkpoint=checkpoint)
    sent, usual = kept.time.communication, freed.time.communication
    assert sent.nbytes["all_gather"] < usual.nbytes["all_gather"]
    assert sent.nbytes["reduce_scatter"] == usual.nbytes["reduce_scatter"]
    assert kept.memory.peak >= freed.memory.peak
    assert kept.memory.peak <= freed.memory.peak + 1.1 * WEIGHTS
    assert kept.flops == freed.flops


def test_a_reference_stays_whole_from_step_to_step() -> None:
    """A frozen model has no backward pass behind which it would be freed: nothing gathers it again."""
    options: dict[str, Any] = {"parallel": "fsdp2", "objective": "dpo"}
    freed, kept = both("full", **options, reference="model")
    gathered = freed.time.communication.nbytes["all_gather"] - kept.time.communication.nbytes["all_gather"]
    assert gathered > WEIGHTS
    without = both("full", **options, reference="precomputed")[1]
    assert kept.memory.peak == pytest.approx(without.memory.peak + WEIGHTS + WEIGHTS // 4, rel=0.01)


@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3"])
def test_other_forms_have_nothing_to_leave_gathered(parallel: str) -> None:
    """The line says which have."""
    with pytest.raises(UserError, match=f"reshard: {parallel} has no weights to leave gathered; use --parallel fsdp2"):
        predict(LLAMA, "full", Setup(**USUAL, parallel=parallel, reshard=False), "h100-sxm")
    alone, usual = (predict(LLAMA, "full", Setup(**{**USUAL, "gpus": 1}, reshard=r), "h100-sxm") for r in (False, True))
    assert alone.time == usual.time
