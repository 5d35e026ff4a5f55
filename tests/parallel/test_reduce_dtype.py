"""Laws of the dtype that FSDP reduces gradients in (`Setup.reduce_dtype`), which need no torch.

Calls and collectives are compared with the real programs: tests/oracle/test_parallel.py and test_fsdp1.py.
"""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws_of_ranks import LLAMA, METHODS

from perfmodel import predict
from perfmodel.errors import UserError
from perfmodel.setup import Setup


@settings(max_examples=12)
@given(
    parallel=st.sampled_from(("fsdp1", "fsdp2")), method=st.sampled_from(METHODS), gpus=st.sampled_from((2, 3, 8)),
    grad_accum=st.sampled_from((1, 2, 4)), group=st.sampled_from((None, 2)),
)  # fmt: skip
def test_fp32_doubles_what_is_reduced_and_nothing_else(
    parallel: str, method: str, gpus: int, grad_accum: int, group: int | None
) -> None:
    """The same weights are gathered, the same products run; whole gradients that wait take more room, not less."""
    usual = Setup(
        batch=2, seq=64, dtype="bf16", amp="bf16", gpus=gpus - gpus % (group or 1), parallel=parallel,
        grad_accum=grad_accum, shard_group=group,
    )  # fmt: skip
    low, high = (predict(LLAMA, method, replace(usual, reduce_dtype=d), "h100-sxm") for d in ("bf16", "fp32"))
    sent, more = low.time.communication.nbytes, high.time.communication.nbytes
    assert more["reduce_scatter"] == 2 * sent["reduce_scatter"]
    assert more["all_gather"] == sent["all_gather"]
    assert high.flops == low.flops
    assert high.memory.peak >= low.memory.peak
    assert predict(LLAMA, method, usual, "h100-sxm").time == low.time


@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3"])
def test_other_forms_reduce_what_they_have(parallel: str) -> None:
    """The line says which form has the option; one GPU reduces nothing."""
    setup = Setup(gpus=4, parallel=parallel, reduce_dtype="fp32")
    with pytest.raises(UserError, match=f"reduce_dtype: {parallel} reduces gradients as they are; use"):
        predict(LLAMA, "full", setup, "h100-sxm")
    alone = replace(setup, gpus=1)
    assert predict(LLAMA, "full", alone, "h100-sxm").time == predict(LLAMA, "full", Setup(), "h100-sxm").time


def test_what_ranks_share_is_not_summed_in_another_dtype() -> None:
    """Of sequence parallel several micro-batches are refused in one line."""
    setup = Setup(gpus=4, tp=2, sequence_parallel=True, parallel="fsdp2", reduce_dtype="fp32", grad_accum=2)
    with pytest.raises(UserError, match="reduce_dtype: sums of DTensors over micro-batches"):
        predict(LLAMA, "full", setup, "h100-sxm")
    with pytest.raises(UserError, match="reduce_dtype 'fp8' is unknown"):
        Setup(reduce_dtype="fp8")
