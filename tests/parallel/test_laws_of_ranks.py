"""Laws of steps on several GPUs, which need no torch: what a network can do to a step, and what LoRA saves on it."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_node import START, WIRE, cpu_node

from perfmodel import predict
from perfmodel.architectures.config import Config
from perfmodel.errors import UserError
from perfmodel.prediction.placed import Placed
from perfmodel.prediction.predict import Prediction
from perfmodel.program.dtypes import ITEMSIZE
from perfmodel.program.part import PHASES
from perfmodel.setup import PARALLEL, Setup

LLAMA = Config(
    {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 5,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2048,
    },
    "llama", "llama",
)  # fmt: skip
ROUNDING = 1e-9
CPU = "cpu-epyc-genoa-1t"
METHODS = ("full", "lora:r=8,targets=all-linear", "lora:r=4", "dora:r=4", "top_k:k=2", "qlora:r=8", "norm", "ia3")
SETUPS = st.builds(
    Setup,
    batch=st.sampled_from((1, 2, 8)),
    seq=st.sampled_from((64, 256, 1024)),
    gpus=st.sampled_from((2, 4, 8, 16, 64)),
    parallel=st.sampled_from(PARALLEL),
    grad_accum=st.sampled_from((1, 2, 4)),
    checkpoint=st.sampled_from(("none", "block")),
    optimizer=st.sampled_from(("adamw", "sgd")),
    clip_grad=st.booleans(),
)


def on_network(faster: float, method: str, setup: Setup) -> Prediction:
    """A prediction on a network that is so many times as fast."""
    known = Placed.seconds
    with patch.object(Placed, "seconds", lambda *args: known(*args) / faster):
        return predict(LLAMA, method, setup, "h100-sxm")


@pytest.mark.parametrize("parallel", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize(
    "how", [{"shard_group": 4}, {"reshard": False, "grad_accum": 2}], ids=lambda how: next(iter(how))
)
def test_a_grid_of_gpus_equals_its_points_in_every_form_of_fsdp(parallel: str, how: dict[str, Any]) -> None:
    """What is gathered has dims like all else; with no more GPUs than a group has, shards lie over all."""
    setup = Setup(dtype="bf16", batch=2, seq=64, parallel=parallel, **how)
    counts = np.array([2, 4, 8, 32])
    grid = predict(LLAMA, "lora:r=8", replace(setup, gpus=counts), "h100-sxm")
    for i, n in enumerate(counts):
        one = predict(LLAMA, "lora:r=8", replace(setup, gpus=int(n)), "h100-sxm")
        assert grid.time.phases["total"][i] == pytest.approx(one.time.phases["total"], rel=ROUNDING)
        assert grid.memory.peak[i] == one.memory.peak


@settings(max_examples=12)
@given(SETUPS, st.sampled_from(METHODS))
def test_one_gpu_is_what_it_was(setup: Setup, method: str) -> None:
    """A form of several GPUs is nothing to one of them."""
    alone = predict(LLAMA, method, replace(setup, gpus=1), "h100-sxm").as_dict()
    usual = predict(LLAMA, method, replace(setup, gpus=1, parallel=PARALLEL[0]), "h100-sxm").as_dict()
    assert {**alone, "setup": {}} == {**usual, "setup": {}}


@settings(max_examples=12)
@given(SETUPS, st.sampled_from(METHODS))
def test_a_faster_network_is_never_slower_and_a_free_one_leaves_the_work(setup: Setup, method: str) -> None:
    """Time falls with the bandwidth to that of the work alone, and never rises above work and collectives in a row."""
    slow, usual, free = (on_network(x, method, setup) for x in (0.25, 1.0, np.inf))
    most, some, least = (p.time.phases["total"] for p in (slow, usual, free))
    assert most >= some * (1 - ROUNDING)
    assert some >= least * (1 - ROUNDING)
    sent = usual.time.communication
    taken = sent.exposed["total"] + sent.hidden["total"]
    assert 0 <= sent.exposed["total"] <= taken
    assert sum(sent.exposed[phase] for phase in PHASES) == pytest.approx(sent.exposed["total"], rel=1e-12, abs=1e-15)
    without = usual.time.phases["total"] - sent.exposed["total"]
    assert usual.time.phases["total"] <= (without + taken) * (1 + ROUNDING)
    assert free.time.communication.hidden["total"] == pytest.approx(0.0, abs=1e-12)


@settings(max_examples=10)
@given(SETUPS, st.sampled_from(METHODS))
def test_ddp_sends_what_trains_and_no_more(setup: Setup, method: str) -> None:
    """What LoRA saves under DDP: the traffic of gradients that do not exist."""
    p = predict(LLAMA, method, replace(setup, parallel="ddp"), "h100-sxm")
    assert p.step is not None
    trained = sum(x.numel * x.count * ITEMSIZE[x.dtype] for x in p.step.parameters if x.used)
    assert p.time.communication.nbytes["all_reduce"] == trained
    others = {kind: n for kind, n in p.time.communication.nbytes.items() if n and kind != "all_reduce"}
    assert others.keys() == {"broadcast"}  # of buffers
    assert others["broadcast"] < 2**10


@settings(max_examples=10)
@given(SETUPS, st.sampled_from(("lora:r=8,targets=all-linear,adapter_dtype=bf16", "lora:r=4", "top_k:k=2", "ia3")))
def test_fsdp_gathers_frozen_shards_like_all_others(setup: Setup, method: str) -> None:
    """What LoRA does not save under FSDP: each block is gathered forward, whatever of it trains."""
    setup = replace(setup, parallel="fsdp2", grad_accum=1)
    full, other = (predict(LLAMA, m, setup, "h100-sxm") for m in ("full", method))
    assert other.time.communication.nbytes["all_gather"] >= full.time.communication.nbytes["all_gather"] / 2
    assert other.time.communication.nbytes["reduce_scatter"] <= full.time.communication.nbytes["reduce_scatter"]
    # PEFT's wrapper hides the last norm from accelerate, which leaves it to a unit of its own
    assert other.time.communication.calls["all_gather"] <= full.time.communication.calls["all_gather"] + 1


@settings(max_examples=8)
@given(SETUPS, st.sampled_from(METHODS[:5]))
def test_a_grid_of_gpus_equals_its_points(setup: Setup, method: str) -> None:
    """A scaling curve is so many predictions."""
    counts = np.array([1, 2, 8, 32])
    grid = predict(LLAMA, method, replace(setup, gpus=counts), "h100-sxm")
    for i, n in enumerate(counts):
        one = predict(LLAMA, method, replace(setup, gpus=int(n)), "h100-sxm")
        assert grid.time.phases["total"][i] == pytest.approx(one.time.phases["total"], rel=1e-9)
        assert grid.memory.peak[i] == one.memory.peak
        for kind, nbytes in one.time.communication.nbytes.items():
            assert np.broadcast_to(grid.time.communication.nbytes[kind], counts.shape)[i] == nbytes


@settings(max_examples=8)
@given(SETUPS, st.sampled_from(METHODS))
def test_shards_of_more_gpus_take_less_room(setup: Setup, method: str) -> None:
    """Memory under FSDP falls with the GPUs, to no less than what is gathered at a time."""
    peaks = [
        predict(LLAMA, method, replace(setup, parallel="fsdp2", gpus=n), "h100-sxm").memory.peak for n in (2, 4, 16)
    ]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("tied", [True, False])
def test_tensor_parallel_parts_are_the_whole(tied: bool) -> None:
    """Ranks that share every layer, its words too, have its parameters and its work between them."""
    model = Config({**LLAMA.values, "tie_word_embeddings": tied}, "llama", "llama")
    one, two = (predict(model, "lora:r=8,targets=all-linear", device="h100-sxm", gpus=n, tp=n, seq=256) for n in (1, 2))
    assert two.memory.weights < 0.51 * one.memory.weights
    assert (one.total_params, one.trainable_params) == (two.total_params, two.trainable_params)
    assert one.flops["total"] / 2 < two.flops["total"] < one.flops["total"]
    assert two.tokens_per_second * two.time.phases["total"] == pytest.approx(256)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": 4, "tp": 3}, "tp 3 does not divide the 4 GPUs"),
        ({"gpus": 12, "tp": 4}, "tp 4: groups do not fit nodes of 6 GPUs; --nodes 3 would do"),
        ({"gpus": 12, "cp": 4, "parallel": "fsdp2"}, "cp 4: groups do not fit nodes of 6 GPUs; --nodes 3 would do"),
        ({"gpus": 2, "tp": 2, "objective": "dpo"}, "not modelled with objective dpo; use --tp 1"),
        ({"gpus": 2, "objective": "ppo", "ddp": "find-unused"}, "plain or with a static graph; use --ddp plain"),
        ({"gpus": 4, "nodes": 8}, "nodes 8 are more than the 4 GPUs"),
        ({"gpus": 6, "tp": 6}, "tp 6 does not divide the heads"),
        ({"gpus": 4, "node": "dgx-h10"}, "did you mean 'dgx-h100'?"),
        ({"gpus": 4, "cuda_graphs": True}, "not modelled with cuda_graphs True"),
        ({"gpus": 12, "nodes": 1}, "gpus 12 are more than 1 x dgx-h100 of 8 hold"),
        ({"gpus": 3, "device": CPU}, "torchrun --nproc-per-node 3 -m perfmodel calibrate --network --device cpu"),
        ({"gpus": 2, "device": CPU, "node": "dgx-spark"}, f"dgx-spark is a node of GPUs, and {CPU} is a CPU"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(options: dict[str, object], said: str) -> None:
    """A wrong job names its fault."""
    with pytest.raises(UserError, match=said.replace("?", r"\?")):
        predict(LLAMA, "full", **{"device": "h100-sxm", **options})


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", ["full", "lora:r=8"])
def test_processes_on_a_cpu_wait_for_all_that_they_send(parallel: str, method: str, tmp_path: Path) -> None:
    """A core that exchanges computes nothing: by hand, what passes the wire comes on top of the rank's own work."""
    setup = Setup(batch=2, seq=64, dtype="fp32", gpus=2, parallel=parallel, node=cpu_node(tmp_path / "node.toml"))
    p = predict(LLAMA, method, setup, CPU)
    sent = p.time.communication
    # one start a collective; half of the buffer and half of the own half pass, in an all-reduce the former twice
    ends = {"all_reduce": 1.25, "all_gather": 0.75, "reduce_scatter": 0.75, "broadcast": 1.0}
    by_hand = sum(START * sent.calls[kind] + share * sent.nbytes[kind] / WIRE for kind, share in ends.items())
    assert sent.exposed["total"] == pytest.approx(by_hand, rel=0.02)
    assert sent.hidden["total"] == pytest.approx(0.0, abs=1e-9)
    alone = predict(LLAMA, method, replace(setup, gpus=1), CPU)
    assert p.time.phases["total"] > alone.time.phases["total"]
    assert any("to itself" in note for note in p.notes)


