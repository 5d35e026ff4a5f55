"""Laws of memory: what a step allocates it frees, segments compose as the algebra says, more work needs more memory.

Peak memory has no formula of its own: it follows from the lifetimes of tensors, so these laws are all that can be
checked without a reference program.
"""

from dataclasses import replace
from functools import reduce
from typing import Any

import pytest
from helpers import METHODS, NAMES, step_of
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import predict
from perfmodel.devices import profile
from perfmodel.prediction import memory
from perfmodel.prediction.memory import Segment
from perfmodel.recording.step import Step

few = settings(max_examples=60, derandomize=True)
names = st.sampled_from(NAMES)
methods = st.sampled_from(METHODS)
attentions = st.sampled_from(("sdpa", "eager"))
checkpoints = st.sampled_from(("none", "block", "block-reentrant"))
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16"}, "fp32": {"dtype": "fp32"}, "amp": {"dtype": "fp32", "amp": "bf16"},
}  # fmt: skip


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """A segment as parts produce them: the peak is at least the start and the end."""
    delta = draw(st.integers(-1000, 1000))
    return Segment(delta, max(0, delta) + draw(st.integers(0, 1000)))


@settings(few, max_examples=300)
@given(a=segments(), b=segments(), c=segments())
def test_segments_compose_associatively(a: Segment, b: Segment, c: Segment) -> None:
    """Parts may then be grouped into layers and micro-batches without changing the peak."""
    assert a.then(b).then(c) == a.then(b.then(c))
    assert Segment().then(a) == a == a.then(Segment())


@settings(few, max_examples=300)
@given(a=segments(), n=st.integers(0, 30))
def test_a_repeated_segment_is_the_segment_n_times_in_a_row(a: Segment, n: int) -> None:
    """The closed form stands for 80 layers, so it must be exact, for growing and for shrinking segments."""
    assert a.repeated(n) == reduce(Segment.then, [a] * n, Segment())


@settings(few, max_examples=300)
@given(changes=st.lists(st.integers(-100, 100), max_size=30))
def test_a_row_of_allocations_composes_to_its_running_maximum(changes: list[int]) -> None:
    """The algebra against the definition: add up byte by byte and take the highest point."""
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    single = [Segment(c, max(0, c)) for c in changes]
    assert reduce(Segment.then, single, Segment()) == Segment(live, peak)


def leftover(step: Step) -> Any:
    return memory.step_segment(step).delta


@few
@given(
    name=names, method=methods, attention=attentions, checkpoint=checkpoints, batch=st.integers(1, 4),
    seq=st.integers(1, 40), precision=st.sampled_from(("bf16", "fp32")), accum=st.integers(1, 3), clip=st.booleans(),
    optimizer=st.sampled_from(("adamw", "adamw-loop", "adamw-fused", "sgd", "sgd-momentum")),
    device=st.sampled_from(("cuda", "cpu")), padded=st.booleans(),
)  # fmt: skip
def test_every_byte_allocated_in_a_step_is_freed_in_it(
    name: str, method: str, attention: str, checkpoint: str, batch: int, seq: int, precision: str, accum: int,
    clip: bool, optimizer: str, device: str, padded: bool,
) -> None:  # fmt: skip
    """A leak (or a double free) would shift every later peak, and grow with the number of layers."""
    step = step_of(
        name, method, device=device, batch=batch, seq=seq, attention=attention, checkpoint=checkpoint,
        grad_accum=accum, optimizer=optimizer, clip_grad=clip, padded=padded, **PRECISIONS[precision],
    )  # fmt: skip
    assert leftover(step) == 0


@pytest.mark.parametrize("checkpoint", ["none", "block", "block-reentrant"])
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_is_freed_under_autocast(name: str, checkpoint: str) -> None:
    """Autocast keeps a cast of every trainable weight until its region ends: copies of a whole stack of layers."""
    left = {m: leftover(step_of(name, m, checkpoint=checkpoint, **PRECISIONS["amp"])) for m in (*METHODS, "top_k:k=2")}
    assert left == dict.fromkeys(left, 0)


@few
@given(
    name=names, method=methods, attention=attentions, checkpoint=checkpoints, batch=st.integers(1, 6),
    seq=st.integers(1, 32), more=st.integers(1, 30), axis=st.sampled_from(("batch", "seq")),
    precision=st.sampled_from(sorted(PRECISIONS)),
)  # fmt: skip
def test_more_tokens_never_need_less_memory(
    name: str, method: str, attention: str, checkpoint: str, batch: int, seq: int, more: int, axis: str,
    precision: str,
) -> None:  # fmt: skip
    """Whoever looks for the largest batch that fits searches along this line."""
    shape = {"batch": batch, "seq": seq}
    setup = {"attention": attention, "checkpoint": checkpoint, **PRECISIONS[precision]}
    small = step_of(name, method, **shape, **setup)
    large = step_of(name, method, **{**shape, axis: shape[axis] + more}, **setup)
    assert memory.peak_bytes(small) <= memory.peak_bytes(large)


