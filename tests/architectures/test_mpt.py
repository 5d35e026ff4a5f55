"""MPT as llm-foundry trains it: the tape equals its program in plain torch, call by call."""

from functools import partial
from typing import Any

import pytest
from helpers import MPT, setup_of

pytest.importorskip("transformers")

import reference_mpt as reference
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
    ("spec", "options", "changes"),
    [
        ("full", {}, {}),
        ("full", {"dtype": "fp32", "amp": "bf16", "checkpoint": "block"}, {}),
        ("full", {"amp": "bf16", "checkpoint": "block-reentrant", "grad_accum": 2}, {"attn_config": {"clip_qkv": 6.0}}),
        ("lora:r=4", {"amp": "bf16", "batch": 1}, {"attn_config": {"attn_impl": "triton"}}),
        ("lora:r=4,targets=all-linear,dropout=0.1", {"checkpoint": "block"}, {}),
        ("top_k:k=1", {}, {"use_train_metrics": False}),
        ("bitfit", {"dtype": "fp32", "amp": "bf16"}, {}),
    ],
)
def test_the_tape_equals_its_program(spec: str, options: dict[str, Any], changes: dict[str, Any]) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes; peak memory within 2 %."""
    config = Config({**MPT, **changes}, "mpt_causal_lm", "mpt")
    architecture, setup = from_config(config), setup_of("mpt_causal_lm", **{"attention": "flash2", **options})
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = reference.make(config.values, TORCH_DTYPES[setup.dtype])
    amp = TORCH_DTYPES[setup.amp] if setup.amp else None
    after = partial(model.measure, amp) if architecture.measures else lambda: None
    trace = trace_step(models.apply_method(model, method, architecture), setup, step.optimizer, after=after)
    assert counts.judge_step(Case(config, spec, setup), step, trace).differences == []


def test_the_loss_of_the_package_is_that_of_torch() -> None:
    """The stand-in has the values and gradients of PyTorch's, or the tape would be compared with another program."""
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 11), torch.tensor([3, 0, -100, 10, 5, -100])
    outcomes = []
    for function in (reference.cross_entropy, torch.nn.functional.cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, labels)
        loss.backward()
        outcomes.append((loss.detach(), leaf.grad))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [({"attention": "sdpa"}, "use flash2"), ({"seq": 4096}, "2048 learned positions; use --seq 2048 or less")],
)
def test_what_its_program_has_not_is_refused(options: dict[str, Any], complaint: str) -> None:
    """One line that names the choice that works."""
    with pytest.raises(UserError, match=complaint):
        predict("llm-foundry-mpt-7b", "full", device="h100-sxm", **{"batch": 1, "attention": "flash2", **options})


@pytest.mark.parametrize("changes", [{"no_bias": True}, {"attn_config": {"alibi": True}}, {"learned_pos_emb": False}])
def test_its_other_forms_are_refused(changes: dict[str, Any]) -> None:
    """ALiBi, rotary positions and models without biases are other programs."""
    with pytest.raises(UserError, match="is not supported"):
        from_config(Config({**MPT, **changes}, "mine.json", "mine"))