def test_the_network_that_was_calibrated_here_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `calibrate --network` nothing more is to be typed, and the answer says whose network it has."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    path = cpu_node(tmp_path / "nodes" / "mine.toml")
    found, named = (predict(LLAMA, "lora", device=CPU, gpus=2, **more) for more in ({}, {"node": path}))
    assert found.time == named.time
    assert "the processes exchange as in mine (--node)" in found.notes
    with pytest.raises(UserError, match="mine was measured between 2 processes, not 4: torchrun --nproc-per-node 4"):
        predict(LLAMA, "lora", device=CPU, gpus=4)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_an_order_of_products_is_chosen_for_whole_layers(parallel: str) -> None:
    """Of several GPUs each holds a part of an adapter, but multiplies with all of it."""
    choices = [predict(LLAMA, "runlora:r=4", Setup(gpus=gpus, parallel=parallel), "a100").choices for gpus in (1, 4)]
    assert choices[0] == choices[1] != []


def test_what_merges_weights_is_refused_where_they_lie_in_pieces() -> None:
    """XGBLoRA adds adapters to weights now and then; flat pieces of FSDP1 have no rows to add them to."""
    with pytest.raises(UserError, match="xgblora changes weights"):
        predict(LLAMA, "xgblora", Setup(gpus=2, parallel="fsdp1"), "a100")


