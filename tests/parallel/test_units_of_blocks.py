"""Laws of FSDP2 around blocks and the whole alone (`Setup.fsdp_units`), which need no torch.

Calls, collectives and graphs are compared with the real programs: tests/oracle/test_parallel.py and test_compiled.py.
"""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_laws_of_ranks import LLAMA, METHODS

from perfmodel import advise, predict
from perfmodel.errors import UserError
from perfmodel.setup import Setup

USUAL = Setup(batch=2, seq=64, gpus=4, parallel="fsdp2", fsdp_units="blocks")
BESIDE = 2 * (2 * 2048 * 512 + 512)  # bytes of LLAMA in bf16 beside its blocks


@settings(max_examples=12)
@given(
    method=st.sampled_from(METHODS), checkpoint=st.sampled_from(("none", "block")), gpus=st.sampled_from((2, 3, 8)),
    compile=st.sampled_from(("none", "default")),
)  # fmt: skip
def test_all_else_is_one_unit_that_is_gathered_again(method: str, checkpoint: str, gpus: int, compile: str) -> None:
    """Embedding and head travel twice, in two gathers fewer; what is reduced and what is computed stay the same."""
    assume(compile == "none" or method.partition(":")[0] in ("full", "lora", "top_k"))
    setup = replace(USUAL, checkpoint=checkpoint, gpus=gpus, compile=compile)
    ours, theirs = (predict(LLAMA, method, replace(setup, fsdp_units=u), "h100-sxm") for u in ("blocks", "accelerate"))
    sent, usual = (p.time.communication.nbytes for p in (ours, theirs))
    freed, kept = (predict(LLAMA, method, replace(setup, reshard=r), "h100-sxm") for r in (True, False))
    assert sent["reduce_scatter"] == pytest.approx(usual["reduce_scatter"], rel=1e-3)
    assert sent["all_gather"] > usual["all_gather"]
    assert freed.time.communication.nbytes["all_gather"] >= kept.time.communication.nbytes["all_gather"] + BESIDE
    assert ours.flops == theirs.flops


@pytest.mark.parametrize("parallel", ["ddp", "fsdp1", "zero3"])
def test_other_forms_have_units_of_their_own(parallel: str) -> None:
    """The line says which form has the option."""
    with pytest.raises(UserError, match=f"fsdp_units: {parallel} gathers in its own way; use --parallel fsdp2"):
        predict(LLAMA, "full", replace(USUAL, parallel=parallel), "h100-sxm")
    wrong: dict[str, Any] = {"fsdp_units": "layers"}
    with pytest.raises(UserError, match="fsdp_units 'layers' is unknown"):
        Setup(**wrong)


@pytest.mark.parametrize("implementation", ["peft", "axolotl"])
@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_halves_of_loras_travel_by_themselves(implementation: str, checkpoint: str) -> None:
    """Each is reduced alone, so that as much is sent in more messages; a Function gathers its own once a step."""
    method = f"lora:r=4,targets=all-linear,implementation={implementation}"
    setup = replace(USUAL, checkpoint=checkpoint, grad_accum=2)
    apart, with_blocks = (
        predict(LLAMA, method, replace(setup, fsdp_units=u), "h100-sxm").time.communication
        for u in ("adapters", "blocks")
    )
    assert apart is not None
    assert with_blocks is not None
    halves = 2 * 7 * LLAMA.count("num_hidden_layers")
    gathers = (2 if implementation == "peft" else 1) * 2  # a micro-batch
    assert apart.calls["reduce_scatter"] == halves
    assert apart.calls["all_gather"] == with_blocks.calls["all_gather"] + gathers * halves
    assert apart.nbytes["reduce_scatter"] == pytest.approx(with_blocks.nbytes["reduce_scatter"], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("dora", {}, "method dora"), ("full", {}, "method full"), ("lora", {"compile": "default"}, "compile default"),
        ("lora:implementation=unsloth", {}, "implementation unsloth"), ("lora", {"tp": 2}, "tp 2"),
        ("lora:modules_to_save=lm_head", {}, "modules_to_save"), ("lora", {"objective": "dpo"}, "objective dpo"),
    ],
)  # fmt: skip
def test_what_goes_with_halves_is_said(method: str, options: dict[str, Any], said: str) -> None:
    """Other adapters than LoRA's are no units of the programs that make these."""
    with pytest.raises(UserError, match=f"fsdp_units adapters: not modelled with {said}"):
        predict(LLAMA, method, replace(USUAL, fsdp_units="adapters", **options), "h100-sxm")


def test_advice_leaves_units_behind_with_their_form() -> None:
    """DDP has none, and what halves cost is told by itself."""
    on: dict[str, Any] = {"device": "h100-sxm", "batch": 1, "seq": 64, "gpus": 2, "parallel": "fsdp2"}
    offered = {c.label for c in advise(LLAMA, "lora:r=4", **on, fsdp_units="adapters").alone}
    assert {"DDP", "adapters gathered with their blocks"} <= offered
