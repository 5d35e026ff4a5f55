"""Laws of gradients that are exchanged for every micro-batch (`Setup.sync_each_batch`), which need no torch.

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
    parallel=st.sampled_from(("ddp", "fsdp1", "fsdp2")), method=st.sampled_from(METHODS),
    gpus=st.sampled_from((2, 4, 8)), grad_accum=st.sampled_from((1, 2, 4)), reshard=st.booleans(),
)  # fmt: skip
def test_as_much_is_reduced_as_there_are_micro_batches(
    parallel: str, method: str, gpus: int, grad_accum: int, reshard: bool
) -> None:
    """The same products run, and a rank of full shards has less to hold; with one micro-batch nothing changes."""
    once = Setup(
        batch=2, seq=64, gpus=gpus, parallel=parallel, grad_accum=grad_accum, reshard=reshard or parallel == "ddp"
    )
    usual, each = (predict(LLAMA, method, replace(once, sync_each_batch=s), "h100-sxm") for s in (False, True))
    kind = "all_reduce" if parallel == "ddp" else "reduce_scatter"
    sent, more = usual.time.communication.nbytes, each.time.communication.nbytes
    norm = 8 if parallel == "ddp" else 0  # under DDP the gradient's norm takes no message
    assert more[kind] == pytest.approx(grad_accum * sent[kind], abs=norm)
    assert each.flops == usual.flops
    if parallel != "ddp" and method == "full":
        assert each.memory.peak <= usual.memory.peak
    if grad_accum == 1:
        assert each.time == usual.time


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"parallel": "zero2"}, "sync_each_batch: DeepSpeed's zero2 exchanges as its stage does"),
        ({"parallel": "fsdp2", "offload": "params"}, "sync_each_batch: sums in the host's memory are not modelled"),
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_a_line(how: dict[str, str], line: str) -> None:
    """DeepSpeed does as its stage says, and sums of offloaded gradients wait for the bus."""
    with pytest.raises(UserError, match=line):
        predict(LLAMA, "full", Setup(gpus=4, grad_accum=2, sync_each_batch=True, **how), "h100-sxm")
