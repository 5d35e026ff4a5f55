"""Packed documents and padding that flash-attn takes out: the tape equals transformers' program, call by call."""

from typing import Any

import pytest
from helpers import SMALL, architecture_of, config_of, setup_of

pytest.importorskip("peft")

import reference_flash_attn
from both_sides import method_of, tape_of

from perfmodel.architectures import Config, from_config
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import MIXTURES, Case

LORA = "lora:r=4,targets=all-linear,dropout=0.1"
AMP = {"dtype": "fp32", "amp": "bf16"}
PACKING = [name for name in SMALL if architecture_of(name).traits.packs]
DENSE = [name for name in SMALL if "flash2" in architecture_of(name).traits.attention and name != "qwen"]
SPARSE = [name for name in MIXTURES if name != "gpt_oss"]
MASKED = [
    ("llama", "full", {"packing": "varlen", "attention": "sdpa"}),
    ("llama", LORA, {"packing": "varlen", "attention": "eager", "checkpoint": "block", "grad_accum": 2}),
    ("qwen2", LORA, {"packing": "varlen", **AMP}),
    ("qwen3", "full", {"packing": "flat", "checkpoint": "block-reentrant"}),
    ("mistral", "lora:r=4", {"packing": "varlen", "seq": 33}),  # its window binds
    ("mistral", "full", {"packing": "varlen", "batch": 1, "seq": 9, "dtype": "fp32"}),
]  # fmt: skip
FLASH = [
    ("llama", "full", {"packing": "varlen"}),
    ("llama", LORA, {"packing": "flat", "checkpoint": "block-reentrant"}),
    ("qwen2", LORA, {"packing": "varlen", "batch": 1, "grad_accum": 2, **AMP}),
    ("qwen3", "full", {"packing": "varlen", "checkpoint": "block"}),
    ("gemma2", "lora:r=4", {"packing": "varlen"}),
    *((name, "norm", {"batch": 1 + i % 2}) for i, name in enumerate(DENSE)),
    *((name, "norm", {"batch": 1}) for name in SPARSE),
    ("llama", "full", {"padded": True}),
    ("qwen2", LORA, {"padded": True, "checkpoint": "block", **AMP}),
    ("gemma3_text", "lora:r=4", {"padded": True, "batch": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "setup"), MASKED)
def test_a_mask_of_packed_documents_is_transformers(name: str, method: str, setup: dict[str, Any]) -> None:
    """Zero tolerance, on fake tensors and real ones: found by position ids, and given to SDPA or eager attention."""
    case = Case(config_of(name), method, setup_of(name, **{"batch": 3, **setup}))
    assert counts.compare_case(case).differences == []


@pytest.mark.parametrize("name", PACKING)
def test_every_program_that_packs_makes_that_mask(name: str) -> None:
    """The trait is a promise of a model type's own forward pass."""
    case = Case(config_of(name), "norm", setup_of(name, batch=2, seq=33, packing="varlen"))
    assert counts.compare_case(case).differences == []


@pytest.mark.parametrize("name", SPARSE)
def test_mixtures_of_experts_make_that_mask(name: str) -> None:
    """As the others."""
    config = Config(MIXTURES[name], name, name)
    case = Case(config, "norm", setup_of("llama", batch=2, seq=17, packing="varlen"))
    assert counts.compare_case(case).differences == []


@pytest.mark.parametrize(("name", "method", "setup"), FLASH)
def test_what_transformers_does_around_flash_attn(name: str, method: str, setup: dict[str, Any]) -> None:
    """Its own code runs; only the package's operators are stand-ins. Packed documents have one token, as traced."""
    lengths = [1] if "packing" in setup else None
    setup_here = setup_of("llama", **{"batch": 3, "seq": 40, "lengths": lengths, **setup, "attention": "flash2"})
    config = Config(MIXTURES[name], name, name) if name in MIXTURES else config_of(name)
    case = Case(config, method, setup_here)
    step = tape_of(case, view_replay=True)
    base = models.build_model(config, Setup(attention="eager", dtype=setup_here.dtype))
    base.config._attn_implementation = "flash_attention_2"
    with reference_flash_attn.installed(1 if lengths else setup_here.seq, packed=bool(lengths)):
        model = models.apply_method(base, method_of(case), from_config(config))
        trace = trace_step(model, setup_here, step.optimizer)
    assert counts.judge_step(case, step, trace).differences == []
