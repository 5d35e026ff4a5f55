"""Laws of FSDP whose shards lie over groups of GPUs (`Setup.shard_group`), which need no torch.

What is exchanged when is compared with the real programs: tests/oracle/test_parallel.py and test_fsdp1.py.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws_of_ranks import LLAMA, METHODS

from perfmodel import advise, predict
from perfmodel.calls.collectives import KIND_OF, message_bytes
from perfmodel.errors import UserError
from perfmodel.network.node import Node
from perfmodel.prediction import memory
from perfmodel.program.op import Op
from perfmodel.program.ranks import Ranks
from perfmodel.report.figures import setup_line
from perfmodel.setup import Setup

USUAL: dict[str, Any] = {"dtype": "bf16", "batch": 2, "seq": 64, "gpus": 16}
FSDP = ("fsdp1", "fsdp2")


@settings(max_examples=12)
@given(
    parallel=st.sampled_from(FSDP), method=st.sampled_from(METHODS), gpus=st.sampled_from((4, 8, 16, 32)),
    grad_accum=st.sampled_from((1, 3)), reshard=st.booleans(),
)  # fmt: skip
def test_a_group_is_a_job_of_its_own_but_for_its_gradients(
    parallel: str, method: str, gpus: int, grad_accum: int, reshard: bool
) -> None:
    """What a group keeps, gathers and scatters is that of so few GPUs; each gradient's shard goes across once."""
    setup = Setup(**{**USUAL, "gpus": gpus}, parallel=parallel, grad_accum=grad_accum, reshard=reshard, shard_group=4)
    several, one = (predict(LLAMA, method, s, "h100-sxm") for s in (setup, replace(setup, gpus=4)))
    ours, alone = several.time.communication, one.time.communication
    for kind in ("all_gather", "reduce_scatter"):
        assert (ours.nbytes[kind], ours.calls[kind]) == (alone.nbytes[kind], alone.calls[kind])
    across = ours.nbytes["all_reduce"] - alone.nbytes["all_reduce"]
    assert across == (ours.nbytes["reduce_scatter"] / 4 if gpus > 4 else 0)
    assert several.memory.weights == one.memory.weights
    assert several.memory.peak == one.memory.peak  # there is no mixed precision


def across(op: Op) -> bool:
    """Whether an op exchanges gradients between groups."""
    return op.name == "c10d::allreduce_" and op.attrs.ranks is not None and op.attrs.ranks.stride > 1


def test_groups_are_told_where_there_are_several_gpus() -> None:
    """Whoever compares two answers must see that one of them shards over groups."""
    assert "shards in groups of 8" in setup_line(Setup(**USUAL, parallel="fsdp2", shard_group=8))
    assert "groups" not in setup_line(Setup(**USUAL, parallel="fsdp2"))


def test_a_group_in_a_node_gathers_over_its_links_alone() -> None:
    """By hand, from the node's own prices: gathering stays inside, eight rings of two leave it side by side."""
    setup = Setup(**USUAL, nodes=2, parallel="fsdp2", shard_group=8)
    p = predict(LLAMA, "full", setup, "h100-sxm")
    assert p.step is not None
    sent = p.time.communication
    found = [(op, count) for _, op, count in p.step.ops() if op.attrs.ranks is not None]
    node = Node.load("dgx-h100")
    by_hand = 0.0
    for op, count in found:
        gpus, nodes = (2, 2) if across(op) else (8, 1)
        by_hand += count * node.collective(KIND_OF[op.name], message_bytes(op), gpus, nodes, op.inputs[0].dtype)
    assert sent.exposed["total"] + sent.hidden["total"] == pytest.approx(by_hand, rel=1e-6)


def test_masters_of_what_goes_across_keep_what_was_sent() -> None:
    """With mixed precision PyTorch holds every reduced gradient in 16 bits to the end of backward."""
    setup = Setup(**{**USUAL, "dtype": "fp32"}, amp="bf16", parallel="fsdp2", shard_group=4)
    several, one = (predict(LLAMA, "full", s, "h100-sxm") for s in (setup, replace(setup, gpus=4)))
    sent = several.time.communication.nbytes["reduce_scatter"] / 4
    assert 0 < several.memory.peak - one.memory.peak <= sent


