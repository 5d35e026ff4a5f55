"""Fused and quantised implementations: the tape equals a reference program, call by call."""

from typing import Any

import numpy as np
import pytest
from helpers import architecture_of, by_phase, calls_by_name, config_of, setup_of, step_of

pytest.importorskip("transformers")

import reference_fused as reference
import reference_lora
import torch

from perfmodel import methods, predict
from perfmodel.architectures import from_config, load
from perfmodel.errors import UserError
from perfmodel.methods.lora import Lora
from perfmodel.methods.parts.quantised import QuantisedLora
from perfmodel.prediction import memory
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tracing.programs import low_bit, models
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import Case


def differences(name: str, spec: str, layers: int | None = None, **options: Any) -> list[str]:
    """What tape and reference program disagree about."""
    config, architecture, setup = config_of(name, layers), architecture_of(name, layers), setup_of(name, **options)
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = models.build_model(config, setup)
    assert isinstance(method, QuantisedLora)
    model = reference.quantise(model, method, architecture, setup)
    total = reference.elements(model)
    trace = trace_step(model, setup, step.optimizer)
    trace.total = total
    result = counts.judge_step(Case(config, spec, setup), step, trace)
    assert result.flops > 0
    return result.differences


def fused_differences(name: str, spec: str, **options: Any) -> list[str]:
    """The same for the implementations of LoRA, on peft's model."""
    config, architecture = config_of(name), architecture_of(name)
    setup, method = setup_of(name, **options), methods.parse(spec).bind(architecture)
    assert isinstance(method, Lora)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = models.build_model(config, setup)
    if isinstance(method, QuantisedLora):
        model = reference.quantise(model, method, architecture, setup)
    else:
        model = models.apply_method(model, method, architecture)
    total = reference.elements(model)
    trace = trace_step(reference_lora.patch(model, method.implementation), setup, step.optimizer)
    trace.total = total
    return counts.judge_step(Case(config, spec, setup), step, trace).differences


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "lora:r=4,targets=all-linear,dropout=0.1,implementation=lorafusion,adapter_dtype=bf16", {"batch": 4}),
        ("llama", "lora:r=4,implementation=lorafusion,adapter_dtype=bf16", {"checkpoint": "block"}),
        ("qwen2", "lora:r=4,targets=all-linear,implementation=lorafusion", {"dtype": "fp32", "batch": 1}),
        ("llama", "lora:r=4,targets=all-linear,implementation=unsloth", {"batch": 4}),
        ("mistral", "lora:r=4,targets=all-linear,implementation=unsloth,adapter_dtype=bf16", {"checkpoint": "block"}),
        ("llama", "lora:r=4,targets=all-linear,implementation=unsloth", {"checkpoint": "block-reentrant", "batch": 1}),
        ("qwen2", "lora:r=4,targets=all-linear,implementation=unsloth", {"grad_accum": 2}),
        ("llama", "lora:r=4,targets=q_proj+v_proj+o_proj,implementation=unsloth", {"dtype": "fp32"}),
        ("llama", "lora:r=4,targets=all-linear,dropout=0.1,implementation=unsloth", {}),
        ("llama", "qlora:r=4,targets=all-linear,implementation=unsloth", {"batch": 4}),
        ("mistral", "qlora:r=4,targets=all-linear,implementation=unsloth", {"checkpoint": "block-reentrant"}),
        ("qwen2", "qlora:r=4,targets=all-linear,implementation=unsloth", {"dtype": "bf16", "amp": "bf16"}),
    ],
)
def test_fused_lora_equals_its_program(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance; where Unsloth's conditions do not hold, peft's own forward runs, there and here."""
    assert fused_differences(name, spec, **options) == []


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "qlora:r=4", {"batch": 4}),
        ("llama", "qlora:r=4,double_quant=false,dropout=0.1", {"checkpoint": "block"}),
        ("llama", "qlora:r=4,prepared=true", {"dtype": "bf16", "amp": "bf16", "checkpoint": "block-reentrant"}),
        ("qwen2", "qlora:r=4,targets=all-linear,adapter_dtype=bf16", {"batch": 1}),
        ("llama", "qlora:r=4,quant_storage=bf16", {"checkpoint": "block"}),
        ("qwen2", "qlora:r=4,quant_storage=fp32,prepared=true", {"dtype": "bf16", "amp": "bf16"}),
        ("gpt2", "qlora:r=4", {"grad_accum": 2}),
        ("gpt2", "qlora:r=4,prepared=true,compute_dtype=bf16", {}),
        ("opt", "qlora:r=4,targets=all-linear,layers_to_transform=1,compute_dtype=fp32", {"checkpoint": "block"}),
        ("bert", "qlora:r=4", {"dtype": "fp32", "batch": 4}),
    ],
)
def test_qlora_equals_the_reference(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls, FLOPs, bytes, parameters; peft's own 4-bit layer runs, on stand-ins of bitsandbytes."""
    assert differences(name, spec, **options) == []


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "lora_gptq:r=4", {"batch": 4}),
        ("llama", "lora_gptq:r=4,bits=3,group_size=32,dropout=0.1", {"checkpoint": "block"}),
        ("llama", "lora_gptq:r=4,bits=8", {"amp": "bf16", "checkpoint": "block-reentrant"}),
        ("qwen2", "lora_gptq:r=4,targets=all-linear,adapter_dtype=bf16", {"batch": 1}),
        ("qwen2", "lora_gptq:r=4,bits=2", {"dtype": "fp16", "amp": "fp16", "grad_accum": 2}),
        ("gpt2", "lora_gptq:r=4", {"dtype": "fp32"}),
    ],
)
def test_lora_on_a_gptq_base_equals_the_reference(name: str, spec: str, options: dict[str, Any]) -> None:
    """Autograd keeps the unpacked weight, so that such a base saves little memory without checkpoints."""
    assert differences(name, spec, **options) == []


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "lora_8bit:r=4", {"batch": 4}),
        ("llama", "lora_8bit:r=4,outliers=0,dropout=0.1", {"checkpoint": "block"}),
        ("llama", "lora_8bit:r=4,prepared=true", {"dtype": "bf16", "amp": "bf16", "checkpoint": "block-reentrant"}),
        ("qwen2", "lora_8bit:r=4,targets=all-linear,adapter_dtype=bf16", {"batch": 1}),
        ("gpt2", "lora_8bit:r=4", {"grad_accum": 2, "dtype": "fp16"}),
        ("opt", "lora_8bit:r=4,targets=all-linear,layers_to_transform=1,prepared=true", {"checkpoint": "block"}),
        ("bert", "lora_8bit:r=4", {"dtype": "fp32", "batch": 4}),
    ],
)
def test_lora_on_an_8_bit_base_equals_the_reference(name: str, spec: str, options: dict[str, Any]) -> None:
    """One in ten of the configs that people share loads their base in 8 bit, where forward is dozens of small calls."""
    assert differences(name, spec, **options) == []


