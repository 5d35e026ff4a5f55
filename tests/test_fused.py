"""Fused and quantised implementations: the tape equals a reference program, call by call."""

from typing import Any

import numpy as np
import pytest
from helpers import architecture_of, by_phase, calls_by_name, config_of, setup_of, step_of

pytest.importorskip("transformers")

import reference_fused as reference
import torch

from perfmodel import memory, methods
from perfmodel.architectures import from_config, load
from perfmodel.errors import UserError
from perfmodel.setup import Setup
from perfmodel.step import build
from validate import counts, models
from validate.counts import Case
from validate.trace import trace_step


def differences(name: str, spec: str, layers: int | None = None, **options: Any) -> list[str]:
    """What tape and reference program disagree about."""
    config, architecture, setup = config_of(name, layers), architecture_of(name, layers), setup_of(name, **options)
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu")
    model = reference.quantise(models.build(config, setup), method, architecture, setup)
    total = reference.elements(model)
    trace = trace_step(model, setup, step.optimizer)
    trace.total = total
    result = counts.judge(Case(config, spec, setup), step, trace)
    assert result.flops > 0
    return result.differences


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "qlora:r=4", {"batch": 4}),
        ("llama", "qlora:r=4,double_quant=false,dropout=0.1", {"checkpoint": "block"}),
        ("llama", "qlora:r=4,prepared=true", {"dtype": "bf16", "amp": "bf16", "checkpoint": "block-reentrant"}),
        ("qwen2", "qlora:r=4,targets=all-linear,adapter_dtype=bf16", {"batch": 1}),
        ("gpt2", "qlora:r=4", {"grad_accum": 2}),
        ("gpt2", "qlora:r=4,prepared=true,compute_dtype=bf16", {}),
        ("opt", "qlora:r=4,targets=all-linear,layers_to_transform=1,compute_dtype=fp32", {"checkpoint": "block"}),
        ("bert", "qlora:r=4", {"dtype": "fp32", "batch": 4}),
    ],
)
def test_qlora_equals_the_reference(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls, FLOPs, bytes, parameters; peft's own 4-bit layer runs, on stand-ins of bitsandbytes."""
    assert differences(name, spec, **options) == []


def test_the_reference_of_qlora_computes_with_the_dequantised_weight() -> None:
    """The hand-written backward of the 4-bit layer gives what autograd gives on the dequantised weight."""
    base = torch.nn.Linear(128, 64)
    layer = reference.Linear4bit(base, torch.float32, double_quant=True)
    layer.weight.data = torch.randint(0, 256, layer.weight.shape, dtype=torch.uint8)
    layer.absmax.data = torch.randint(0, 256, layer.absmax.shape, dtype=torch.uint8)
    for scale in (layer.nested_absmax, layer.nested_quant_map, layer.offset):
        torch.nn.init.uniform_(scale, 0.5, 1.0)
    x = torch.randn(2, 3, 128, requires_grad=True)
    weight = reference.dequantized(layer.weight, layer.quant_state)
    assert weight.shape == base.weight.shape
    y, expected = layer(x), torch.nn.functional.linear(x, weight, base.bias)
    assert torch.allclose(y, expected)
    g = torch.randn_like(y)
    assert torch.allclose(*(torch.autograd.grad(out, x, g)[0] for out in (y, expected)))


@pytest.mark.parametrize(
    ("double_quant", "per_parameter"), [("true", 0.5 + 1 / 64 + 4 / 64 / 256), ("false", 0.5 + 4 / 64)]
)
def test_a_4_bit_weight_takes_half_a_byte_and_its_scales(double_quant: str, per_parameter: float) -> None:
    """0.516 B a parameter with double quantisation, 0.5625 B without; the head and the embedding stay 16-bit."""
    llama = load("llama-2-7b")
    setup = Setup(batch=1, seq=64)
    step = build(
        from_config(llama), methods.parse(f"qlora:double_quant={double_quant}").bind(from_config(llama)), setup
    )
    frozen = [p for p in step.parameters if p.kind != "adapter"]
    packed = sum(p.elements * p.count for p in frozen if p.dtype == "u8" and p.kind == "weight")
    rest = sum(p.nbytes * p.count for p in frozen if p.kind in ("norm", "embedding") or "lm_head" in p.name)
    tables = 32 * 7 * (256 * 4 + 4) if double_quant == "true" else 0
    assert packed == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert step.weight_bytes == pytest.approx(
        packed * per_parameter
        + rest
        + tables
        + sum(p.nbytes * p.count for p in step.parameters if p.kind == "adapter"),
        rel=1e-5,
    )
    assert step.total - step.trainable == 6_738_415_616  # the model's parameters, whatever they are stored in


def test_weights_are_dequantised_in_forward_backward_and_recompute() -> None:
    """Twice a linear layer without checkpointing (but for inputs that need no gradient), three times with it."""
    op = "bitsandbytes::dequantize_4bit"
    plain, again = step_of("llama", "qlora:r=2"), step_of("llama", "qlora:r=2", checkpoint="block")
    assert calls_by_name(plain, "forward")[op] == calls_by_name(again, "forward")[op] == 3 * 7
    assert calls_by_name(plain, "backward")[op] == 3 * 7 - 3  # q, k, v of the first block read the embedding
    recomputed = 3 * 6  # not down_proj, the last of a block: its output is saved by nobody
    assert calls_by_name(again, "backward")[op] == 3 * 7 + recomputed


def test_qlora_has_the_flops_of_lora_and_holds_less() -> None:
    """Dequantisation is no matrix product; the base shrinks, the activations do not grow."""
    lora, qlora = (step_of("llama", f"{name}:r=4,adapter_dtype=bf16", layers=8) for name in ("lora", "qlora"))
    assert by_phase(lora) == by_phase(qlora)
    assert lora.trainable == qlora.trainable
    saved = lora.weight_bytes - qlora.weight_bytes
    assert saved > 0
    assert memory.peak_bytes(qlora) - memory.peak_bytes(lora) < -0.5 * saved


def test_qlora_over_a_grid_gives_what_its_points_give() -> None:
    """Dims may be arrays."""
    seq = np.array([16, 40])
    points = [by_phase(step_of("llama", "qlora:r=2", seq=int(s))) for s in seq]
    grid = by_phase(step_of("llama", "qlora:r=2", seq=seq))
    for phase in ("forward", "backward"):
        assert [int(x) for x in grid[phase]] == [p[phase] for p in points]


def test_a_wrong_compute_dtype_is_refused() -> None:
    """One line that names the choices."""
    with pytest.raises(UserError, match="compute_dtype 'int8' is unknown: use bf16, fp16 or fp32"):
        methods.parse("qlora:compute_dtype=int8")
