"""Methods that put virtual tokens before the text: the tape equals the real program; costs in closed form."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import architecture_of, by_phase, config_of, setup_of, step_of

pytest.importorskip("peft")

from perfmodel import methods
from perfmodel.calls import costs
from perfmodel.errors import UserError
from perfmodel.prediction import memory
from perfmodel.recording.record import build
from validate.oracle import counts
from validate.oracle.cases import Case

CAUSAL = ("llama", "mistral", "qwen2", "gpt2", "opt", "gpt_neo")
PROMPTS = ("prompt_tuning:tokens=6", "p_tuning:tokens=6,width=24")
PREFIXES = ("prefix_tuning:tokens=6", "prefix_tuning:tokens=6,projection=true,width=24")
SETUPS: tuple[dict[str, Any], ...] = (
    {"dtype": "bf16", "batch": 4},
    {"dtype": "fp32", "batch": 1, "attention": "eager"},
    {"dtype": "fp32", "amp": "bf16", "checkpoint": "block"},
    {"dtype": "bf16", "padded": True, "grad_accum": 2},
    {"dtype": "bf16", "batch": 1, "checkpoint": "block-reentrant"},
    {"dtype": "bf16", "seq": 40, "attention": "eager", "checkpoint": "block"},
)


def cells() -> Any:
    """Every causal model meets every method; precision, attention, padding and checkpoints take turns."""
    for i, name in enumerate(CAUSAL):
        for j, method in enumerate((*PROMPTS, *PREFIXES)):
            if name in ("mistral", "qwen2") and j % 2:
                continue  # llama's forward pass with another mask or other biases
            setup = dict(SETUPS[(i + j) % len(SETUPS)])
            if method in PREFIXES:
                setup["checkpoint"] = "none"
            yield pytest.param(name, method, setup, id=f"{name} {method} {'-'.join(map(str, setup.values()))}")


@pytest.mark.parametrize(("name", "method", "setup"), cells())
def test_the_tape_equals_the_real_program(name: str, method: str, setup: dict[str, Any]) -> None:
    """Zero tolerance: calls, FLOPs, bytes, trainable and total parameters; peak memory within 2 %."""
    result = counts.compare_case(Case(config_of(name), method, setup_of(name, **setup)))
    assert result.calls > 0
    assert result.differences == []


def test_a_cache_of_one_or_many_layers_is_cut_and_joined_alike() -> None:
    """The prefix's gradient is one concatenation over all layers, however few ops the tape records."""
    for layers in (1, 2, 9):
        result = counts.compare_case(Case(config_of("llama", layers=layers), PREFIXES[0], setup_of("llama", batch=3)))
        assert result.differences == []
        assert result.peak_ratio == pytest.approx(1, abs=0.005)


def test_prompt_tuning_costs_what_a_longer_sequence_costs() -> None:
    """Every product runs on seq + tokens positions; in backward each once more for its input, attention twice."""
    longer = by_phase(step_of("llama", "full", seq=23, attention="eager"))
    prompt = by_phase(step_of("llama", "prompt_tuning:tokens=6", seq=17, attention="eager"))
    attention = (
        4 * 2 * 23 * 23 * 4 * 16 * 3
    )  # q·kᵀ and p·v of 3 layers with 4 heads of 16: both operands have gradients
    assert prompt["forward"] == longer["forward"]
    assert prompt["backward"] == prompt["forward"] + attention


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefix_tuning_adds_attention_over_its_tokens_alone(name: str) -> None:
    """methods.md 4.12: 4·b·s·p·d a layer in forward (q·kᵀ and p·v over p more keys), no linear FLOPs."""
    arch, batch, seq, tokens = architecture_of(name), 2, 17, 6
    more = 4 * batch * seq * tokens * arch.heads * arch.head_dim * arch.layers
    prefix = by_phase(step_of(name, f"prefix_tuning:tokens={tokens}", batch=batch, seq=seq, attention="eager"))
    bare = by_phase(step_of(name, "full", batch=batch, seq=seq, attention="eager"))
    assert prefix["forward"] - bare["forward"] == more


def test_trainable_parameters_in_closed_form() -> None:
    """Prompt p·h; P-tuning's MLP on top; prefix 2·layers·p·d_kv, which equals PEFT's published counts."""
    arch, p, w = architecture_of("llama"), 6, 24
    h, kv = arch.hidden, arch.kv_heads * arch.head_dim
    assert step_of("llama", f"prompt_tuning:tokens={p}").trainable == p * h
    mlp = h * w + w + w * w + w + w * h + h
    assert step_of("llama", f"p_tuning:tokens={p},width={w}").trainable == p * h + mlp
    assert step_of("llama", f"prefix_tuning:tokens={p}").trainable == 2 * arch.layers * p * kv
    projected = p * kv + kv * w + w + (w + 1) * 2 * arch.layers * kv
    assert step_of("llama", f"prefix_tuning:tokens={p},projection=true,width={w}").trainable == projected


@pytest.mark.parametrize("method", [*PROMPTS, *PREFIXES])
def test_nothing_frozen_gets_a_weight_gradient(method: str) -> None:
    """Backward runs to the first block for the prompt's sake, but no base weight is multiplied for a gradient."""
    step = step_of("llama", method)
    frozen = {tuple(p.shape) for p in step.parameters if p.kind == "weight"}
    shapes = frozen | {(b, a) for a, b in frozen}
    found = [op for part, op, _ in step.ops() if part.phase == "backward" and op.name == "mm"]
    assert found
    assert not [op for op in found if op.outputs[0].shape in shapes]


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
def test_a_grid_of_tokens_is_one_tape(method: str) -> None:
    """Dims may be arrays: a sweep over virtual tokens equals the single runs, FLOPs and peak memory."""
    architecture, setup, tokens = architecture_of("llama"), setup_of("llama"), np.array([4, 8, 16])
    parsed: Any = methods.parse(f"{method}:tokens=4")
    grid = build(architecture, replace(parsed, tokens=tokens).bind(architecture), setup)
    single = [step_of("llama", f"{method}:tokens={n}") for n in tokens]
    for figure in (lambda s: sum(n * costs.flops(op) for _, op, n in s.ops()), memory.peak_bytes):
        assert np.array_equal(figure(grid), [figure(s) for s in single])


@pytest.mark.parametrize(
    ("name", "text", "needs"),
    [
        ("bert", "prompt_tuning", "no prompt learning for masked language models"),
        ("llama", "prompt_tuning:tokens=0", "tokens must be"),
        ("llama", "p_tuning:encoder=lstm", "encoder lstm .* not modelled; use mlp"),
        ("llama", "p_tuning:width=0", "width must be"),
        (
            "gpt2",
            "prefix_tuning:tokens=60",
            "seq 77 with 60 virtual tokens exceeds its 64 learned positions; use --seq 4 or less",
        ),
        ("gpt2", "prompt_tuning:tokens=60", "exceeds its 64 learned positions"),
    ],
)
def test_bad_options_are_refused_in_one_line(name: str, text: str, needs: str) -> None:
    """A user's slip ends in one line that says what would be right."""
    with pytest.raises(UserError, match=needs) as caught:
        step_of(name, text)
    assert "\n" not in str(caught.value)


def test_prefix_tuning_with_checkpoints_is_refused_as_peft_refuses_it() -> None:
    with pytest.raises(UserError, match="does not work with activation checkpointing"):
        step_of("llama", "prefix_tuning", checkpoint="block")
