"""Bases in 4 bit beside QLoRA's: a mixture's experts, dequantised whenever their block runs; OFT."""

from typing import Any

import pytest

pytest.importorskip("peft")

import peft
import reference_fused as reference
from helpers import architecture_of, config_of, setup_of
from peft.tuners.oft.layer import Linear as OftLinear
from reference import wrap

from perfmodel import methods, predict
from perfmodel.architectures import Config, from_config
from perfmodel.errors import UserError
from perfmodel.methods.parts.quantised import QuantisedLora
from perfmodel.methods.qlora import QLora
from perfmodel.methods.qoft import QOft
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models
from perfmodel.tracing.programs.dtypes import TORCH_DTYPES
from perfmodel.tracing.programs.experts import quantise_experts
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import MIXTURES, Case


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("mixtral", "qlora:r=4,experts=true", {"attention": "sdpa"}),
        ("mixtral", "qlora:r=4,experts=true", {"grad_accum": 2}),
        ("qwen3_moe", "qlora:r=4,targets=q_proj,experts=true,double_quant=false", {"checkpoint": "block"}),
        ("gpt_oss", "qlora:r=4,targets=q_proj,experts=true", {"amp": "bf16", "checkpoint": "block-reentrant"}),
        ("qwen3_moe", "qlora:r=4,targets=v_proj,layers_to_transform=2,experts=true", {"dtype": "fp32"}),
        ("deepseek_v3", "qlora:r=4,targets=kv_a_proj_with_mqa+kv_b_proj,experts=true", {"amp": "bf16"}),
        ("deepseek_v2", "qlora:r=4,targets=o_proj,experts=true", {"checkpoint": "block"}),
        ("mixtral", "lora_8bit:r=4,experts=true", {"checkpoint": "block"}),
        ("qwen3_moe", "lora_8bit:r=4,targets=q_proj,experts=true", {"amp": "bf16"}),
    ],
)
def test_the_tape_equals_axolotls_program(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: what autograd keeps of an expert's weight is the dequantised one, not the packed one."""
    config = Config(MIXTURES[name], name, name)
    architecture = from_config(config)
    method = methods.parse(spec).bind(architecture)
    setup = Setup(**{"batch": 2, "seq": 9, "attention": "eager", **options})
    step = build(architecture, method, setup, "cpu", view_replay=True)
    assert isinstance(method, QuantisedLora)
    model = reference.quantise(models.build_model(config, setup), method, architecture, setup)
    bits = 4 if isinstance(method, QLora) else 8
    quantise_experts(model, bits=bits, double_quant=getattr(method, "double_quant", True))
    trace = trace_step(model, setup, step.optimizer)
    trace.total = build(architecture, methods.parse("full").bind(architecture), setup).total + step.trainable
    assert counts.judge_step(Case(config, spec, setup), step, trace).differences == []


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "qoft:block_size=8", {"batch": 4}),
        ("qwen2", "qoft:block_size=8,targets=all-linear,double_quant=false", {"checkpoint": "block"}),
        ("opt", "qoft:block_size=16,targets=q_proj,adapter_dtype=bf16", {"grad_accum": 2}),
    ],
)
def test_oft_on_a_4_bit_base_equals_pefts_layer(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: peft's own layer of OFT runs, on stand-ins of bitsandbytes."""
    config, architecture, setup = config_of(name), architecture_of(name), setup_of(name, **options)
    method = methods.parse(spec).bind(architecture)
    assert isinstance(method, QOft)

    def pack(base: Any) -> Any:
        return reference.Linear4bit(base, TORCH_DTYPES[setup.dtype], double_quant=method.double_quant)

    def adapt(base: Any) -> Any:
        made = OftLinear(base, "default", config=peft.OFTConfig(oft_block_size=method.block_size), r=0).train()
        made.oft_R.to(TORCH_DTYPES[method.adapter_dtype or "fp32"])
        return made

    model = wrap(models.build_model(config, setup), architecture, lambda name, layer: name != "lm_head", pack)
    model = reference.replace(model, reference.Linear4bit, architecture, method, adapt)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    total = reference.elements(model)
    trace = trace_step(model, setup, step.optimizer)
    trace.total = total
    assert counts.judge_step(Case(config, spec, setup), step, trace).differences == []


def test_a_mixture_fits_where_its_experts_are_packed() -> None:
    """Qwen3-30B-A3B: 29 of 30.5 billion weights are experts', in 4.13 bit instead of 16."""
    plain, packed = (
        predict("qwen3-30b-a3b", f"qlora:targets=q_proj,experts={e}", device="h100-sxm") for e in ("false", "true")
    )
    experts = 48 * 128 * 3 * 2048 * 768
    assert plain.memory.weights - packed.memory.weights == pytest.approx(experts * (2 - 4.13 / 8), rel=0.002)
    assert packed.flops == plain.flops
    assert packed.time.phases["total"] > plain.time.phases["total"]


@pytest.mark.parametrize(
    ("model", "spec", "words"),
    [
        ("llama-3.2-1b", "qlora:experts=true", "has no experts to quantise"),
        ("mixtral-8x7b", "qlora:experts=true,targets=all-linear", "adapters of quantised experts are not modelled"),
        ("falcon-7b", "lora_8bit", "transformers quantises no layer of falcon-7b"),
        ("falcon-7b", "qoft", "transformers quantises no layer of falcon-7b"),
    ],
)
def test_what_cannot_be_packed_is_refused(model: str, spec: str, words: str) -> None:
    """One line that says why."""
    with pytest.raises(UserError, match=words):
        predict(model, spec)
