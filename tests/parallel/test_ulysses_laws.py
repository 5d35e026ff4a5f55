"""Laws of ranks that share heads within attention, which need no torch: what they send and hold, what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ring_laws import LAYERS, LLAMA, METHODS, WIDTH, on_network

from perfmodel import predict
from perfmodel.errors import UserError
from perfmodel.setup import Setup

HEADS, KV_HEADS = 8, 2
SETUPS = st.builds(
    Setup,
    batch=st.sampled_from((1, 2)),
    seq=st.sampled_from((512, 4096)),
    gpus=st.sampled_from((4, 8, 32)),
    cp=st.just(2),
    cp_rotate=st.just("ulysses"),
    parallel=st.sampled_from(("zero1", "zero2", "zero3")),
    attention=st.sampled_from(("sdpa", "flash2")),
    checkpoint=st.sampled_from(("none", "block", "block-reentrant")),
    grad_accum=st.sampled_from((1, 2)),
)


@settings(max_examples=5)
@given(SETUPS, st.sampled_from(METHODS))
def test_what_attention_takes_and_gives_goes_round_in_each_pass(setup: Setup, method: str) -> None:
    """Queries, keys, values and the output of a rank's own tokens, forward, backward and recomputed: a LoRA saves
    nothing but the gradients of the lowest layer's keys, which nobody asks for."""
    sent = predict(LLAMA, method, setup, "h100-sxm").time.communication.nbytes["all_to_all"]
    tokens = setup.batch * setup.seq // setup.cp * setup.grad_accum
    of_layer = tokens * WIDTH * 2 * (2 * HEADS + 2 * KV_HEADS)  # B of a bf16 pass: q, output, k, v
    passes = 2 if setup.checkpoint == "none" else 3
    of_two = method.endswith(":r=4") and setup.checkpoint == "none"  # adapters on queries and values
    kept = tokens * WIDTH * 2 * 2 * KV_HEADS if of_two else 0
    assert passes * LAYERS * of_layer - kept <= sent <= passes * LAYERS * of_layer


@settings(max_examples=5)
@given(SETUPS, st.sampled_from([m for m in METHODS if not m.startswith("dora")]))
def test_a_part_of_a_sequence_takes_less_memory_and_no_more_work(setup: Setup, method: str) -> None:
    """That is what it is for; DoRA's norms of weights are the same work for any number of tokens."""
    whole, half = (predict(LLAMA, method, replace(setup, cp=cp), "h100-sxm") for cp in (1, 2))
    assert whole.memory.peak > half.memory.peak
    assert whole.flops["total"] >= 2 * half.flops["total"]
    assert (whole.total_params, whole.trainable_params) == (half.total_params, half.trainable_params)


@settings(max_examples=4)
@given(SETUPS, st.sampled_from(METHODS))
def test_a_faster_network_is_never_slower(setup: Setup, method: str) -> None:
    """Time falls with the bandwidth to that of the work alone."""
    free, usual, slow = (on_network(x, method, setup).time.phases["total"] for x in (0.0, 1.0, 20.0))
    assert free <= usual * (1 + 1e-9) <= slow * (1 + 2e-9)


@settings(max_examples=2)
@given(SETUPS, st.sampled_from(METHODS))
def test_a_grid_equals_its_points(setup: Setup, method: str) -> None:
    """A sweep along length and GPUs is so many predictions."""
    seq, gpus = np.array([[1024], [8192]]), np.array([4, 16])
    grid = predict(LLAMA, method, replace(setup, seq=seq, gpus=gpus), "h100-sxm")
    for i, j in np.ndindex(2, 2):
        one = predict(LLAMA, method, replace(setup, seq=int(seq[i, 0]), gpus=int(gpus[j])), "h100-sxm")
        assert grid.time.phases["total"][i, j] == pytest.approx(one.time.phases["total"], rel=1e-9)
        assert grid.memory.peak[i, j] == one.memory.peak


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"parallel": "fsdp2"}, "not modelled with parallel fsdp2; use --parallel zero3"),
        ({"attention": "eager"}, "not modelled with attention eager; use --attention sdpa"),
        ({"cp": 4, "gpus": 8}, "8 heads and 2 of keys: use a number of ranks that divides both"),
        ({"tp": 2, "gpus": 8}, "not modelled with tp 2; use --tp 1"),
        ({"seq": 1025}, "cut into 2 parts"),
        ({"cp_rotate": "allgather"}, "use --parallel fsdp2, or --cp-rotate ulysses"),
        ({"offload": "optimizer"}, "not modelled with offload optimizer; use --cp 1"),
    ],
)
def test_what_is_not_modelled_is_refused_in_a_line(options: dict[str, Any], said: str) -> None:
    """With what to use instead."""
    usual: dict[str, Any] = {"gpus": 4, "cp": 2, "cp_rotate": "ulysses", "parallel": "zero3", "seq": 1024}
    with pytest.raises(UserError, match=said):
        predict(LLAMA, "lora", Setup(**usual | options), "h100-sxm")