def test_the_reference_of_qlora_computes_with_the_dequantised_weight() -> None:
    """The hand-written backward of the 4-bit layer gives what autograd gives on the dequantised weight."""
    base = torch.nn.Linear(128, 64)
    layer = low_bit.Linear4bit(base, torch.float32, double_quant=True)
    layer.weight.data = torch.randint(0, 256, layer.weight.shape, dtype=torch.uint8)
    layer.absmax.data = torch.randint(0, 256, layer.absmax.shape, dtype=torch.uint8)
    for scale in (layer.nested_absmax, layer.nested_quant_map, layer.offset):
        torch.nn.init.uniform_(scale, 0.5, 1.0)
    x = torch.randn(2, 3, 128, requires_grad=True)
    weight = low_bit.dequantized(layer.weight, layer.quant_state)
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


@pytest.mark.parametrize("storage", ["bf16", "fp16", "fp32"])
def test_a_storage_dtype_packs_as_many_bytes(storage: str) -> None:
    """FSDP shards tensors of one dtype only, so FSDP-QLoRA holds packed values in that of the rest: no byte more."""
    plain, other = (step_of("llama", f"qlora:r=4,quant_storage={dtype}") for dtype in ("u8", storage))
    assert other.weight_bytes == plain.weight_bytes
    assert memory.peak_bytes(other) == memory.peak_bytes(plain)
    assert (other.total, other.trainable) == (plain.total, plain.trainable)
    name = "bitsandbytes::dequantize_4bit"
    read = {op.inputs[0].dtype for _, op, _ in other.ops() if op.name == name}
    assert read == {storage}


