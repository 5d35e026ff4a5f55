"""The less known tuners of PEFT: the tape equals the real program, and what makes each of them cost what it costs."""

from typing import Any

import numpy as np
import pytest
from helpers import architecture_of, config_of, setup_of, step_of

pytest.importorskip("peft")

from perfmodel import methods
from perfmodel.errors import UserError
from perfmodel.tracing.programs.tuners_of_peft import CONFIGS
from validate.oracle import counts
from validate.oracle.cases import Case

CONV1D = (  # PEFT has these for GPT-2's Conv1D too
    "gralora:r=4",
    "fourierft:n=10",
    "vblora:r=2,vectors=8,length=16",
    "randlora:r=6",
    "trainable_tokens:tokens=3",
)
LINEAR_ONLY = (
    "delora:r=4",
    "road:group_size=16",
    "c3a:block_size=16",
    "hra:r=3",
    "boft:block_size=16",
    "beft",
)
PRECISIONS: tuple[dict[str, Any], ...] = ({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp32", "amp": "bf16"})


def cells() -> Any:
    """Each tuner meets llama and a model with biases; precision, attention, checkpoints and batch take turns."""
    turns = [*((("llama", "gpt2"), m) for m in CONV1D), *((("llama", "opt"), m) for m in LINEAR_ONLY)]
    for i, (names, method) in enumerate(turns):
        for j, name in enumerate(names):
            k = i + j
            setup = {**PRECISIONS[k % 3], "batch": (1, 4)[k // 2 % 2], "attention": ("sdpa", "eager")[k // 4 % 2]}
            setup["checkpoint"] = ("none", "block")[(j + i // 2) % 2]
            yield pytest.param(name, method, setup, id=f"{name} {method} {'-'.join(map(str, setup.values()))}")
    rare: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("qwen2", "gralora:r=4,hybrid=2,dropout=0.1,targets=q_proj+down_proj", {"checkpoint": "block-reentrant"}),
        ("opt", "gralora:r=4,targets=k_proj+fc1", {}),
        ("llama", "delora:r=4,dropout=0.1,adapter_dtype=bf16", {}),
        ("bert", "road:group_size=16,variant=road_4", {}),
        ("qwen2", "c3a:block_size=8,layers=0+2", {"dtype": "fp32", "amp": "bf16"}),
        ("gpt_neo", "c3a:block_size=16,targets=k_proj+q_proj", {"attention": "eager"}),  # a key's gradient lies across
        ("gpt2", "vblora:r=2,vectors=8,length=16,layers=0-1,dropout=0.1", {"checkpoint": "block-reentrant"}),
        ("qwen2", "randlora:r=4,dropout=0.1,targets=all-linear", {}),
        ("bert", "boft:block_size=8", {"dtype": "fp32", "amp": "bf16"}),
        ("qwen2", "trainable_tokens:tokens=1", {"dtype": "fp32"}),
    )
    for name, method, setup in rare:
        yield pytest.param(name, method, {"batch": 4, **setup}, id=f"{name} {method}")


@pytest.mark.parametrize(("name", "method", "setup"), cells())
def test_the_tape_equals_the_real_program(name: str, method: str, setup: dict[str, Any]) -> None:
    """Zero tolerance: calls, FLOPs, bytes, trainable and total parameters; peak memory within 2 %."""
    result = counts.compare_case(Case(config_of(name), method, setup_of(name, **setup)))
    assert result.calls > 0
    assert result.differences == []


def test_every_tuner_of_the_table_is_compared_here() -> None:
    """A tuner that is registered but never met by the oracle would be a formula that nobody checked."""
    compared = {methods.parse(text).name for text in (*CONV1D, *LINEAR_ONLY)}
    assert {cls.name for cls in CONFIGS} <= compared


@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_a_bank_shared_by_all_layers_adds_its_gradient_up_once_a_use(layers: int) -> None:
    """VB-LoRA: two uses in each of two linears a layer, so four gradients a layer and one addition less than that."""
    step = step_of("llama", "vblora:r=2,vectors=8,length=16", layers=layers)
    bank = (8, 16)
    adds = sum(n for _, op, n in step.ops() if op.name == "add.Tensor" and op.outputs[0].shape == bank)
    assert adds == 4 * layers - 1
    assert sum(p.count for p in step.parameters if p.shape == bank) == 1


def test_what_a_weight_sized_update_costs() -> None:
    """Why FourierFT and HRA are slow: whole weights are transformed or reflected, whatever the number of tokens."""
    square = (64, 64)

    def passes(method: str) -> int:
        ops = [op for part, op, _ in step_of("llama", method, layers=2).ops() if part.phase == "forward"]
        return sum(op.outputs[0].shape == square for op in ops if not op.view and op.outputs)

    assert passes("fourierft:n=10,targets=q_proj") >= 2 * 4  # zeros, complex, transform, scaling
    more = passes("hra:r=6,targets=q_proj") - passes("hra:r=3,targets=q_proj")
    assert more == 2 * 3 * 3  # a layer and reflection: doubled, product with uᵀ, difference


def test_trainable_parameters_in_closed_form() -> None:
    """Counts that their papers and PEFT give, on llama's q (64 → 64) and v (64 → 32), three layers."""
    expected = {
        "gralora:r=4": 3 * 4 * (64 + 64 + 64 + 32),
        "delora:r=4": 3 * (4 * (64 + 64 + 64 + 32) + 2),
        "road:group_size=16": 3 * (64 + 32),
        "road:group_size=16,variant=road_4": 3 * 4 * (64 + 32),
        "c3a:block_size=16": 3 * (64 * 64 + 64 * 32) // 16,
        "fourierft:n=10": 3 * 2 * 10,
        "vblora:r=2,vectors=8,length=16": 8 * 16 + 3 * (2 * 8 * (64 + 64 + 64 + 32) // 16),
        "hra:r=3": 3 * 2 * 64 * 3,
        "boft:block_size=16": 3 * (2 * 64 * 16 + 64 + 32),
        "beft": 3 * 32,
        "randlora:r=4": 3 * (4 * 16 + 16 * 64 + 4 * 8 + 8 * 32),
        "trainable_tokens:tokens=3": 3 * 64,
    }
    for text, count in expected.items():
        assert step_of("llama", text).trainable == count, text


@pytest.mark.parametrize("method", CONV1D + LINEAR_ONLY)
def test_no_gradient_of_a_frozen_weight(method: str) -> None:
    """Nothing in backward computes a gradient as large as the frozen MLP weights."""
    step = step_of("llama", method, seq=17)
    frozen = {tuple(p.shape) for p in step.parameters if p.kind == "weight" and "mlp" in p.name}
    shapes = frozen | {(b, a) for a, b in frozen}
    assert frozen
    assert not [
        op for part, op, _ in step.ops()
        if part.phase == "backward" and op.name == "mm" and op.outputs[0].shape in shapes
    ]  # fmt: skip
    assert 0 < step.trainable < step.total


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("gralora:r=5", "r must be a multiple of k 2"),
        ("gralora:r=6,k=3", "k 3 does not divide the input width 64"),
        ("gralora:hybrid=-1", "hybrid must be from 0"),
        ("delora:r=65", "rank 65 exceeds the width 64"),
        ("road:group_size=15", "group_size must be even"),
        ("road:group_size=48", "group_size 48 does not divide the output width"),
        ("road:variant=road_3", "variant 'road_3' is unknown"),
        ("c3a", "block_size 256 does not divide the input width 64"),
        ("fourierft:n=5000", "n 5000 exceeds the elements"),
        ("fourierft:n=0", "n must be"),
        ("vblora", "length 256 does not divide the input width 64"),
        ("hra:r=0", "r must be"),
        ("boft:block_size=7", "block_size 7 does not divide the input width 64"),
        ("randlora:dropout=1", "dropout must be from 0 to below 1"),
        ("trainable_tokens:tokens=129", "tokens 129 exceeds the vocabulary"),
        ("beft:targets=q_prj", "target 'q_prj' matches no linear layer"),
        ("road:layers=1", "PEFT's road has no layers_to_transform"),
        ("beft:layers=1", "PEFT's beft has no layers_to_transform"),
    ],
)
def test_bad_options_are_refused_in_one_line(text: str, needs: str) -> None:
    """A user's slip ends in one line that says what would be right."""
    with pytest.raises(UserError, match=needs) as caught:
        step_of("llama", text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["gralora:r={}", "delora:r={}", "fourierft:n={}", "trainable_tokens:tokens={}"])
def test_a_grid_of_sizes_is_one_tape(method: str) -> None:
    """Dims may be arrays: a sweep over sizes equals the single runs."""
    from dataclasses import replace

    from perfmodel.prediction import memory
    from perfmodel.recording.record import build

    sizes = np.array([4, 8, 16])
    parsed: Any = methods.parse(method.format(4))
    grid = replace(parsed, **{parsed.sizes()[0]: sizes}).bind(architecture_of("llama"))
    together = memory.peak_bytes(build(architecture_of("llama"), grid, setup_of("llama")))
    assert np.array_equal(together, [memory.peak_bytes(step_of("llama", method.format(n))) for n in sizes])