def test_a_card_without_fused_attention_shares_no_sequence() -> None:
    """A V100 works by parts where heads share keys and values, which torch's context_parallel does not take."""
    setup = Setup(gpus=2, parallel="fsdp2", cp=2, seq=256)
    grouped = Config({**LLAMA.values, "num_key_value_heads": 4}, "llama", "llama")
    with pytest.raises(UserError, match="no fused attention of 8 heads over 4 in bf16"):
        predict(grouped, "full", setup, "v100-32gb-sxm")
    assert predict(LLAMA, "full", setup, "v100-32gb-sxm").time.phases["total"] > 0


@pytest.mark.parametrize("parallel", ["zero1", "zero2"])
def test_one_replica_on_several_gpus_has_deepspeeds_masters(parallel: str) -> None:
    """Its optimizer keeps fp32 masters and moments of 16-bit weights for any number of replicas, each a part of them.

    With one replica the form was left out: more GPUs needed more memory.
    """
    setup = Setup(dtype="bf16", seq=64, gpus=4, tp=4, parallel=parallel, optimizer="adamw")
    one, two, four = (predict(LLAMA, "full", replace(setup, gpus=4 * n), "h100-sxm") for n in (1, 2, 4))
    assert one.memory.optimizer == pytest.approx(6 * one.memory.weights, rel=1e-3)
    assert one.memory.optimizer > two.memory.optimizer > four.memory.optimizer
    assert one.memory.peak > two.memory.peak > four.memory.peak
    grid = predict(LLAMA, "full", replace(setup, gpus=np.array([4, 8])), "h100-sxm")
    assert list(grid.memory.peak) == [one.memory.peak, two.memory.peak]