@few
@given(name=names, rank=st.integers(1, 16), more=st.integers(1, 16), checkpoint=checkpoints)
def test_a_higher_rank_never_needs_less_memory(name: str, rank: int, more: int, checkpoint: str) -> None:
    """Adapters, their gradients, their optimizer state and their saved inputs all grow with the rank."""
    low, high = (step_of(name, f"lora:r={r}", checkpoint=checkpoint) for r in (rank, rank + more))
    assert memory.peak_bytes(low) < memory.peak_bytes(high)


@few
@given(
    name=names,
    method=methods,
    precision=st.sampled_from(sorted(PRECISIONS)),
    optimizer=st.sampled_from(("adamw", "sgd")),
)
def test_the_peak_holds_at_least_weights_gradients_and_optimizer_state(
    name: str, method: str, precision: str, optimizer: str
) -> None:
    """At the optimizer step all three are there at once, whatever the activations were."""
    step = step_of(name, method, optimizer=optimizer, **PRECISIONS[precision])
    gradients = sum(p.nbytes * p.count for p in step.parameters if p.used)
    assert memory.peak_bytes(step) >= step.weight_bytes + step.state_bytes + gradients


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "fsdp1", "zero1", "zero2", "zero3"])
def test_the_parts_of_the_peak_are_its_sum_on_several_gpus(parallel: str, accum: int) -> None:
    """Of ZeRO-1 and 2 all gradients were told, of which a rank keeps its part: more than there was in all."""
    asked: dict[str, Any] = {"device": "h200", "gpus": 8, "parallel": parallel, "batch": 1, "seq": 16}
    found = predict("llama-3.2-1b", "full", grad_accum=accum, **asked).memory
    assert found.weights + found.gradients + found.optimizer + found.activations == found.peak


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_saves_memory_where_activations_dominate(name: str) -> None:
    """That is what it is for; it must not keep what it promises to recompute."""
    setup: dict[str, Any] = {"batch": 8, "seq": 48, "layers": 8}
    plain, *checkpointed = (
        memory.peak_bytes(step_of(name, "full", checkpoint=c, **setup)) for c in ("none", "block", "block-reentrant")
    )
    assert all(peak < plain for peak in checkpointed)


@pytest.mark.parametrize(("device", "beside"), [("l40s", 0.5e9), ("cpu-xeon-2.5ghz-1t", 0.0)])
def test_a_step_fits_if_its_peak_and_what_lies_beside_the_allocator_do(device: str, beside: float) -> None:
    """A GPU that holds the allocator's bytes and not the CUDA context (0.4 to 0.6 GB by nvidia-smi) ends the run."""
    on = profile.load(device)
    need = predict("gpt2", device=on, batch=2, seq=64).memory.low

    def fits(memory_bytes: float) -> bool:
        smaller = replace(on, hardware=replace(on.hardware, memory_bytes=memory_bytes, usable_bytes=memory_bytes))
        return bool(predict("gpt2", device=smaller, batch=2, seq=64).fits)

    assert fits(need + 1.2 * beside)
    assert not fits(need + 0.8 * beside - 1)
    assert memory.fits(need - memory.reserved_bounds(0, on.kind)[0], need + 1.2 * beside, on.kind)


def test_what_fits_tightly_is_said_to() -> None:
    """It fits, yes; and what the allocator reserves began at the limit."""
    asked: dict[str, Any] = {"batch": 2, "seq": 128}
    p = predict("smollm2-135m", "lora", device="l40s", **asked)
    on = profile.load("l40s")
    for spare, fits, tight in [(0.05, True, True), (0.2, True, False), (-0.05, False, False)]:
        size = int(p.memory.peak) * (1 + spare) + memory.CONTEXT + memory.WORKSPACE
        card = replace(on, hardware=replace(on.hardware, memory_bytes=size, usable_bytes=size))
        found = predict("smollm2-135m", "lora", device=card, **asked)  # type: ignore[arg-type]
        assert bool(found.fits) == fits
        assert any("fits tightly" in note for note in found.notes) == tight


def test_a_tight_fit_is_told_of_an_array_of_gpus() -> None:
    """Under DDP all of them hold the same beside NCCL's buffers, which differ."""
    found = predict("llama-3.1-8b", "lora", device="h100-sxm", seq=1024, batch=9, gpus=[2, 4])
    assert any("fragmented allocator" in note for note in found.notes)