@pytest.mark.parametrize(("tp", "cp"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_groups_lie_beside_those_that_share_layers_and_sequences(tp: int, cp: int) -> None:
    """Of a mesh whose last dim shares layers, the one before it sequences: accelerate's."""
    setup = Setup(**USUAL, parallel="fsdp2", shard_group=4, tp=tp, cp=cp, clip_grad=False)
    step = predict(LLAMA, "full", setup, "h100-sxm").step
    assert step is not None
    sharing = {Ranks(4, tp), Ranks(tp), Ranks(cp, tp), Ranks(16 // tp // 4, 4 * tp)}
    assert {op.attrs.ranks for _, op, _ in step.ops()} - {None} == {ranks for ranks in sharing if ranks.size > 1}


def test_advice_leaves_groups_behind_with_fsdp() -> None:
    """Beside FSDP with options of its own the other forms are tried as well."""
    own: dict[str, Any] = {"shard_group": 4, "reshard": False, "reduce_dtype": "fp32", "sync_each_batch": True}
    setup = Setup(**{**USUAL, "gpus": 8}, parallel="fsdp2", **own)
    advice = advise("llama-3.2-1b", "lora:r=8", setup, "h100-sxm")
    assert advice.best is not None
    best = advice.best.prediction.setup  # so small a model is whole on each GPU, and waits for no weights
    assert best.parallel in ("ddp", "zero1", "zero2")
    assert (best.reshard, best.shard_group, best.reduce_dtype) == (True, None, None)


def test_advice_lays_fsdp_out_as_memory_allows() -> None:
    """On links that hold a step up the fastest layout is the one that just fits: none is left untried."""
    setup = Setup(gpus=4, batch=1, seq=256, parallel="fsdp2", optimizer="adamw-fused", clip_grad=False)
    model, layouts = "pythia-410m", set()
    every = product(
        FSDP, (True, False), (None, 2), ("none", "block"), ("adamw-fused", "adamw-8bit"), ("none", "default")
    )
    names = ("parallel", "reshard", "shard_group", "checkpoint", "optimizer", "compile")
    layouts_of_all = [dict(zip(names, how, strict=True)) for how in every if how[0] == "fsdp2" or how[-1] == "none"]
    tried = [predict(model, "full", replace(setup, **how), "l40s") for how in layouts_of_all]
    for limit in (1.6e9, 2.1e9, 4e9):
        fastest = min(
            p.time.phases["total"] for p in tried if memory.fits(p.memory.peak, limit, "cuda", p.memory.buffers)
        )
        found = advise(model, "full", setup, "l40s", memory_bytes=limit).best
        assert found is not None
        assert found.seconds == pytest.approx(fastest, rel=1e-12)
        layouts.add((found.prediction.setup.reshard, found.prediction.setup.shard_group))
    assert layouts == {(True, None), (False, None), (False, 2)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_group": 1}, "no groups of so many"),
        ({"shard_group": 5}, "shard_group 5: the 16 GPUs of the job are no groups of so many"),
        ({"shard_group": 4, "gpus": 12}, "groups do not fit nodes of 6 GPUs; --nodes 3 would do"),
        ({"shard_group": 4, "parallel": "zero3"}, "zero3 has no shards in groups; use --parallel fsdp2"),
        ({"shard_group": 6, "tp": 2}, "the 8 GPUs of the job \\(of 2 that share layers\\) are no groups of so many"),
        ({"shard_group": 2, "cp": 4}, "shard_group 2: cp 4 GPUs share a sequence; use a multiple of them"),
        ({"cp": 4, "tp": 8}, "tp 8, cp 4 do not divide the 16 GPUs of the job together"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(options: dict[str, Any], said: str) -> None:
    """A wrong group names its fault."""
    with pytest.raises(UserError, match=said):
        predict(LLAMA, "full", Setup(**{**USUAL, "parallel": "fsdp2", **options}), "h100-sxm")


@pytest.mark.parametrize(
    ("model", "asked", "padded"),
    [
        ("mixtral-8x7b", {"gpus": 8}, ""),
        ("mixtral-8x7b", {"gpus": 16}, "1.9 times"),
        ("mixtral-8x7b", {"gpus": 16, "shard_group": 8}, ""),
        ("mixtral-8x7b", {"gpus": 16, "parallel": "fsdp1"}, ""),
        ("llama-3.2-1b", {"gpus": 256}, ""),
    ],
)
def test_shards_that_are_mostly_padding_are_told(model: str, asked: dict[str, Any], padded: str) -> None:
    """A step took twice as long on twice the GPUs, and nothing said why; what a token meets is told of every form."""
    p = predict(model, "lora:r=8", device="h100-sxm", seq=256, **{"parallel": "fsdp2", **asked})
    told = [note for note in p.notes if "FSDP2 cuts weights along their first dim" in note]
    assert [padded in note for note in told] == ([True] if padded else [])
    assert (p.active_params < p.total_params) == (model == "mixtral-8x7b")
