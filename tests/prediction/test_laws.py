"""Laws that hold for every model, method and setup: whatever the formulas are, their results must obey these.

They protect the mechanism (one forward pass, autograd, multiplicities), not single figures.
"""

import re
from typing import Any

import pytest
from helpers import FIGURES, METHODS, NAMES, architecture_of, by_phase, calls_by_name, period_of, step_of, total
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import predict
from perfmodel.calls import costs
from perfmodel.program.op import Op
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.engine import run_backward
from perfmodel.tape.linalg import linear
from perfmodel.tape.pointwise import add, fill
from perfmodel.tape.tensor import Parameter

names = st.sampled_from(NAMES)
methods = st.sampled_from(METHODS)
few = settings(max_examples=60, derandomize=True)
many = settings(few, max_examples=300)
PRECISIONS = ({"dtype": "bf16"}, {"dtype": "fp16"}, {"dtype": "fp32"}, {"dtype": "fp32", "amp": "bf16"})


def linear_flops(n: int, m: int, tokens: int, rank: int | None) -> int:
    """GEMM FLOPs of one linear layer n -> m, forward and backward; its input needs a gradient. No rank: full."""

    def weight(name: str, *shape: int, trainable: bool = True) -> Parameter:
        return Parameter(name, shape, "fp32", kind="weight", trainable=trainable)

    with recording(Tape()) as tape:
        tape.begin("layer", "forward")
        x = weight("input", tokens, n)
        y = linear(x, weight("base", m, n, trainable=rank is None))
        if rank is not None:
            y = add(y, linear(linear(x, weight("A", rank, n)), weight("B", m, rank)))
        run_backward(y, fill("ones_like", y.shape, "fp32"))
    return sum(costs.flops(op) for part in tape.parts for op in part.ops)


@many
@given(n=st.integers(1, 300), m=st.integers(1, 300), tokens=st.integers(1, 50), rank=st.integers(1, 200))
def test_lora_costs_more_flops_than_full_exactly_above_the_break_even_rank(
    n: int, m: int, tokens: int, rank: int
) -> None:
    """The rule of thumb users know, r > nm / (3(n+m)): if autograd were off by one product, it would move."""
    assert linear_flops(n, m, tokens, None) == 6 * tokens * n * m
    assert (linear_flops(n, m, tokens, rank) > linear_flops(n, m, tokens, None)) == (3 * rank * (n + m) > n * m)


@few
@given(name=names, rank=st.integers(1, 16), more=st.integers(1, 16), checkpoint=st.sampled_from(("none", "block")))
def test_lora_flops_rise_with_rank_in_forward_and_backward(name: str, rank: int, more: int, checkpoint: str) -> None:
    """A rank that costs nothing would make every rank look equally good."""
    low = by_phase(step_of(name, f"lora:r={rank}", checkpoint=checkpoint))
    high = by_phase(step_of(name, f"lora:r={rank + more}", checkpoint=checkpoint))
    assert low["forward"] < high["forward"]
    assert low["backward"] < high["backward"]


@few
@given(
    name=names, method=methods, layers=st.integers(1, 5), device=st.sampled_from(("cuda", "cpu")),
    checkpoint=st.sampled_from(("none", "block", "block-reentrant")), precision=st.sampled_from(PRECISIONS),
    attention=st.sampled_from(("sdpa", "eager")),
)  # fmt: skip
def test_one_more_layer_always_costs_the_same(
    name: str, method: str, layers: int, device: str, checkpoint: str, precision: dict[str, Any], attention: str
) -> None:
    """Identical layers are recorded once with a multiplicity: a wrong count would show at depth 80, not at depth 3."""
    setup = {"checkpoint": checkpoint, "attention": attention, **precision}
    period = period_of(name)
    depths = [layers - 1 + i * period for i in (1, 2, 3)]  # from where every kind of layer is there
    steps = [step_of(name, method, device=device, layers=depth, **setup) for depth in depths]
    for figure, of_op in FIGURES.items():
        first, second, third = (by_phase(s, of_op) for s in steps)
        for phase in ("forward", "backward"):
            assert third[phase] - second[phase] == second[phase] - first[phase], (figure, phase)


