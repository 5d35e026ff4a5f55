"""Qwen of 2023: the tape equals its program, with flash-attn's kernels and without, call by call."""

from typing import Any

import pytest
from helpers import QWEN, setup_of

pytest.importorskip("transformers")

import reference_qwen as reference
import torch

from perfmodel import methods
from perfmodel.architectures import Config, from_config
from perfmodel.errors import UserError
from perfmodel.prediction.predict import predict
from perfmodel.recording.record import build
from perfmodel.tracing.programs import models
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import Case


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("full", {"attention": "flash2"}),
        ("full", {"attention": "flash2", "checkpoint": "block-reentrant", "batch": 1, "grad_accum": 2}),
        ("lora:r=4,targets=all-linear,dropout=0.1", {"attention": "flash2", "amp": "bf16", "batch": 1}),
        ("lora:r=4,targets=c_attn", {"attention": "flash2", "checkpoint": "block-reentrant", "amp": "bf16"}),
        ("full", {}),
        ("full", {"dtype": "fp32", "checkpoint": "block"}),
        ("lora:r=4,targets=c_attn+w1", {"batch": 1}),
        ("top_k:k=1", {"attention": "flash2"}),
    ],
)
def test_the_tape_equals_its_program(spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes; peak memory within 2 %."""
    config = Config(QWEN, "qwen", "qwen")
    architecture, setup = from_config(config), setup_of("qwen", **options)
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    fused = setup.attention == "flash2"
    model = reference.make(QWEN, TORCH_DTYPES[setup.dtype], 2 * setup.seq, fused=fused)
    trace = trace_step(models.apply_method(model, method, architecture), setup, step.optimizer)
    assert counts.judge_step(Case(config, spec, setup), step, trace).differences == []


def outcome(function: Any, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient for a fixed gradient of the output."""
    leaf = start.clone().requires_grad_()
    out = function(leaf)
    (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
    return out.detach(), leaf.grad


def test_the_fused_kernels_compute_what_the_written_out_forms_do() -> None:
    """The stand-ins have the gradients that autograd gives, or the tape would be compared with another program."""
    torch.manual_seed(0)
    norms = [reference.RMSNorm(8, fused=fused) for fused in (False, True)]
    norms[1].weight.data = norms[0].weight.data = torch.randn(8)
    angles = torch.randn(1, 5, 1, 4)
    tables = [f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin)]
    rotations = [lambda t, fused=fused: reference.rotated(t, *tables, fused=fused) for fused in (False, True)]
    for forms, start in ((norms, torch.randn(2, 3, 8)), (rotations, torch.randn(2, 5, 3, 8))):
        plain, fused = (outcome(form, start) for form in forms)
        for one, other in zip(plain, fused, strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)
    assert torch.allclose(norms[0].weight.grad, norms[1].weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"attention": "eager"}, "use sdpa or flash2"),
        ({"attention": "flash2", "dtype": "fp32", "amp": "bf16"}, "use sdpa"),
        ({"kernels": "liger"}, "use kernels torch"),
        ({"seq": 1}, "use --seq 2"),
    ],
)
def test_what_its_program_has_not_is_refused(options: dict[str, Any], complaint: str) -> None:
    """One line that names the choice that works."""
    with pytest.raises(UserError, match=complaint):
        predict("qwen-1.8b", "lora:targets=c_attn", device="a100-80gb-sxm", **{"batch": 1, "seq": 256, **options})


def test_prefixes_are_refused() -> None:
    """Its program reads no cache of PEFT's form."""
    with pytest.raises(UserError, match="use prompt_tuning"):
        predict("qwen-1.8b", "prefix_tuning", device="a100-80gb-sxm", batch=1, seq=256, attention="flash2")
