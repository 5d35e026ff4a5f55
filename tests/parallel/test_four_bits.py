"""Weights of 4 bits on several GPUs: what holds them decides whether they can be cut."""

from typing import Any

import pytest

from perfmodel import advise, predict

ASKED: dict[str, Any] = {"device": "rtx-4090", "gpus": 4, "seq": 512}


def noted(parallel: str, held: str) -> tuple[int, list[str]]:
    """Bytes of the weights of a GPU, and what is said of those in 4 bits."""
    p = predict("llama-3.2-1b", f"qlora:r=4,quant_storage={held}", parallel=parallel, **ASKED)
    return int(p.memory.weights), [note for note in p.notes if "4-bit weights" in note]


@pytest.mark.parametrize("parallel", ["fsdp2", "zero3"])
def test_bytes_stay_whole_and_the_answer_says_so(parallel: str) -> None:
    """Nothing said why a sharded QLoRA took as much as one that is not."""
    (in_bytes, told), (cut, silent) = noted(parallel, "u8"), noted(parallel, "bf16")
    assert cut < 0.6 * in_bytes
    assert silent == []
    assert told == [
        f"4-bit weights are held in bytes, so whole on every GPU; qlora:quant_storage=bf16 lets {parallel} cut them"
    ]


def test_fsdp1_which_refuses_bytes_is_answered_for_floats() -> None:
    (in_bytes, told), (cut, silent) = noted("fsdp1", "u8"), noted("fsdp1", "bf16")
    assert in_bytes == cut
    assert (len(told), silent) == (1, [])
    assert noted("ddp", "u8")[1] == []


def test_advice_holds_weights_in_floats_where_nothing_else_fits() -> None:
    found = advise("llama-3.1-70b", "qlora:r=16", parallel="fsdp2", **ASKED)
    assert found.best is not None
    assert found.best.prediction.fits
    assert "4-bit weights held in bf16" in str(found.best.as_dict())