@few
@given(name=names, method=methods, batch=st.integers(1, 40), seq=st.integers(1, 60))
def test_flops_are_linear_in_batch(name: str, method: str, batch: int, seq: int) -> None:
    """Samples do not interact, so b samples are b times the work of one."""
    one, all_of_them = (by_phase(step_of(name, method, batch=b, seq=seq)) for b in (1, batch))
    assert all_of_them == {phase: batch * flops for phase, flops in one.items()}


def attention_flops(op: Op) -> Any:
    return costs.flops(op) if costs.kind(op) == "attention" or op.name == "bmm" else 0


@few
@given(
    name=names, method=methods, seq=st.integers(1, 16), factor=st.integers(2, 4),
    attention=st.sampled_from(("sdpa", "eager")), precision=st.sampled_from(PRECISIONS),
)  # fmt: skip
def test_attention_flops_are_quadratic_in_seq_and_all_others_linear(
    name: str, method: str, seq: int, factor: int, attention: str, precision: dict[str, Any]
) -> None:
    """Long sequences are where attention takes over; the exponent decides where."""
    model = architecture_of(name, sliding_window=4096)  # a window that binds would change the kernel
    short, long = (step_of(model, method, seq=s, attention=attention, **precision) for s in (seq, factor * seq))
    quadratic = total(short, attention_flops)
    assert quadratic > 0
    assert total(long, attention_flops) == factor**2 * quadratic
    assert total(long) - factor**2 * quadratic == factor * (total(short) - quadratic)


@few
@given(name=names, layers=st.integers(1, 5), k=st.integers(1, 5), inner=st.sampled_from(("full", "lora")))
def test_backward_stops_at_the_lowest_trainable_block(name: str, layers: int, k: int, inner: str) -> None:
    """The saving of top-k is that nothing below runs backward; a stray node would lose all of it."""
    k = min(k, layers)
    step = step_of(name, f"top_k:k={k},inner={inner}", layers=layers)
    calls = calls_by_name(step, "backward")
    assert (
        sum(n for name, n in calls.items() if re.match(r"_softmax_backward|_scaled_dot_product.*backward", name)) == k
    )
    assert not any(part.ops for part, _ in step.parts() if part.phase == "backward" and part.name == "embeddings")


@few
@given(name=names, layers=st.integers(3, 6), k=st.integers(1, 5))
def test_one_more_trained_block_costs_as_much_as_one_of_full_fine_tuning(name: str, layers: int, k: int) -> None:
    """Only the lowest trained block saves the gradient of its input: taken for all of them a third would be missing.

    (Under checkpoints the input of all blocks gets a gradient, so that there is something to recompute for.)
    """
    k = min(k, layers - 2)
    fewer, more = (by_phase(step_of(name, f"top_k:k={k + i}", layers=layers))["backward"] for i in range(2))
    shallow, deep = (by_phase(step_of(name, "full", layers=layers + i))["backward"] for i in range(2))
    assert more - fewer == deep - shallow


TOKENS = 2 * 17  # no dim of the small models is 34, so a product over 34 terms is a weight gradient


def weight_gradients(op: Op) -> int:
    return int(op.name == "mm" and op.inputs[0].shape[1] == TOKENS)


@few
@given(name=names, method=st.sampled_from(METHODS), checkpoint=st.sampled_from(("none", "block")))
def test_only_trainable_weights_have_a_weight_gradient_gemm(name: str, method: str, checkpoint: str) -> None:
    """ "Frozen means no weight gradient" is the FLOP saving of every parameter-efficient method."""
    step = step_of(name, method, checkpoint=checkpoint)
    trainable = sum(p.count for p in step.parameters if p.requires_grad and len(p.shape) == 2 and is_matrix(p))
    tied = int(step.architecture.tied and method == "full")  # the embedding's weight is the head's too
    assert by_phase(step, weight_gradients) == {"forward": 0, "backward": trainable + tied, "optimizer": 0}


def is_matrix(p: Parameter) -> bool:
    return p.kind in ("weight", "adapter")


