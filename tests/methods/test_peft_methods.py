"""PEFT's other adapters: the tape equals the real program, and what no adapter may do.

Cells are chosen so that every method meets every precision, both attentions, checkpointing and both batch sizes. The
full product is `validate.oracle.counts.compare_case` over the same lists.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import architecture_of, config_of, setup_of, step_of

pytest.importorskip("peft")

import torch

from perfmodel import methods
from perfmodel.calls import costs
from perfmodel.errors import UserError
from perfmodel.program.op import Op
from perfmodel.recording.record import build
from perfmodel.tracing.programs import models
from validate.oracle import counts
from validate.oracle.cases import Case

ANY_MODEL = (
    "dora:r=4",
    "dora:r=4,dropout=0.1",
    "ia3",
    "vera:r=8",
    "vera:r=8,dropout=0.1",
)
LINEAR_ONLY = (  # PEFT has these for nn.Linear, not for GPT-2's Conv1D
    "loha:r=4",
    "lokr:r=2",
    "miss:r=24,dropout=0.1",
    "oft:block_size=8",
)
MIXED = {"dtype": "bf16", "amp": "bf16"}
PRECISIONS: tuple[dict[str, Any], ...] = ({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp32", "amp": "bf16"})


def cells() -> Any:
    """Each method in each precision, its two models, attention, checkpointing and batch taking turns."""
    turns = [*((("llama", "gpt2"), m) for m in ANY_MODEL), *((("llama", "opt"), m) for m in LINEAR_ONLY)]
    for i, (names, method) in enumerate(turns):
        for j, precision in enumerate(PRECISIONS):
            k, name = i + j, names[(i + j) % 2]
            setup = {"batch": (1, 4)[k // 2 % 2], "attention": ("sdpa", "eager")[k // 4 % 2], **precision}
            setup["checkpoint"] = ("none", "block")[(j + i // 2) % 2]
            yield pytest.param(name, method, setup, id=f"{name} {method} {'-'.join(map(str, setup.values()))}")
    rare: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("llama", "lora:r=4,modules_to_save=embed_tokens+lm_head", {"checkpoint": "block"}),
        ("mistral", "lora:r=4,dropout=0.1,modules_to_save=lm_head", {"dtype": "fp32", "amp": "bf16"}),
        ("llama", "dora:r=4,modules_to_save=embed_tokens,adapter_dtype=bf16", {"grad_accum": 2}),
        ("smollm3", "lora:r=4,targets=q_proj,modules_to_save=embed_tokens+lm_head", {"checkpoint": "block-reentrant"}),
        ("smollm3", "lora:r=4,targets=q_proj,modules_to_save=embed_tokens", {"grad_accum": 2}),
        ("gpt2", "lora:r=4,modules_to_save=lm_head", {"dtype": "fp32", "amp": "bf16"}),
        ("llama", "lokr:r=1,factor=4,decompose_both=true", {}),
        ("opt", "miss:r=8", {"dtype": "fp32"}),
        ("llama", "rslora:r=4", {}),
        ("llama", "adalora:r=4", {"dtype": "fp32", "amp": "bf16"}),
        ("qwen2", "adalora:r=4,delta_t=1", {"checkpoint": "block"}),  # ranks are allocated in every step
        ("gpt2", "pissa:r=4,dropout=0.1", {}),
        ("llama", "dora:r=4,targets=q_proj+down_proj,layers_to_transform=1", {}),
        ("bert", "ia3", {"dtype": "fp32"}),
        ("gpt_neo", "ia3", {}),
        ("qwen2", "vera:r=4,targets=q_proj+down_proj", {"checkpoint": "block-reentrant"}),
        ("llama", "ia3:targets=q_proj+up_proj,feedforward=up_proj,adapter_dtype=bf16", {}),
        ("gpt2", "dora:r=4,dropout=0.1,adapter_dtype=bf16,targets=all-linear", {}),
        ("qwen2", "oft:block_size=20,targets=all-linear", {"grad_accum": 2}),
        ("gpt2", "dora:r=4,dropout=0.1", {"dtype": "fp32", "amp": "bf16"}),
        ("llama", r"lora:r=4,targets=/model\.layers\.[1-9]\..*(q|up)_proj/", {"checkpoint": "block"}),
        ("qwen2", r"vera:r=4,targets=/.*\.0\.mlp\.(up|down)_proj/", {}),
        ("llama", "top_k:k=1,trained_dtype=fp32,checkpoint_frozen=false", {**MIXED, "checkpoint": "block-reentrant"}),
        ("qwen2", "top_k:k=2,trained_dtype=fp32,checkpoint_frozen=false", {**MIXED, "checkpoint": "block"}),
        ("llama", "top_k:k=2,trained_dtype=fp32", {**MIXED, "grad_accum": 2}),
        (
            "cohere",
            "loha:r=4,targets=q_proj+v_proj",
            {"dtype": "fp32", "amp": "bf16", "seq": 33, "attention": "eager", "checkpoint": "block-reentrant"},
        ),
        ("llama", "lora:r=4,targets=all-linear,layers=1", {}),  # which peft takes by names only
        ("llama", "riemannian_lora:r=4", {"grad_accum": 2}),
        ("gpt2", "riemannian_lora:r=3,adapter_dtype=bf16,targets=all-linear", {"optimizer": "adamw-fused"}),
        ("mistral", r"selected:parameters=/.*\.[12]\.mlp\..*|lm_head.*/", {"checkpoint": "block"}),
        ("gemma3_text", "selected:parameters=/.*q_norm.*|.*embed_tokens.*/", {"grad_accum": 2}),
        ("opt", "selected:parameters=/.*bias/", {"dtype": "fp32", "amp": "bf16"}),
        # OPT's MLP gets all tokens as one dim
        ("opt", "c3a:block_size=16,targets=fc1", {}),
        ("opt", "oft:block_size=8,targets=fc1+fc2", {"dtype": "fp32", "amp": "bf16"}),
        # the gradients of PEFT's throw-away parameters live as long as the loop's `loss`
        ("gpt2", "dora:r=4,dropout=0.1", {"dtype": "fp32", "grad_accum": 3}),
    )
    for name, method, setup in rare:
        yield pytest.param(name, method, {"batch": 4, **setup}, id=f"{name} {method}")


@pytest.mark.parametrize(("name", "method", "setup"), cells())
def test_the_tape_equals_the_real_program(name: str, method: str, setup: dict[str, Any]) -> None:
    """Zero tolerance: calls, FLOPs, bytes, trainable and total parameters; peak memory within 2 %."""
    result = counts.compare_case(Case(config_of(name), method, setup_of(name, **setup)))
    assert result.calls > 0
    assert result.differences == []


@pytest.mark.parametrize("method", ["lora:r=4", "vera:r=4"])
def test_the_real_adapters_have_the_dtype_that_was_asked_for(method: str) -> None:
    """PEFT knows fp32 and the base's dtype only; what VeRA's layers share is asked for as well."""
    architecture, parsed = architecture_of("llama"), methods.parse(f"{method},adapter_dtype=bf16")
    base = models.build_model(config_of("llama"), setup_of("llama", dtype="fp32"))
    adapted = models.apply_method(base, parsed.bind(architecture), architecture)
    shared = [b.dtype for name, b in adapted.named_buffers() if "vera_" in name]
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} | {*shared} == {torch.bfloat16}
    assert len(shared) == (2 if "vera" in method else 0)


@pytest.mark.parametrize("method", ANY_MODEL + LINEAR_ONLY)
def test_totals_make_sense(method: str) -> None:
    """Trainable parameters are some of all, and no part of a step runs or moves a negative amount."""
    step = step_of("llama", method)
    assert 0 < step.trainable < step.total
    for part, op, times in step.ops():
        assert times > 0
        assert op.bytes_read >= 0
        assert op.bytes_written >= 0
        assert all(np.min(d) > 0 for spec in (*op.inputs, *op.outputs) for d in spec.shape), (part.name, op)


@pytest.mark.parametrize("method", ANY_MODEL + LINEAR_ONLY)
def test_no_gradient_of_a_frozen_weight(method: str) -> None:
    """The GEMM that fine-tuning saves: nothing in backward computes a gradient as large as the frozen MLP weights."""
    step = step_of("llama", method, seq=17)
    frozen = {tuple(p.shape) for p in step.parameters if p.kind == "weight" and "mlp" in p.name}
    assert frozen
    assert not [op for part, op, _ in step.ops() if part.phase == "backward" and _weight_gradient(op, frozen)]


def _weight_gradient(op: Op, shapes: set[tuple[Any, ...]]) -> bool:
    return op.name == "mm" and op.outputs[0].shape in shapes | {(b, a) for a, b in shapes}


@pytest.mark.parametrize("method", ["rslora", "pissa"])
def test_variants_of_lora_cost_what_lora_costs(method: str) -> None:
    """They differ in a number or in where they start: the very same calls."""
    lora = [repr(op) for _, op, _ in step_of("llama", "lora:r=4").ops()]
    assert [repr(op) for _, op, _ in step_of("llama", f"{method}:r=4").ops()] == lora


def test_dora_pays_for_its_norms_in_weight_sized_passes() -> None:
    """Why DoRA is slow: n_in rows go through both factors, and the weight is cast, added to and reduced."""
    step = step_of("llama", "dora:r=4,targets=q_proj", dtype="bf16", layers=2)
    shapes = [
        op.outputs[0].shape for part, op, _ in step.ops() if part.phase == "forward" and not op.view and op.outputs
    ]
    assert shapes.count((64, 64)) >= 4  # identity, BA, its scaling, the cast and the sum of the weight


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("dora:targets=q_prj", "target 'q_prj' matches no linear layer of llama"),
        ("ia3:targets=wo", "target 'wo' matches no linear layer of llama"),
        ("vera:targets=fc9", "target 'fc9' matches no linear layer of llama"),
        ("ia3:targets=k_proj,feedforward=down_proj", "feedforward 'down_proj' is not among the targets"),
        ("ia3:layers=1", "PEFT's ia3 has no layers_to_transform"),
        ("dora:r=0", "r must be"),
        ("vera:dropout=1", "dropout must be from 0 to below 1"),
        ("loha:adapter_dtype=int8", "adapter_dtype 'int8' is unknown"),
        ("lokr:factor=0", "factor must be -1 or at least 1"),
        ("oft:layers=7", "layer 7 is outside 0-2"),
        ("oft:block_size=0", "block_size must be"),
    ],
)
def test_bad_options_are_refused_in_one_line(text: str, needs: str) -> None:
    """A user's slip ends in one line that says what would be right."""
    with pytest.raises(UserError, match=needs) as caught:
        methods.parse(text).bind(architecture_of("llama"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [*LINEAR_ONLY, "loha", "c3a:block_size=16"])
def test_what_peft_lacks_for_conv1d_is_refused(method: str) -> None:
    """PEFT stops at GPT-2's Conv1D with these; so does the model, and names what works."""
    with pytest.raises(UserError, match="Conv1D"):
        methods.parse(method).bind(architecture_of("gpt2"))


@pytest.mark.parametrize("method", ["dora:r={}", "vera:r={}", "loha:r={}", "miss:r={}"])
def test_a_grid_of_ranks_is_one_tape(method: str) -> None:
    """Dims may be arrays: a sweep over ranks equals the single runs."""
    architecture, setup = architecture_of("llama"), setup_of("llama")
    ranks = np.array([4, 8, 16])
    parsed: Any = methods.parse(method.format(4))
    grid = replace(parsed, r=ranks).bind(architecture)
    together = sum(n * costs.flops(op) for _, op, n in build(architecture, grid, setup).ops())
    single = [sum(n * costs.flops(op) for _, op, n in step_of("llama", method.format(r)).ops()) for r in ranks]
    assert np.array_equal(together, single)