def test_weights_are_dequantised_in_forward_backward_and_recompute() -> None:
    """Twice a linear layer without checkpointing (but for inputs that need no gradient), three times with it."""
    op = "bitsandbytes::dequantize_4bit"
    plain, again = step_of("llama", "qlora:r=2"), step_of("llama", "qlora:r=2", checkpoint="block")
    assert calls_by_name(plain, "forward")[op] == calls_by_name(again, "forward")[op] == 3 * 7
    assert calls_by_name(plain, "backward")[op] == 3 * 7 - 3  # q, k, v of the first block read the embedding
    recomputed = 3 * 6  # not down_proj, the last of a block: its output is saved by nobody
    assert calls_by_name(again, "backward")[op] == 3 * 7 + recomputed


def test_a_gptq_base_is_small_but_its_graph_holds_it_unpacked() -> None:
    """What autograd keeps of the weights is as large as they would be without codes, unless blocks are recomputed."""
    asked: dict[str, Any] = {"layers": 8, "batch": 1, "seq": 17}
    plain, packed = (step_of("llama", f"{name}:r=4,adapter_dtype=bf16", **asked) for name in ("lora", "lora_gptq"))
    assert by_phase(plain) == by_phase(packed)
    assert plain.total == packed.total
    saved = plain.weight_bytes - packed.weight_bytes
    assert saved > 0
    assert memory.peak_bytes(packed) > memory.peak_bytes(plain)
    again = step_of("llama", "lora_gptq:r=4,adapter_dtype=bf16", checkpoint="block", **asked)
    assert memory.peak_bytes(again) < memory.peak_bytes(packed) - 0.5 * saved


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("bits=5", "bits 5 is not modelled: use 2, 3, 4, 8"),
        ("prepared=true", "peft's preparation upcasts nothing"),
    ],
)
def test_what_gptq_has_not_is_refused(options: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        predict("llama-3.2-1b", f"lora_gptq:{options}", device="l40s")


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


# implementations of LoRA


def lora_weights(n: int, m: int, r: int) -> list[torch.Tensor]:
    """W (m, n), A (r, n) and B (m, r)."""
    return [torch.randn(s, dtype=torch.float64) for s in ((m, n), (r, n), (m, r))]


def whole(*weights: torch.Tensor) -> list[Any]:
    """The same with None behind each W, which is not packed."""
    return [w for i in range(0, len(weights), 3) for w in (weights[i], None, *weights[i + 1 : i + 3])]


def with_lora(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x(W + 2BA)ᵀ."""
    return x @ w.T + 2 * (x @ a.T @ b.T)


def check_gradients(fused: Any, plain: Any, x: torch.Tensor, *weights: torch.Tensor) -> None:
    """Outputs and gradients of x and of the adapters (every weight but the first of three) agree."""
    trained = [i for i in range(len(weights)) if i % 3]
    results = []
    for function in (fused, plain):
        leaf = x.clone().requires_grad_()
        given = [w.clone().requires_grad_(i in trained) for i, w in enumerate(weights)]
        y = function(leaf * 1.0, *given)  # an x that may be written over
        y = torch.cat(y, -1) if isinstance(y, tuple) else y
        torch.manual_seed(0)
        kept, grads = y.detach().clone(), [leaf, *(given[i] for i in trained)]
        results.append([kept, *torch.autograd.grad(y, grads, torch.randn_like(y))])
    assert all(torch.allclose(one, other) for one, other in zip(*results, strict=True))


def test_the_references_of_fused_lora_compute_lora() -> None:
    """In-place products and reordered gradients are those that autograd gives on x(W + sBA)ᵀ."""
    x, one = torch.randn(2, 3, 6, dtype=torch.float64), lora_weights(6, 5, 2)
    check_gradients(lambda x, *w: reference_lora.LoraW.apply(x, 2.0, *whole(*w)), with_lora, x, *one)
    check_gradients(lambda x, *w: reference_lora.FusedLinearLoRA.apply(x, *w, 2.0, 0.0, None), with_lora, x, *one)
    three = [w for m in (6, 4, 4) for w in lora_weights(6, m, 2)]

    def three_products(x: torch.Tensor, *w: torch.Tensor) -> Any:
        return tuple(with_lora(x, *w[i : i + 3]) for i in (0, 3, 6))

    check_gradients(lambda x, *w: reference_lora.LoraQkv.apply(x, 2.0, *whole(*w)), three_products, x, *three)
    mlp = [*lora_weights(6, 8, 2), *lora_weights(6, 8, 2), *lora_weights(8, 6, 2)]

    def swiglu(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return with_lora(torch.nn.functional.silu(with_lora(x, *w[:3])) * with_lora(x, *w[3:6]), *w[6:])

    check_gradients(lambda x, *w: reference_lora.LoraMlp.apply(x, 2.0, *whole(*w)), swiglu, x, *mlp)


def test_flops_of_the_implementations_are_the_closed_form() -> None:
    """Beyond the base: PEFT and LoRAFusion 6Tr(n+m) a linear, Unsloth 8Tr(n+m): it computes xAᵀ and dy·B twice."""
    r, tokens, specs = 3, 2 * 17, "lora:r=3,targets=all-linear,adapter_dtype=bf16,implementation="
    found = {i: by_phase(step_of("llama", specs + i)) for i in ("peft", "unsloth", "lorafusion")}
    assert found["peft"] == found["lorafusion"]
    assert found["unsloth"]["forward"] == found["peft"]["forward"]
    linears = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    twice = 3 * sum(2 * tokens * r * (n + m) for n, m in linears)
    # autograd leaves out the gradient of the first block's input, a Function does not
    unasked = sum(2 * tokens * n * (m + r) for n, m in linears[:3])
    assert found["unsloth"]["backward"] - found["peft"]["backward"] == twice + unasked


@pytest.mark.parametrize("implementation", ["unsloth", "lorafusion"])
def test_fused_lora_moves_less_and_is_no_slower(implementation: str) -> None:
    """The point of fusing: fewer kernels and bytes than PEFT in eager mode, and never more time on a large model."""
    spec = "lora:r=16,targets=all-linear,adapter_dtype=bf16,implementation="
    setup = {"device": "h100-sxm", "batch": 4, "seq": 1024}
    eager, fused = (predict("llama-3-8b", spec + i, **setup) for i in ("peft", implementation))
    assert fused.kernels["total"] < eager.kernels["total"]
    assert fused.bytes["total"] < eager.bytes["total"]
    assert fused.time.phases["total"] < eager.time.phases["total"]
    assert fused.memory.peak <= eager.memory.peak
    assert fused.trainable_params == eager.trainable_params


@pytest.mark.parametrize(
    ("model", "spec", "message"),
    [
        ("llama", "lora:implementation=unslot", "implementation 'unslot' is unknown: did you mean 'unsloth'"),
        ("gpt2", "lora:implementation=unsloth", "unsloth is not written for gpt2; use implementation=peft"),
        ("llama", "dora:implementation=unsloth", "method dora: implementation 'unsloth' is unknown"),
        ("llama", "lora:implementation=lorafusion,adapter_dtype=fp32", "adapter_dtype must be the base's, bf16"),
    ],
)
def test_implementations_that_do_not_fit_are_refused(model: str, spec: str, message: str) -> None:
    """One line that says why and what to use."""
    with pytest.raises(UserError, match=message):
        step_of(model, spec)


@pytest.mark.parametrize(
    ("model", "targets", "why"),
    [
        ("qwen2.5-0.5b", "q_proj+k_proj+v_proj", "no layers with biases"),
        ("qwen2.5-0.5b", "all-linear", ""),
        ("llama-3.2-1b", "q_proj+v_proj", "would have to be targets"),
    ],
)
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_an_implementation_that_fuses_nothing_is_said_to(name: str, model: str, targets: str, why: str) -> None:
    """What is answered then is peft's program, buffers and all."""
    asked = f"{name}:targets={targets}"
    fused, eager = (predict(model, spec, device="l40s", seq=64) for spec in (f"{asked},implementation=unsloth", asked))
    told = [note for note in fused.notes if "fuses nothing" in note]
    assert [why in note for note in told] == [True] * bool(why)
    same = (fused.kernels, fused.memory.peak) == (eager.kernels, eager.memory.peak)
    assert same == bool(why)