@few
@given(name=names, method=methods, device=st.sampled_from(("cuda", "cpu")))
def test_dtype_changes_bytes_but_never_flops(name: str, method: str, device: str) -> None:
    """A FLOP is a FLOP in any dtype; only what moves shrinks. (Fused kernels differ by dtype, so eager attention.)"""
    steps = [step_of(name, method, device=device, attention="eager", **precision) for precision in PRECISIONS]
    bf16, fp16, fp32, amp = steps
    assert len({tuple(by_phase(s).items()) for s in steps}) == 1
    assert total(bf16, FIGURES["bytes"]) == total(fp16, FIGURES["bytes"])
    assert len({total(s, FIGURES["bytes"]) for s in (bf16, fp32, amp)}) == 3


@few
@given(name=names)
def test_gemms_of_a_full_step_move_twice_the_bytes_in_fp32(name: str) -> None:
    """An item size that is not applied would go unseen where only ratios are looked at."""

    def gemm_bytes(op: Op) -> Any:
        return FIGURES["bytes"](op) if op.name in ("mm", "addmm") else 0

    half, single = (step_of(name, attention="eager", dtype=dtype) for dtype in ("bf16", "fp32"))
    assert total(single, gemm_bytes) == 2 * total(half, gemm_bytes)
    assert single.weight_bytes == 2 * half.weight_bytes


@few
@given(name=names, method=methods, n=st.integers(2, 9), checkpoint=st.sampled_from(("none", "block")))
def test_n_micro_batches_have_n_times_the_flops_of_one_and_one_optimizer_step(
    name: str, method: str, n: int, checkpoint: str
) -> None:
    """Gradient accumulation must neither lose a micro-batch nor repeat the optimizer."""
    one, accumulated = (step_of(name, method, grad_accum=g, checkpoint=checkpoint) for g in (1, n))
    for phase in ("forward", "backward"):
        assert by_phase(accumulated)[phase] == n * by_phase(one)[phase]
    for of_op in FIGURES.values():
        assert by_phase(accumulated, of_op)["optimizer"] == by_phase(one, of_op)["optimizer"]


@few
@given(name=names, method=methods, rank=st.integers(1, 16))
def test_trainable_parameters_are_what_the_method_promises(name: str, method: str, rank: int) -> None:
    """Optimizer and gradient memory follow from this count."""
    full = step_of(name, "full")
    assert full.trainable == full.total
    arch = architecture_of(name)
    lora = step_of(name, f"lora:r={rank}")
    adapters = [p for p in lora.parameters if p.kind == "adapter"]
    assert lora.trainable == sum(p.numel * p.count for p in adapters) == lora.total - full.total
    assert sum(p.count for p in adapters) == 2 * arch.layers * len(lora.method.target_names)  # type: ignore[attr-defined]
    some = step_of(name, method)
    assert 0 < some.trainable <= some.total


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_op_that_counts_flops_is_a_gemm_or_attention(name: str) -> None:
    """The price of an op is chosen by its kind: FLOPs filed under "pointwise" would be priced by bandwidth alone."""
    kinds = {costs.kind(op) for _, op, _ in step_of(name).ops() if costs.flops(op)}
    assert "gemm" in kinds <= {"gemm", "attention"}


@pytest.mark.parametrize(
    ("method", "checkpoint", "told"),
    [
        ("full", "block", False), ("lora", "none", False), ("lora", "block", True),
        ("top_k:k=1", "block-reentrant", True),
    ],
)  # fmt: skip
def test_a_note_says_where_checkpoints_make_the_backward_longer(method: str, checkpoint: str, told: bool) -> None:
    """Below the lowest trained block nothing would run without them: a time that surprises needs its reason."""
    p = predict("gpt2", method, device="l40s", batch=2, seq=16, checkpoint=checkpoint)
    assert any("the embedding's output need a gradient" in note for note in p.notes) == told


def test_products_of_an_optimizer_are_no_use_of_the_model() -> None:
    """Muon's orthogonalisation made the slowest step the one that used the GPU best."""
    setup: dict[str, Any] = {"device": "h100-sxm", "batch": 4, "seq": 1024}
    adam, muon = (predict("llama-3.2-1b", "full", optimizer=name, **setup) for name in ("adamw", "muon"))
    assert muon.flops["optimizer"] > 0
    assert adam.mfu * adam.time.phases["total"] == pytest.approx(muon.mfu * muon.time.phases["total"])
