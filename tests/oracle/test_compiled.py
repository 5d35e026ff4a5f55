"""Compiled ranks against the real program: Dynamo and AOTAutograd on transformers + peft under torch's DDP and FSDP2.

A part of the grid of `perfmodel validate counts --parallel`.
"""

import copy
from dataclasses import replace

import pytest

pytest.importorskip("peft")

import torch.distributed as dist
from helpers import config_of

from perfmodel.architectures import Config
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from validate.oracle import compiled, parallel_cases
from validate.oracle.cases import Case

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

SETUP = Setup(batch=2, seq=9, gpus=2, compile="default")
CUT = Config({**parallel_cases.MANY_BUCKETS, "num_hidden_layers": 2, "vocab_size": 256}, "llama", "llama-cut")
CASES = [
    Case(config_of("llama", layers=2), "lora:r=4", replace(SETUP, parallel="fsdp2", grad_accum=2)),
    Case(config_of("qwen2", layers=2), "full", replace(SETUP, parallel="fsdp2", checkpoint="block", amp="bf16")),
    Case(CUT, "lora:r=32,targets=all-linear", replace(SETUP, batch=1)),
    Case(config_of("llama", layers=2), "full", replace(SETUP, parallel="fsdp2", fsdp_units="blocks")),
    Case(config_of("llama", layers=2), "lora:r=4", replace(SETUP, seq=8, tp=2, sequence_parallel=True)),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c.config.name} {c.method} {c.setup.parallel}")
def traced(request: pytest.FixtureRequest) -> tuple[Case, Step, compiled.GraphRecorder]:
    """A case with its tape and its trace."""
    return request.param, *compiled.trace_compiled(request.param)


def test_the_tape_equals_a_compiled_rank(traced: tuple[Case, Step, compiled.GraphRecorder]) -> None:
    """Graphs that are entered, collectives in their order between products, and what forward keeps for backward."""
    result = compiled.judge_compiled(*traced)
    assert result.collectives > 0
    assert result.differences == []


def test_a_program_that_differs_is_reported(traced: tuple[Case, Step, compiled.GraphRecorder]) -> None:
    """An oracle that cannot fail proves nothing: one graph less, and bytes that nobody kept, must be seen."""
    case, step, real = traced
    wrong = copy.copy(real)
    wrong.graphs, wrong.kept = {**real.graphs, "backward": real.graphs["backward"] - 1}, real.kept * 2
    found = compiled.judge_compiled(case, step, wrong).differences
    assert [line.split(":")[0] for line in found] == ["graphs", "kept for backward"]


def test_both_forms_are_in_the_grid() -> None:
    """With graphs that are cut, and what DDP looks for."""
    cases = list(parallel_cases.compiled_grid("quick"))
    assert {c.setup.sequence_parallel for c in cases if c.setup.tp > 1} == {False, True}
    assert {c.setup.parallel for c in cases} == {"ddp", "fsdp2"}
    assert {c.setup.ddp for c in cases if c.config.name == "llama-large"} == {"plain", "find-unused"}
    assert all(c.setup.compile == "default" for c in cases)
