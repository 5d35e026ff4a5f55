"""A training step with real numbers on the CPU: the oracle's fake tensors must not have changed the program.

`perfmodel.tracing.trace` records the program under FakeTensorMode. Here the same recorder watches tensors that hold
data, and the loss goes down. The one difference that is known: the engine adds gradients in place where nobody else
holds them (`add_` for `add`), which it does not do to fake tensors. So names are compared without the underscore.
"""

from collections import Counter

import pytest
from helpers import config_of

pytest.importorskip("peft")

import torch
from both_sides import model_of, tape_of
from real_steps import real_steps

from perfmodel.program.part import PHASES
from perfmodel.setup import Setup
from validate.oracle import counts
from validate.oracle.cases import Case

SETUPS = {
    "fp32": Setup(batch=2, seq=9, dtype="fp32"),
    "bf16": Setup(batch=2, seq=9),
    "amp": Setup(batch=2, seq=9, dtype="fp32", amp="bf16"),
    "one sample, eager": Setup(batch=1, seq=9, dtype="fp32", attention="eager"),
    "checkpointing": Setup(batch=2, seq=9, dtype="fp32", checkpoint="block", optimizer="adamw-foreach"),
    "two micro-batches": Setup(batch=2, seq=9, dtype="fp32", grad_accum=2, optimizer="adamw-fused"),
}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("method", ["full", "lora:r=4,targets=all-linear"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_real_step_makes_the_calls_of_the_tape(name: str, method: str, setup: str) -> None:
    """If this fails while test_counts passes, the oracle traces a program that nobody runs."""
    case = Case(config_of(name, layers=2), method, SETUPS[setup])
    step = tape_of(case)
    torch.manual_seed(0)
    recorder, losses = real_steps(model_of(case, device="cpu"), case.setup, step.optimizer, 3)
    assert losses[-1] < losses[0], "the real step does not train"
    tape = counts.tape_calls(step)
    for phase in PHASES:
        expected, real = counts.without_underscore(tape[phase]), counts.without_underscore(recorder.trace.calls[phase])
        assert dict(expected - real) == {}, f"{phase}: on the tape only"
        assert dict(real - expected) == {}, f"{phase}: in the real step only"
        assert sum(real.values()) == sum(n for part, op, n in step.ops() if part.phase == phase and not op.view)


def graph(loss: torch.Tensor) -> Counter[str]:
    """Nodes of PyTorch's graph by name."""
    assert loss.grad_fn is not None
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        new = {node for node, _ in waiting.pop().next_functions if node is not None} - seen
        seen |= new
        waiting += new
    return Counter(node.name() for node in seen)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "opt"])
def test_the_engine_works_off_as_many_nodes_as_pytorchs(name: str) -> None:
    """The host pays for each, which decides small steps. Aliases (reshapes that copy nothing) are left out."""
    case = Case(config_of(name, layers=3), "full", Setup(batch=2, seq=17))
    step = tape_of(case)
    ids = torch.zeros(2, 17, dtype=torch.long)
    found = graph(model_of(case, device="cpu")(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss)
    aliases = sum(n for name, n in found.items() if "Alias" in name)
    assert aliases <= 3 + 1
    assert sum(part.host.nodes * times for part, times in step.parts()) == sum(found.values()) - aliases
