"""Axolotl's fused LoRA: the tape equals a program written from its sources, call by call, whole and in 4 bit."""

from typing import Any

import pytest
from any_setup import SMALL_MODELS
from helpers import step_of

pytest.importorskip("transformers")

import reference_axolotl
import reference_fused
import torch
from torch.nn.functional import gelu, silu

from perfmodel import methods, predict
from perfmodel.architectures import from_config
from perfmodel.architectures.config import Config
from perfmodel.errors import UserError
from perfmodel.methods.parts.quantised import QuantisedLora
from perfmodel.prediction import memory
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import Case

OF_AXOLOTL = "targets=all-linear,implementation=axolotl"
OF_ATTENTION = "targets=q_proj+k_proj+v_proj+o_proj,implementation=axolotl"
FEW_BITS = f"qlora:r=4,{OF_AXOLOTL}"
DROPPED = f"lora:r=4,dropout=0.1,{OF_AXOLOTL}"


def differences(name: str, spec: str, **options: Any) -> list[str]:
    """What tape and program disagree about."""
    config = Config(SMALL_MODELS[name], name, name)
    architecture, setup = from_config(config), Setup(**{"batch": 2, "seq": 17, **options})
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = models.build_model(config, setup)
    if isinstance(method, QuantisedLora):
        model = reference_fused.quantise(model, method, architecture, setup)
    else:
        model = models.apply_method(model, method, architecture)
    total = reference_fused.elements(model)
    trace = trace_step(reference_axolotl.patch(model), setup, step.optimizer)
    trace.total = total
    return counts.judge_step(Case(config, spec, setup), step, trace).differences


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", f"lora:r=4,{OF_AXOLOTL}", {"batch": 4}),
        ("llama", DROPPED, {"checkpoint": "block-reentrant"}),
        ("qwen2", f"lora:r=4,adapter_dtype=bf16,{OF_AXOLOTL}", {"checkpoint": "block"}),
        ("mistral", "lora:r=4,targets=q_proj+v_proj+o_proj,implementation=axolotl", {"dtype": "fp32"}),
        ("llama", f"rslora:r=4,dropout=0.1,{OF_AXOLOTL}", {"dtype": "bf16", "amp": "bf16"}),
        ("llama", FEW_BITS, {"batch": 1}),
        ("llama", f"{FEW_BITS},dropout=0.05", {"checkpoint": "block-reentrant"}),
        ("qwen2", f"{FEW_BITS},dropout=0.05", {"dtype": "bf16", "amp": "bf16"}),
        ("llama", f"{FEW_BITS},double_quant=false", {"grad_accum": 2}),
        ("llama", "qlora:r=4,targets=gate_proj+up_proj+down_proj,implementation=axolotl", {"checkpoint": "block"}),
        *((name, spec, {}) for name in ("qwen3", "gemma", "ministral3", "cohere2") for spec in (DROPPED, FEW_BITS)),
        *((name, DROPPED, {}) for name in ("gemma3_text", "granite", "smollm3", "ministral", "exaone4")),
        *((name, FEW_BITS, {}) for name in ("starcoder2", "glm", "glm4")),  # whose MLP is none that Axolotl fuses
        *((name, f"qlora:r=4,{OF_ATTENTION}", {}) for name in ("mixtral", "qwen3_moe")),
        ("gemma2", DROPPED, {"attention": "eager"}),
    ],
)
def test_axolotls_lora_equals_its_program(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls, FLOPs, bytes and what a pass keeps; most of its configs run so without asking."""
    assert differences(name, spec, **options) == []


@pytest.mark.parametrize("drops", [False, True])
def test_the_reference_of_axolotls_lora_computes_lora(drops: bool) -> None:
    """Its gradients are those of autograd on xWᵀ + s·low·AᵀBᵀ + b; a dropout here is a halving of what adapters see."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    low = x / 2 if drops else None

    def made(n: int, m: int) -> tuple[Any, list[torch.Tensor]]:
        w, bias = (torch.randn(s, dtype=torch.float64) for s in ((m, n), (m,)))
        adapters = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, n), (m, 2))]
        return (w, bias, None, 2.0), adapters

    def plain(x: Any, layer: Any, ab: Any, seen: Any) -> Any:
        (w, bias, _, s), (a, b) = layer, ab
        return x @ w.T + s * ((x if seen is None else seen) @ a.T @ b.T) + bias

    def check(fused: Any, expected: Any, leaves: list[torch.Tensor]) -> None:
        ys = [torch.cat(y, -1) if isinstance(y, tuple) else y for y in (fused, expected)]
        assert torch.allclose(*ys)
        g = torch.randn_like(ys[1])
        grads = [torch.autograd.grad(y, [x, *leaves], g, retain_graph=True) for y in ys]
        assert all(torch.allclose(one, other) for one, other in zip(*grads, strict=True))

    q, k, v, gate, up, down = (made(*size) for size in ((6, 6), (6, 4), (6, 4), (6, 8), (6, 8), (8, 6)))
    three = [w for _, ab in (q, k, v) for w in ab]
    fused = reference_axolotl.Qkv.apply(x * 1.0, low, tuple(f for f, _ in (q, k, v)), *three)
    check(fused, tuple(plain(x, *part, low) for part in (q, k, v)), three)
    check(reference_axolotl.Output.apply(x * 1.0, low, q[0], *q[1]), plain(x, *q, low), q[1])
    all_of_mlp = [w for _, ab in (gate, up, down) for w in ab]
    for name, act in (("swiglu", silu), ("geglu", gelu)):
        frozen, kernel = tuple(f for f, _ in (gate, up, down)), reference_axolotl.GATES[name]
        fused = reference_axolotl.Mlp.apply(x * 1.0, low, frozen, kernel, *all_of_mlp)
        check(fused, plain(act(plain(x, *gate, low)) * plain(x, *up, low), *down, None), all_of_mlp)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_axolotls_lora_is_faster_and_smaller_than_pefts(method: str) -> None:
    """Why it is Axolotl's default: adapters cost fewer kernels, and autograd keeps no fp32 copy of an input."""
    asked = {"device": "a100-80gb-sxm", "batch": 2, "seq": 1024, "dtype": "bf16", "amp": "bf16"}
    eager, fused = (
        predict("llama-3-8b", f"{method}:r=16,targets=all-linear,implementation={i}", **asked)
        for i in ("peft", "axolotl")
    )
    assert fused.kernels["total"] < eager.kernels["total"]
    assert fused.time.phases["total"] < eager.time.phases["total"]
    assert fused.memory.peak < eager.memory.peak
    assert fused.trainable_params == eager.trainable_params


def test_what_a_pass_keeps_does_not_depend_on_the_base() -> None:
    """Weights in 4 bit are unpacked anew for each product, so that the base is all that they save."""
    whole, packed = (step_of("llama", f"{name}:r=4,{OF_AXOLOTL}", layers=8) for name in ("lora", "qlora"))
    saved = whole.weight_bytes - packed.weight_bytes
    assert memory.peak_bytes(packed) - memory.peak_bytes(whole) < -0.5 * saved


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ("llama", "qlora:implementation=axolotl,prepared=true", "axolotl is not modelled with prepared=true"),
        ("llama", "qlora:implementation=axolotl,compute_dtype=fp16", "axolotl is not modelled with compute_dtype"),
        ("llama", "lora_8bit:implementation=axolotl", "implementation 'axolotl' is unknown"),
        ("seed_oss", "lora:implementation=axolotl", "axolotl is not written for seed_oss; use implementation=peft"),
    ],
)
def test_what_axolotls_kernels_have_not_is_refused(model: str, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        step_of(model, spec)
