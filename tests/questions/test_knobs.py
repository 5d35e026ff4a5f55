"""The choices of a search: each is one that a program has, and none changes what is learned."""

from dataclasses import replace
from typing import Any

import pytest
from helpers import architecture_of, setup_of

from perfmodel import methods, predict
from perfmodel.architectures import Architecture
from perfmodel.devices import profile
from perfmodel.methods import Method
from perfmodel.prediction.predict import Prediction, resolve
from perfmodel.questions import knobs, splits
from perfmodel.questions.advice import Candidate, _Space
from perfmodel.recording.reuse import Shared
from perfmodel.setup import Setup


@pytest.mark.parametrize(
    ("model", "kernels", "offered"), [("llama", "torch", 1), ("llama", "liger", 0), ("gpt2", "torch", 0)]
)
def test_liger_is_offered_where_it_exists_and_is_not_used(model: str, kernels: str, offered: int) -> None:
    """A change that is none, or that no program has, would be advice for nothing."""
    choices = knobs._kernels(architecture_of(model), setup_of(model, kernels=kernels))
    assert len(choices) == 1 + offered


@pytest.mark.parametrize(
    ("model", "given", "offered"),
    [
        ("llama", {"dtype": "fp16"}, ["eager attention"]), ("llama", {"dtype": "bf16"}, []),
        ("llama", {"attention": "eager"}, ["SDPA attention"]), ("gpt2", {"dtype": "fp16"}, []),
    ],
)  # fmt: skip
def test_eager_attention_is_offered_where_sdpa_may_have_no_kernel(
    model: str, given: dict[str, Any], offered: list[str]
) -> None:
    """Grouped heads before Ampere, where one trains in fp16."""
    choices = knobs._attention(architecture_of(model), setup_of(model, **given))
    assert [choice.label for choice in choices[1:]] == offered


@pytest.mark.parametrize(
    ("batch", "accum", "others"),
    [
        (1, 1, []),
        (4, 1, [(1, 4), (2, 2)]),
        (2, 8, [(1, 16), (4, 4), (8, 2), (16, 1)]),
        (3, 4, [(1, 12), (2, 6), (4, 3), (12, 1)]),
    ],
)
def test_a_step_is_split_by_powers_of_two_or_not_at_all(batch: int, accum: int, others: list[tuple[int, int]]) -> None:
    """As many samples a step whatever the split: advice changes what a step costs, never what it learns."""
    found = list(splits.micro_batches(Setup(batch=batch, grad_accum=accum), batch * accum))
    assert found == [(batch, accum), *others]


@pytest.mark.parametrize("given", [{}, {"pp": 2, "grad_accum": 4}, {"tp": 2}, {"tp": 2, "batch": 1, "grad_accum": 3}])
def test_gpus_may_have_some_of_the_layers_each(given: dict[str, Any]) -> None:
    """A pipeline works on the samples of its replicas' number, in as many micro-batches as it has stages or more."""
    model, setup = architecture_of("llama"), Setup(gpus=4, **{"batch": 2, **given})
    stages = set()
    for choice in knobs.memory_knob(model, setup):
        changed = replace(setup, **choice.setup)
        assert changed.batch * changed.grad_accum * changed.replicas == setup.batch * setup.grad_accum * setup.replicas
        assert changed.pp <= changed.grad_accum
        stages.add(changed.pp)
    assert stages == {1, 2, 4}


@pytest.mark.parametrize(
    ("optimizer", "zero", "fsdp"),
    [
        ("adamw-fused", "adamw-fused", "adamw-fused"), ("sgd", "adamw", "sgd"), ("adamw-8bit", "adamw", "adamw"),
    ],
)  # fmt: skip
def test_another_optimizer_is_proposed_only_where_the_host_has_none(optimizer: str, zero: str, fsdp: str) -> None:
    """SGD in the place of AdamW learns otherwise: whoever asks for it gets AdamW where nothing else is left."""
    setup = Setup(gpus=2, optimizer=optimizer)
    found = {p.setup["parallel"]: p for p in knobs.offloading(setup)}
    for form, expected in (("zero2", zero), ("zero3", zero), ("fsdp2", fsdp)):
        assert replace(setup, **found[form].setup).optimizer == expected
        assert (f"AdamW in the place of {optimizer}" in found[form].label) == (expected != optimizer)
    assert (len(knobs._optimizer(setup)) > 1) == optimizer.startswith("adamw")


@pytest.mark.parametrize(("dropout", "offered"), [(0, True), (0.1, False)])
def test_kernels_that_drop_otherwise_are_no_advice(dropout: float, offered: bool) -> None:
    """Axolotl's draw one mask for layers that share an input: other samples of noise than peft's."""
    method = methods.parse(f"lora:dropout={dropout}")
    assert any("Axolotl" in choice.label for choice in knobs._implementation(method)) == offered
    assert (len(knobs._implementation(replace(method, implementation="axolotl"))) > 1) == offered


def test_sequence_parallel_ends_with_tensor_parallel() -> None:
    """To share no layers is a choice from there, too, and so is to share no tokens."""
    model = architecture_of("llama")
    choices = knobs.memory_knob(model, Setup(gpus=2, tp=2, batch=2, sequence_parallel=True))
    shared: dict[int, set[Any]] = {1: set(), 2: set()}
    for choice in choices:
        shared[choice.setup.get("tp", 2)].add(choice.setup.get("sequence_parallel", True))
    assert shared == {1: {False}, 2: {True, False}}


def test_layers_are_cut_both_ways_and_tokens_with_them() -> None:
    """A large model's fastest split on many GPUs is of both: each by itself, there was no way from one to the other."""
    setup = Setup(gpus=8, batch=2, grad_accum=4)
    choices = knobs.memory_knob(architecture_of("llama"), setup)
    found = {splits.Split.of(replace(setup, **choice.setup)) for choice in choices}
    assert {(cut.tp, cut.pp) for cut in found} >= {(1, 1), (2, 1), (1, 2), (2, 2), (2, 4)}
    assert {cut.sequence_parallel for cut in found if cut.tp > 1} == {True, False}
    assert not any(cut.sequence_parallel for cut in found if cut.tp == 1)
    assert {cut.sequence_parallel for cut in splits.ways_to_cut(architecture_of("phi3"), setup)} == {False}


def test_what_is_left_out_of_a_cut_is_no_better_than_what_was_tried() -> None:
    """Of splits of Llama-3.1-8B in Megatron's program, whatever the memory: the best is that of all of them."""
    setup = Setup(gpus=4, batch=1, seq=1024, grad_accum=2, parallel="zero1")
    model, method = resolve("megatron:llama-3.1-8b", "full")
    shared, on = Shared(), profile.load("h100-sxm")
    known: dict[Setup, Prediction] = {}

    def space_of(size: float) -> _Space:
        def evaluate(model: Architecture, setup: Setup, method: Method, changes: tuple[str, ...]) -> Candidate:
            if setup not in known:
                known[setup] = predict(model, replace(method, architecture=None), setup, on, shared=shared)
            return Candidate(changes, known[setup], known[setup].memory.peak < size)

        return _Space(model, method, setup, [knobs.memory_knob(model, setup)], evaluate, ())

    for size in (20e9, 30e9, 40e9, 80e9):
        space = space_of(size)
        tried = min([space.origin, *space.turned(space.origin, 0)], key=space._order)
        assert len(space.known) < 0.75 * space.size
        assert space._order(tried) == min(space._order((i,)) for i in range(space.size))
