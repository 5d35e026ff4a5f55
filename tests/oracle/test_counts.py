"""The reference is PyTorch itself: the tape equals the real transformers + peft program, call by call.

About 140 cells of the grid of `perfmodel validate counts`, chosen so that every architecture, method, precision,
attention, checkpointing and optimizer occurs, and the rare corners at least once. The full grid is a command.
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from helpers import NAMES, architecture_of, config_of, setup_of

pytest.importorskip("peft")

import torch
from both_sides import model_of, tape_of

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.cli import main
from perfmodel.program.op import Spec
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from perfmodel.tracing.trace import Trace, trace_step
from validate.oracle import cases, counts
from validate.oracle.cases import NO_DROPOUT, REAL, STACKS, WHOLE, Case, fitting, further, grid, with_targets

LORA = "lora:r=4"
WIDE = "lora:r=4,targets=all-linear,dropout=0.1"
AMP = {"dtype": "fp32", "amp": "bf16"}
FAKED = ("gpt2", "bert", "gemma2")  # of these, cases on fake tensors beside real ones, as the command does with all


def cell(name: str, method: str = "full", changes: dict[str, Any] | None = None, **setup: Any) -> Any:
    """One case, named by what is special about it."""
    label = [name, method, *(f"{k}={v}" for k, v in {**(changes or {}), **setup}.items())]
    config = config_of(name, **(changes or {}))
    case = Case(config, with_targets(method, from_config(config)), setup_of(name, **{"batch": 4, **setup}))
    return pytest.param(case, id=" ".join(label))


def cells() -> Iterator[Any]:
    for i, name in enumerate(NAMES):
        tied = {"tie_word_embeddings": i % 2 == 0}
        six = [
            cell(name, "full", batch=1, seq=33, attention=("sdpa", "eager")[i % 2]),
            cell(name, LORA, tied, dtype=("bf16", "fp32")[i % 2], seq=17 + 2 * (i % 20)),
            cell(name, WIDE, NO_DROPOUT.get(name), checkpoint=("none", "block", "block-reentrant")[i % 3]),
            cell(name, "full", tied, **AMP, optimizer=("adamw-foreach", "adamw-fused", "sgd-momentum")[i % 3]),
            cell(name, ("top_k:k=1", "norm")[i % 2], dtype="fp32", optimizer="adamw-foreach"),
            cell(
                name, ("norm", "top_k:k=2,inner=lora")[i % 2], **(AMP if i % 3 else {}), padded=i in (0, 1, 5, 7, 8)
            ),
        ]  # fmt: skip
        yield from six if i < 4 else six[i % 2 :: 2] if i < WHOLE else six[i % 3 :: 3]
    for i, (config, names) in enumerate(further()):  # other heads, other blocks
        method, precision = names[i % len(names)], ({"dtype": "bf16"}, {"dtype": "fp32"}, AMP)[i % 3]
        setup = fitting(Setup(4, 17, **precision, checkpoint=("none", "block")[i % 2]), from_config(config).traits)
        told = with_targets(method, from_config(config))
        yield pytest.param(Case(config, told, setup), id=f"{i} {config.name} {method}")
    for name, method, change, setup in (
        ("t5", "full", {}, {}),
        ("t5", LORA, {**NO_DROPOUT["t5"], "tie_word_embeddings": False}, {"checkpoint": "block", "attention": "eager"}),
        ("mt5", WIDE, {}, AMP),
        ("mt5", "top_k:k=5", {}, {"dtype": "fp32", "checkpoint": "block", "grad_accum": 2}),
        ("t5", "norm", {"num_layers": 1, "num_decoder_layers": 1}, {"padded": True}),
    ):
        case = Case(Config({**STACKS[name], **change}, name, name), method, Setup(**{"batch": 4, "seq": 17, **setup}))
        yield pytest.param(case, id=f"{name} {method}")
    yield cell("llama", "full", checkpoint="block", seq=33, **AMP)
    yield cell("gpt2", "full", checkpoint="block", **AMP)
    yield cell("bert", "bitfit", checkpoint="block-reentrant", optimizer="sgd")
    yield cell("qwen2", "bitfit", attention="eager")
    yield cell("opt", "bitfit", {"attention_dropout": 0.1}, **AMP)
    yield cell("llama", LORA, {"attention_dropout": 0.1}, grad_accum=3, clip_grad=False)
    yield cell("gpt2", LORA, grad_accum=2, attention="eager", checkpoint="block")
    yield cell("llama", LORA, {"head_dim": 8, "attention_bias": True, "mlp_bias": True}, batch=1, seq=1)
    yield cell("mistral", LORA, {"sliding_window": 24}, seq=25, attention="eager")
    yield cell("llama", LORA, amp="bf16")
    yield cell("gpt2", LORA, padded=True, attention="eager")
    for name, method, dtype in (("llama", "full", "fp32"), ("gpt2", "full", "bf16"), ("bert", LORA, "bf16")):
        yield cell(name, method, dtype=dtype, optimizer="muon")
        yield cell(name, method, dtype=dtype, optimizer="schedule-free-adamw")
    yield cell("llama", "full", dtype="bf16", optimizer="rmsprop")
    yield cell("gpt2", LORA, dtype="bf16", optimizer="rmsprop-loop")
    yield cell("llama", "full", dtype="fp16", optimizer="adamw-masters")
    yield cell("gpt2", LORA, dtype="bf16", optimizer="adamw-masters")
    yield cell("llama", "lora:r=4,layers_to_transform=1,adapter_dtype=bf16")
    yield cell("llama", "top_k:k=2,spread=true", {"num_hidden_layers": 4}, checkpoint="block")
    yield cell("opt", "lora:r=3,targets=fc1+out_proj+lm_head", {"tie_word_embeddings": False}, dtype="fp16")


@pytest.mark.parametrize("case", cells())
def test_the_tape_equals_the_real_program(case: Case) -> None:
    """Zero tolerance: every call with its shapes and dtypes, FLOPs, bytes, parameters; peak memory within 2 %."""
    result = counts.compare_case(case, fakes=case.config.name in FAKED)
    assert result.calls > 0
    assert result.flops > 0
    assert result.differences == []


@pytest.mark.parametrize("method", [LORA, WIDE, "norm", "top_k:k=2,inner=lora", "lora:r=5,layers_to_transform=1"])
@pytest.mark.parametrize("name", NAMES)
def test_parameter_counts_equal_pefts(name: str, method: str) -> None:
    """The line that every user of peft has seen (`print_trainable_parameters`) is the easiest check they can make."""
    case = Case(config_of(name), with_targets(method, architecture_of(name)), setup_of(name, batch=1, seq=5))
    step = tape_of(case)
    assert (step.trainable, step.total) == tuple(model_of(case).get_nb_trainable_parameters())


def shifted_logits_loss(logits: Any, labels: Any, vocab_size: int, **ignored: Any) -> Any:
    """The causal loss of transformers before 4.49 in plain torch: the last token's logits are cut off by a copy."""
    kept = logits.float()[..., :-1, :].contiguous().view(-1, vocab_size)
    return torch.nn.functional.cross_entropy(kept, labels[..., 1:].contiguous().view(-1))


