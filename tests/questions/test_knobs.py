"""The choices of a search: each is one that a program has, and none changes what is learned."""

from dataclasses import replace
from typing import Any

import pytest
from helpers import architecture_of, setup_of

from perfmodel import methods
from perfmodel.questions import knobs
from perfmodel.setup import Setup


@pytest.mark.parametrize(
    ("model", "kernels", "offered"), [("llama", "torch", 1), ("llama", "liger", 0), ("gpt2", "torch", 0)]
)
def test_liger_is_offered_where_it_exists_and_is_not_used(model: str, kernels: str, offered: int) -> None:
    """A change that is none, or that no program has, would be advice for nothing."""
    choices = knobs._kernels(architecture_of(model), setup_of(model, kernels=kernels))
    assert len(choices) == 1 + offered


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
    found = list(knobs._micro_batches(Setup(batch=batch, grad_accum=accum), batch * accum))
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
    assert stages == {1, 2, 4} - ({4} if setup.tp > 1 else set())


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
    """To share no layers is a choice from there, too."""
    model = architecture_of("llama")
    choices = knobs.memory_knob(model, Setup(gpus=2, tp=2, batch=2, sequence_parallel=True))
    assert {label.setup.get("sequence_parallel") for label in choices if label.setup.get("tp") == 1} == {False}
    assert all("sequence_parallel" not in label.setup for label in choices if label.setup.get("tp") != 1)
