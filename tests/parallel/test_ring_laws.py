"""Laws of ranks that share every sequence, which need no torch: what goes around, what each holds, what is refused."""

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import predict
from perfmodel.architectures.config import Config
from perfmodel.errors import UserError
from perfmodel.prediction.placed import Placed
from perfmodel.prediction.predict import Prediction
from perfmodel.setup import Setup

LAYERS, KV_HEADS, WIDTH = 3, 2, 64
LLAMA = Config(
    {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "num_key_value_heads": KV_HEADS, "vocab_size": 2048, "tie_word_embeddings": False,
    },
    "llama", "llama",
)  # fmt: skip
METHODS = ("full", "lora:r=8,targets=all-linear", "lora:r=4", "dora:r=4")
SETUPS = st.builds(
    Setup,
    batch=st.sampled_from((1, 2)),
    seq=st.sampled_from((512, 4096)),
    gpus=st.sampled_from((4, 8, 32)),
    cp=st.sampled_from((2, 4)),
    cp_rotate=st.sampled_from(("allgather", "alltoall")),
    parallel=st.just("fsdp2"),
    checkpoint=st.sampled_from(("none", "block")),
    grad_accum=st.sampled_from((1, 2)),
)


def on_network(slower: float, method: str, setup: Setup) -> Prediction:
    """A prediction on a network that is so many times as slow."""
    known = Placed.seconds
    with patch.object(Placed, "seconds", lambda *args: known(*args) * slower):
        return predict(LLAMA, method, setup, "h100-sxm")


@settings(max_examples=5)
@given(SETUPS, st.sampled_from(METHODS))
def test_keys_and_values_go_around_once_and_their_gradients_too(setup: Setup, method: str) -> None:
    """What LoRA does not save here: every layer's keys and values, forward, recomputed and backward, and fp32 gradients
    whose bytes are twice theirs."""
    cut = predict(LLAMA, method, setup, "h100-sxm").time.communication
    whole = predict(LLAMA, method, replace(setup, cp=1), "h100-sxm").time.communication
    once = 2 * setup.batch * KV_HEADS * setup.seq * WIDTH * 2 * LAYERS * setup.grad_accum  # B of a bf16 pass
    passes = 3 if setup.checkpoint == "block" else 2
    others = (setup.cp - 1) / setup.cp  # what the ring brings; a gather has one's own, too
    gathered = cut.nbytes["all_gather"] - whole.nbytes["all_gather"]
    if setup.cp_rotate == "allgather":
        assert (gathered, cut.nbytes["send_recv"]) == (passes * once, 2 * once)
    else:
        assert (gathered, cut.nbytes["send_recv"]) == (0, passes * once * others + 2 * once)
    assert cut.nbytes["reduce_scatter"] == whole.nbytes["reduce_scatter"]


@settings(max_examples=5)
@given(SETUPS, st.sampled_from(METHODS))
def test_a_part_of_a_sequence_takes_less_memory_and_no_more_work(setup: Setup, method: str) -> None:
    """That is what it is for: activations fall with the ranks; what no rank needs of the mask nobody computes."""
    one, two, four = (predict(LLAMA, method, replace(setup, cp=cp), "h100-sxm") for cp in (1, 2, 4))
    assert one.memory.peak > two.memory.peak > four.memory.peak
    assert one.flops["total"] >= 2 * two.flops["total"] >= 4 * four.flops["total"]
    assert (one.total_params, one.trainable_params) == (four.total_params, four.trainable_params)
    tokens = [p.tokens_per_second * p.time.phases["total"] for p in (one, two, four)]
    assert tokens == pytest.approx([setup.tokens * setup.gpus / cp for cp in (1, 2, 4)])


@settings(max_examples=5)
@given(SETUPS, st.sampled_from(METHODS))
def test_a_faster_network_is_never_slower(setup: Setup, method: str) -> None:
    """Time falls with the bandwidth to that of the work alone."""
    free, usual, slow = (on_network(x, method, setup).time.phases["total"] for x in (0.0, 1.0, 20.0))
    assert free <= usual * (1 + 1e-9)
    assert usual <= slow * (1 + 1e-9)


@settings(max_examples=4)
@given(SETUPS, st.sampled_from(METHODS))
def test_a_sequence_of_one_rank_is_what_it_was(setup: Setup, method: str) -> None:
    """How keys and values would travel is nothing to a rank that has them all."""
    usual, other = (
        predict(LLAMA, method, replace(setup, cp=1, cp_rotate=rotate), "h100-sxm").as_dict()
        for rotate in ("allgather", "alltoall")
    )
    assert {**usual, "setup": {}} == {**other, "setup": {}}


@settings(max_examples=2)
@given(SETUPS, st.sampled_from(METHODS))
def test_a_grid_equals_its_points(setup: Setup, method: str) -> None:
    """A sweep along length and GPUs is so many predictions."""
    seq, gpus = np.array([[1024], [8192]]), np.array([setup.cp, 4 * setup.cp])
    grid = predict(LLAMA, method, replace(setup, seq=seq, gpus=gpus), "h100-sxm")
    for i, j in np.ndindex(2, 2):
        one = predict(LLAMA, method, replace(setup, seq=int(seq[i, 0]), gpus=int(gpus[j])), "h100-sxm")
        assert grid.time.phases["total"][i, j] == pytest.approx(one.time.phases["total"], rel=1e-9)
        assert grid.memory.peak[i, j] == one.memory.peak


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (LLAMA, {"gpus": 6, "cp": 4}, "cp 4 does not divide the 6 GPUs"),
        (LLAMA, {"parallel": "ddp"}, "not modelled with parallel ddp; use --parallel fsdp2"),
        (LLAMA, {"attention": "eager"}, "not modelled with attention eager"),
        (LLAMA, {"packing": "dense"}, "not modelled with packing dense"),
        (LLAMA, {"padded": True}, "not modelled with padded True"),
        (LLAMA, {"seq": 1026}, "cut into 8 parts"),
        (LLAMA, {"cp_rotate": "ring"}, "cp_rotate 'ring' is unknown"),
        ("mistral-7b-v0.1", {}, "attends within a window"),
        ("gpt2", {}, "on a part of a sequence is not modelled"),
    ],
)
def test_what_is_not_modelled_ends_in_one_line(model: Any, options: dict[str, Any], said: str) -> None:
    """Nobody gets another program's answer."""
    with pytest.raises(UserError, match=said):
        predict(model, "full", device="h100-sxm", **{"gpus": 4, "cp": 4, "parallel": "fsdp2", "seq": 1024, **options})