@pytest.mark.parametrize(
    "case",
    [
        cell("llama", LORA), cell("qwen2", "full", batch=1), cell("mistral", WIDE, checkpoint="block", grad_accum=2),
        cell("gpt2", "full", amp="bf16", dtype="fp32"), cell("phi", LORA, padded=True),
    ],
)  # fmt: skip
def test_the_tape_equals_an_old_program(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--stack` undoes are single decisions of transformers and peft: undone there, the calls must be the same."""
    from transformers.integrations import sdpa_attention
    from transformers.loss import loss_utils

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", lambda *operands: False)
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", shifted_logits_loss)
    old = replace(case, setup=replace(case.setup, stack="torch=2.4,transformers=4.40,peft=0.11"))
    assert counts.compare_case(old).differences == []


# the oracle itself


@pytest.fixture(scope="module")
def traced() -> tuple[Case, Step, Trace]:
    """A case whose tape and trace agree."""
    case = Case(config_of("llama", layers=2), LORA, Setup(batch=2, seq=9))
    step = tape_of(case, view_replay=True)
    trace = trace_step(model_of(case), case.setup, step.optimizer)
    assert counts.judge_step(case, step, trace).differences == []
    return case, step, trace


def wrong(step: Step, phase: str, change: Any) -> Step:
    """A copy of a step in which one op of a phase's largest part is changed (to None: dropped)."""
    groups = copy.copy(step.groups)
    for i, group in enumerate(groups):
        parts = [p for p in group.parts if p.phase == phase and any(not op.view for op in p.ops)]
        if not parts:
            continue
        part = max(parts, key=lambda p: len(p.ops))
        ops = list(part.ops)
        at = next(j for j, op in enumerate(ops) if not op.view and op.inputs)
        changed = change(ops[at])
        ops[at : at + 1] = [] if changed is None else [changed]
        new = replace(part, ops=ops)
        groups[i] = replace(group, parts=[new if p is part else p for p in group.parts])
        return replace(step, groups=groups)
    raise AssertionError(phase)


def other_dtype(op: Any) -> Any:
    changed = copy.copy(op)
    first = op.inputs[0]
    changed.inputs = (Spec("fp16", first.shape, first.copies), *op.inputs[1:])
    return changed


def other_shape(op: Any) -> Any:
    changed = copy.copy(op)
    first = op.outputs[0]
    changed.outputs = (Spec(first.dtype, (*first.shape, 1), first.copies), *op.outputs[1:])
    return changed


def other_bytes(op: Any) -> Any:
    changed = copy.copy(op)
    changed.bytes_read = op.bytes_read + 1
    return changed


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("change", [lambda op: None, other_dtype, other_shape, other_bytes])
def test_a_wrong_tape_is_reported(traced: tuple[Case, Step, Trace], phase: str, change: Any) -> None:
    """An oracle that cannot fail proves nothing: one lost op, dtype, shape or byte must be seen, in its phase."""
    case, step, trace = traced
    differences = counts.judge_step(case, wrong(step, phase, change), trace).differences
    assert differences
    assert all(d.startswith(phase) for d in differences)


def test_a_wrong_multiplicity_is_reported(traced: tuple[Case, Step, Trace]) -> None:
    """Layers are recorded once; counting them once too often is the likeliest slip."""
    case, step, trace = traced
    first = step.groups[0]
    parts = [replace(p, repeat=p.repeat + (p.name == "blocks" and p.phase == "forward")) for p in first.parts]
    differences = counts.judge_step(
        case, replace(step, groups=[replace(first, parts=parts), *step.groups[1:]]), trace
    ).differences
    assert any("FLOPs" in d for d in differences)
    assert any("tape only" in d for d in differences)


def test_a_wrong_parameter_count_is_reported(traced: tuple[Case, Step, Trace]) -> None:
    """Memory of weights, gradients and states is computed from the table, not from ops."""
    case, step, trace = traced
    short = replace(step, parameters=step.parameters[:-1])
    assert any(d.startswith("parameters") for d in counts.judge_step(case, short, trace).differences)


def test_a_peak_three_percent_off_is_reported(traced: tuple[Case, Step, Trace]) -> None:
    """The stated tolerance is 2 %."""
    case, step, trace = traced
    for factor, reported in ((1.03, True), (1.0, False), (0.97, True)):
        off = replace(trace, peak=int(counts.memory.peak_bytes(step) * factor))
        found = counts.judge_step(case, step, off).differences
        assert any(d.startswith("peak") for d in found) == reported


@pytest.mark.parametrize("which", ["quick", "standard"])
def test_lengths_of_the_grid_are_odd(which: str) -> None:
    """No block or vector divides them: what only multiples hide (padding, copies, alignment) shows."""
    lengths = {case.setup.seq for case in grid(which)}
    assert len(lengths) > 1
    assert all(seq % 2 for seq in lengths)


def test_the_grids_hold_what_they_promise() -> None:
    """A grid that leaves something out finds no difference in it."""
    names = {case.config.name for case in grid("standard")}
    assert {name for name in REAL if name not in names} == set()
    quick = list(grid("quick"))
    assert {case.setup.checkpoint for case in quick} == {"none", "block", "block-reentrant"}
    prefixes = {case.setup.checkpoint for case in quick if case.method.startswith("prefix_tuning")}
    assert prefixes == {"none"}  # they do not work with checkpoints


@pytest.mark.parametrize("differences", [[], ["forward: mm: 3 instead of 2"]])
def test_the_command_tells_each_difference_in_words_and_as_json(
    monkeypatch: pytest.MonkeyPatch, differences: list[str]
) -> None:
    """Whoever changed something reads what differs; a script reads the same, and both go by the exit code."""
    case = Case(config_of("llama"), LORA, setup_of("llama"))
    monkeypatch.setattr(cases, "grid", lambda which: [case])
    monkeypatch.setattr(counts, "compare_case", lambda case, **how: counts.Result(case, 7, 5, 3, 1.0, differences))
    words, data = (CliRunner().invoke(main, ["validate", "counts", *form]) for form in ([], ["--json"]))
    assert words.exit_code == data.exit_code == len(differences)
    assert f"1 cases, 7 ATen calls compared, {len(differences)} cases differ" in words.stdout
    assert all(line in words.stdout for line in differences)
    (row,) = json.loads(data.stdout)
    assert (row["model"], row["method"], row["calls"]) == (case.config.name, LORA, 7)
    assert row["differences"] == differences


def test_methods_take_what_the_quick_grid_gives_them() -> None:
    """Which method meets which model goes by turns, so that one more model type gives all behind it others."""
    pairs = {(case.config.name, case.method): case for case in cases.grid("quick")}
    for case in pairs.values():
        methods.parse(case.method).bind(from_config(case.config))
