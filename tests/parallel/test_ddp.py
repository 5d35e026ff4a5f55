"""What DDP does beside reducing gradients: buckets before any gradient has come, the search, the static graph."""

from dataclasses import replace

import pytest
from helpers import config_of, step_of
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import methods
from perfmodel.architectures import from_config
from perfmodel.errors import UserError
from perfmodel.recording.parallel.ddp import BUCKET, FIRST_BUCKET
from perfmodel.recording.parallel.ddp_search import first_buckets
from perfmodel.recording.parallel.messages import LayerGradient
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tape.tensor import Parameter

BATCH, SEQ, VOCAB = 2, 16, 128  # of the small Llama
SIZES = st.lists(st.tuples(st.integers(1, 2**24), st.sampled_from(("bf16", "fp32"))), min_size=1, max_size=30)


def of_two(ddp: str, method: str = "full", **options: object) -> Step:
    """A step of the small Llama on two GPUs."""
    return step_of("llama", method, batch=BATCH, seq=SEQ, gpus=2, ddp=ddp, **options)


def calls(step: Step, name: str) -> int:
    """How often a call is made."""
    return sum(count for _, op, count in step.ops() if op.name == name)


@given(SIZES)
def test_first_buckets_hold_all_once_and_are_full_but_for_the_last(sizes: list[tuple[int, str]]) -> None:
    """A gradient that is in no bucket, or in two, would be wrong on every rank."""
    made = [
        LayerGradient(Parameter(str(i), (n,), dtype, kind="weight", trainable=True), 0)
        for i, (n, dtype) in enumerate(sizes)
    ]
    found = first_buckets(made)
    assert sorted(int(g.parameter.name) for bucket in found for g in bucket) == list(range(len(made)))
    assert [bucket[0] for bucket in found] == sorted((b[0] for b in found), key=lambda g: int(g.parameter.name))
    for dtype in ("bf16", "fp32"):
        of_dtype = [b for b in found if b[0].parameter.dtype == dtype]
        assert all(g.parameter.dtype == dtype for bucket in of_dtype for g in bucket)
        for i, bucket in enumerate(of_dtype):
            limit, nbytes = (FIRST_BUCKET, BUCKET)[i > 0], [g.parameter.nbytes for g in bucket]
            assert sum(nbytes[:-1]) < limit
            assert i == len(of_dtype) - 1 or sum(nbytes) >= limit


@pytest.mark.parametrize("method", ["full", "lora:r=4"])
def test_a_search_copies_logits_and_sends_a_map(method: str) -> None:
    """What `find_unused_parameters` costs: memory for the logits once more, a message, and the host's time."""
    plain, searching = of_two("plain", method), of_two("find-unused", method)
    trained = sum(p.count for p in plain.parameters if p.requires_grad)
    assert calls(searching, "clone") - calls(plain, "clone") == 2  # the loss and the logits
    copied = [op for _, op, _ in searching.ops() if op.name == "clone" and op.inputs[0].shape == (BATCH, SEQ, VOCAB)]
    assert len(copied) == 1
    sent = [op for _, op, _ in searching.ops() if op.attrs.ranks and op.inputs[0].dtype == "i32"]
    assert [op.inputs[0].shape for op in sent] == [(trained,)]
    assert calls(searching, "_local_scalar_dense") - calls(plain, "_local_scalar_dense") == trained
    assert sum(part.host.searched for part, _ in plain.parts()) == 0
    nodes = sum(part.host.nodes * n for part, n in searching.parts() if part.phase == "backward")
    looked_at = sum(part.host.searched * n for part, n in searching.parts())
    assert looked_at + 1 == nodes  # those that backward runs, but for the copies' own


def test_an_output_that_no_loss_uses_holds_nothing_up() -> None:
    """ASFT's model returns its own loss, too, of which no gradient comes back: nothing trained beneath it."""
    plain, searching = of_two("plain", objective="asft"), of_two("find-unused", objective="asft")
    assert calls(searching, "mul.out") == calls(plain, "mul.out") == sum(p.count for p in plain.parameters if p.used)


def test_a_search_is_made_once_a_step_and_copies_in_every_micro_batch() -> None:
    """Micro-batches that exchange nothing are not searched, but their logits are copied."""
    one, three = (of_two("find-unused", grad_accum=n) for n in (1, 3))
    searched = [sum(part.host.searched * n for part, n in step.parts()) for step in (one, three)]
    assert searched[1] == searched[0]
    clones = [
        calls(step, "clone") - calls(of_two("plain", grad_accum=n), "clone") for step, n in ((one, 1), (three, 3))
    ]
    assert clones == [2, 6]


def test_a_static_graph_only_looks_at_the_map() -> None:
    """Once learned, it costs next to nothing."""
    plain, static = of_two("plain"), of_two("static-graph")
    trained = sum(p.count for p in plain.parameters if p.requires_grad)
    extra = [op for _, op, count in static.ops() for _ in range(count)]
    usual = [op for _, op, count in plain.ops() for _ in range(count)]
    assert len(extra) - len(usual) == trained
    assert calls(static, "_local_scalar_dense") - calls(plain, "_local_scalar_dense") == trained


def test_the_bucket_that_was_made_first_goes_out_last() -> None:
    """Unlike DDP's own order, which follows the gradients: it holds the embedding, whose gradient is the last one."""
    config = config_of("llama", layers=8, vocab_size=4096, hidden_size=256, intermediate_size=1024)
    architecture = from_config(config)
    setup = Setup(batch=1, seq=8, gpus=2, dtype="fp32", ddp="find-unused")
    step = build(architecture, methods.parse("full").bind(architecture), setup)
    sent = [op.inputs[0] for _, op, _ in step.ops() if op.name == "c10d::allreduce_"]
    *_, last, flags = sent
    assert flags.dtype == "i32"
    assert last.nbytes == 4096 * 256 * 4  # over 1 MiB alone
    assert sum(spec.numel for spec in sent[:-1]) == sum(p.numel * p.count for p in step.parameters)


@pytest.mark.parametrize(
    ("ddp", "options", "said"),
    [
        ("find-unused", {"checkpoint": "block-reentrant"}, "cannot look through reentrant checkpoints"),
        ("static-graph", {"grad_accum": 2}, "cannot learn it from several micro-batches"),
        ("find_unused", {}, "did you mean 'find-unused'"),
    ],
)
def test_what_ends_in_an_error_is_said(ddp: str, options: dict[str, object], said: str) -> None:
    """PyTorch's own words come from deep inside its engine."""
    with pytest.raises(UserError, match=said):
        of_two(ddp, **options)
    if ddp != "find_unused":
        step = step_of("llama", "full", gpus=2, parallel="fsdp2", ddp=ddp, **options)
        assert step.setup == replace(step.setup, ddp=ddp)
