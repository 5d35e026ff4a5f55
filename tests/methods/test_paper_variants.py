"""The works around the paper: the tape equals a reference program, and FLOPs equal the closed form of each paper."""

from collections import Counter
from typing import Any

import pytest
from closed_forms import LAYERS, LINEARS, R, T, adapted_flops, flops_of, products, recorded
from helpers import architecture_of, config_of, setup_of, step_of
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

import reference_beam
import reference_papers
import torch
from reference import differences

from perfmodel import methods
from perfmodel.calls import costs
from perfmodel.errors import UserError
from perfmodel.methods.parts.periodic import PeriodicOps
from perfmodel.methods.xgblora import XgbLora
from perfmodel.recording.step import Step
from perfmodel.tracing.programs import models, references
from perfmodel.tracing.trace import Signature, signature
from validate.oracle import counts

SPECS = (
    "rolora:r=4,round=A",
    "rolora:r=4,round=B",
    "cola:r=4",
    "xgblora:blocks=2",
    "gelora:ranks=4+1+2",
    "beamlora:r=4",
    "s2ft:heads=0.1,channels=0.05",
)


def specs_of(name: str) -> list[str]:
    return [s for s in SPECS if not (name == "gpt2" and s.startswith(NOT_ON_CONV1D))]


NOT_ON_CONV1D = ("s2ft",)
CASES = [
    (name, spec, dtype, batch)
    for name, dtype, batch in (("llama", "bf16", 4), ("llama", "fp32", 1), ("gpt2", "bf16", 1))
    for spec in specs_of(name)
]


@pytest.mark.parametrize(("name", "spec", "dtype", "batch"), CASES)
def test_the_tape_equals_the_reference(name: str, spec: str, dtype: str, batch: int) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes, parameters; peak memory within 2 %."""
    assert differences(name, spec, dtype=dtype, batch=batch) == []


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("opt", "beamlora:r=3,targets=all-linear,dropout=0.1", {"dtype": "fp32", "amp": "bf16", "grad_accum": 2}),
        ("llama", "s2ft:heads=0.2,targets=q_proj+v_proj+up_proj+down_proj", {"checkpoint": "block"}),
        ("qwen2", "s2ft:heads=0.2,channels=0.2,targets=v_proj+down_proj", {"checkpoint": "block-reentrant"}),
        ("llama", "rolora:r=3,round=A,targets=all-linear,dropout=0.1", {"checkpoint": "block"}),
        ("gpt2", "xgblora:r=2,blocks=1,targets=c_attn+c_fc", {"dtype": "fp32", "amp": "bf16"}),
        ("opt", "gelora:ranks=2+2+5,targets=q_proj+fc1,dropout=0.1", {"grad_accum": 2}),
    ],
)
def test_the_tape_equals_the_reference_in_the_corners(name: str, spec: str, options: dict[str, Any]) -> None:
    """Frozen factors under checkpointing, few blocks under autocast, ranks of their own in further micro-batches."""
    assert differences(name, spec, **options) == []


# besides the steps


def periodic_calls(work: PeriodicOps, *, without: tuple[str, ...] = ()) -> Counter[Signature]:
    """The tape's calls of periodic work, as the recorder counts real ones."""
    calls: Counter[Signature] = Counter()
    for part in work.group.parts:
        for op in part.ops:
            if not op.view and part.name not in without:
                shapes = ([(s.dtype, s.shape) for s in specs] for specs in (op.inputs, op.outputs))
                calls[signature(op.name, *shapes)] += part.repeat
    return calls


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", "cola:r=4,targets=all-linear"),
        ("gpt2", "cola:r=4"),
        ("llama", "xgblora:blocks=2"),
    ],
)
def test_merge_and_restart_are_those_of_peft(name: str, spec: str, dtype: str) -> None:
    """Chain of LoRA and XGBLoRA go on from merged weights: peft's own merge and start, call by call."""
    architecture, setup = architecture_of(name), setup_of(name, dtype=dtype)
    method = methods.parse(spec).bind(architecture)
    model = references.apply_reference(models.build_model(config_of(name), setup), method, architecture, setup)
    real = reference_papers.calls_of(model, lambda: reference_papers.merge_and_restart(model))
    (work,) = step_of(name, spec, device="cpu", dtype=dtype).periodic
    assert periodic_calls(work, without=("optimizer state",)) == real


def flops_besides(step: Step) -> int:
    (work,) = step.periodic
    return sum(p.repeat * costs.flops(op) for p in work.group.parts for op in p.ops)


def test_a_merge_costs_2nmr_flops_in_every_adapted_layer() -> None:
    """Chain of LoRA merges all layers after a phase, XGBLoRA those of its booster."""
    every = [(n, m) for n, m, _ in products("llama")]
    assert flops_besides(recorded("llama", f"cola:r={R},targets=all-linear")) == sum(2 * n * m * R for n, m in every)
    some = flops_besides(recorded("llama", "xgblora:blocks=2,targets=all-linear"))
    assert some == sum(2 * n * m for n, m in every) * 2 // LAYERS


@pytest.mark.parametrize("niter", [0, 3])
@pytest.mark.parametrize(("name", "dtype"), [("llama", "bf16"), ("gpt2", "fp32")])
def test_the_start_of_pissa_is_that_of_peft(name: str, dtype: str, niter: int) -> None:
    """Call by call: a whole SVD of every target, or a few power iterations; it comes once, and in no step."""
    architecture, setup = architecture_of(name), setup_of(name, dtype=dtype)
    method = methods.parse(f"pissa:r=4,niter={niter},targets=all-linear").bind(architecture)
    model = models.apply_method(models.build_model(config_of(name), setup), method, architecture)
    start = f"pissa_niter_{niter}" if niter else "pissa"
    real = reference_papers.calls_of(model, lambda: reference_papers.decompose(model, start))
    step = step_of(name, method, device="cpu", dtype=dtype)
    (work,) = step.periodic
    assert work.every is None
    assert periodic_calls(work) == real
    lora = step_of(name, "lora:r=4,targets=all-linear", device="cpu", dtype=dtype)
    assert counts.tape_calls(step) == counts.tape_calls(lora)


def test_two_nn_is_the_reference() -> None:
    """The estimator of GeLoRA's pre-pass: right on points of known dimension, and recorded call by call."""
    torch.manual_seed(0)
    plane = torch.rand(2000, 2) @ torch.randn(2, 30)
    assert float(reference_papers.two_nn(plane.double())) == pytest.approx(2, rel=0.1)
    real = reference_papers.calls_of(torch.nn.Module(), lambda: reference_papers.two_nn(torch.rand(1024, 64)))
    real = Counter({call: n for call, n in real.items() if call[0] not in ("rand", "detach")})
    (work,) = step_of("llama", "gelora").periodic
    tape = periodic_calls(work, without=tuple(p.name for p in work.group.parts if p.name != "intrinsic dimension"))
    assert tape == Counter({call: n * (LAYERS + 1) for call, n in real.items()})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_pre_pass_of_gelora_is_a_forward_pass_of_the_samples(name: str) -> None:
    """2·P·N·s and the products of TwoNN, 2·N²·d for every hidden state; nothing of it in the step."""
    step, width, samples = step_of(name, "gelora:samples=24", seq=17), 64, 24
    frozen = step_of(name, "full", batch=samples, seq=17)
    forward = sum(t * costs.flops(op) for part, op, t in frozen.ops() if part.phase == "forward")
    assert flops_besides(step) == forward + (frozen.architecture.layers + 1) * 2 * samples**2 * width


def test_the_replacement_of_ranks_equals_the_reference() -> None:
    """Every layer's gate is scored, all scores are sorted, and half of the ranks move with their moments."""
    architecture, setup = architecture_of("llama"), setup_of("llama")
    method = methods.parse("beamlora:r=5").bind(architecture)
    model = references.apply_reference(models.build_model(config_of("llama"), setup), method, architecture, setup)
    real = reference_papers.calls_of(model, lambda: reference_beam.replace_ranks(model))
    real = Counter({call: n for call, n in real.items() if not call[0].startswith("empty")})
    copy, replacement = step_of("llama", "beamlora:r=5", device="cpu").periodic
    assert periodic_calls(replacement) == real
    assert (copy.every, replacement.every) == (3000, 3000)


@pytest.mark.parametrize("columns", [True, False])
def test_the_slices_of_s2ft_get_the_gradient_of_the_weight(columns: bool) -> None:
    """The reference's own backward against autograd's, where it trains columns and where rows."""
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (5, 6), (5,)))
    trained = (w[:, :2] if columns else w[:2]).detach().requires_grad_()
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    grad_x, grad_w = torch.autograd.grad(torch.nn.functional.linear(x, w, b), (x, w), g)
    y = reference_papers.SlicedLinear.apply(x, w.detach(), trained, b.detach())
    found_x, found = torch.autograd.grad(y, (x, trained), g)
    assert torch.allclose(found_x, grad_x)
    assert torch.allclose(found, grad_w[:, :2] if columns else grad_w[:2])


# closed forms


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_rolora_are_the_closed_form(name: str) -> None:
    """4Tnm + 6Tr(n+m), less 2Tnr without dA in a round of B, less 2Tmr without dB in a round of A."""
    lora = lambda n, m, needed: 2 * T * m * R + (2 * T * m * R + 2 * T * n * R) + 2 * T * n * R * needed  # noqa: E731
    forward = lambda n, m: 2 * T * R * (n + m)  # noqa: E731
    round_a = adapted_flops(name, forward, lambda n, m, needed: lora(n, m, needed) - 2 * T * m * R)
    assert flops_of(recorded(name, f"rolora:r={R},round=A,targets=all-linear")) == round_a
    # a round of B asks for the gradient of xAᵀ only where the input needs one
    round_b = adapted_flops(name, forward, lambda n, m, needed: 2 * T * m * R + 2 * T * R * (n + m) * needed)
    assert flops_of(recorded(name, f"rolora:r={R},round=B,targets=all-linear")) == round_b


def test_flops_of_s2ft_are_the_closed_form() -> None:
    """4Tnm + 2Tmw where w input columns train, + 2Twn where w output rows do; nothing else beside the frozen model."""
    step = recorded("llama", "s2ft:heads=0.25,channels=0.125,targets=all-linear")
    attention, read = (0, 1, 2, 3), (3, 6)  # of q, k, v, o, gate, up, down; o and down read the chosen ones
    extra = []
    for i, (n, m) in enumerate(LINEARS["llama"][0]):
        share = 0.25 if i in attention else 0.125
        extra.append(2 * T * m * int(share * n) if i in read else 2 * T * int(share * m) * n)
    frozen = adapted_flops("llama", lambda n, m: 0, lambda n, m, needed: 0)
    assert flops_of(step) == (frozen[0], frozen[1] + LAYERS * sum(extra))
    assert step.trainable == LAYERS * sum(extra) // (2 * T)
    assert step.total == step_of("llama", "full").total


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_beamlora_are_those_of_lora(name: str) -> None:
    """The gate is elementwise: no product, and r more parameters a layer."""
    beam, lora = (recorded(name, f"{m}:r={R},targets=all-linear") for m in ("beamlora", "lora"))
    assert flops_of(beam) == flops_of(lora)
    assert beam.trainable - lora.trainable == R * len(products(name))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_gelora_are_those_of_lora_with_each_blocks_rank(name: str) -> None:
    """Σ over blocks of 6T·r_i·(n+m) beside the frozen model, less what the first block's inputs do not need."""
    ranks = (5, 1, 3)
    step = recorded(name, "gelora:ranks=5+1+3,targets=all-linear")
    layers = len(products(name)) // LAYERS
    extra = sum(
        ranks[i // layers] * (6 * T * (n + m) - 2 * T * n * (not needed))
        for i, (n, m, needed) in enumerate(products(name))
    )
    frozen = adapted_flops(name, lambda n, m: 0, lambda n, m, needed: 0)
    assert sum(flops_of(step)) == sum(frozen) + extra


def test_flops_of_xgblora_are_lora_of_rank_1_above_the_lowest_block_drawn() -> None:
    """4PT + 6T·Σ(n+m) over the blocks drawn; backward stops at the lowest of them."""
    full = flops_of(recorded("llama", "top_k:k=2,inner=lora,r=1,targets=all-linear"))
    assert flops_of(recorded("llama", "xgblora:blocks=2,targets=all-linear"))[0] == full[0]
    one = flops_of(recorded("llama", "lora:r=1,targets=all-linear,layers=1"))
    assert flops_of(recorded("llama", "xgblora:blocks=1,targets=all-linear")) == one


@given(layers=st.integers(1, 100), data=st.data())
def test_a_draw_has_as_many_blocks_as_asked_for(layers: int, data: Any) -> None:
    """Blocks at rounded places must not fall onto each other, and the lowest lies where draws put it on average."""
    n = data.draw(st.integers(1, layers))
    method = XgbLora(blocks=n, architecture=architecture_of("llama", layers))
    assert len(set(method.drawn)) == n
    assert set(method.drawn) <= set(range(layers))
    assert abs(method.drawn[0] + 1 - (layers + 1) / (n + 1)) <= 0.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rolora:round=C", "method rolora: round 'C' is unknown: use A or B"),
        ("cola:phase=0", "method cola: phase must be from 1"),
        ("lora:alpha=nan", "method lora: alpha must be a number, got 'nan'"),
        ("paca:adapter_dtype=x", "method paca: adapter_dtype 'x' is unknown"),
        ("top_k:k=1,targets=nonsense", "method top_k: targets goes with inner=lora"),
        ("top_k:k=1,r=4", "method top_k: r goes with inner=lora"),
        ("xgblora:blocks=4", "method xgblora: blocks 4 exceeds the 3 blocks"),
        ("xgblora:blocks=0", "method xgblora: blocks must be from 1"),
        ("xgblora:layers=1", "method xgblora: its blocks are drawn"),
        ("gelora:ranks=2+2", "method gelora: ranks names 2 blocks, llama has 3"),
        ("gelora:ranks=2+0+1", "method gelora: ranks must be from 1"),
        ("gelora:ranks=2+x+1", "method gelora: ranks takes numbers joined by +, got 'x'"),
        ("s2ft:heads=0", "method s2ft: heads must be above 0"),
        ("s2ft:channels=1.5", "method s2ft: channels must be above 0 and at most 1"),
        ("s2ft:adapter_dtype=fp32", "method s2ft: its slices are part of the weights"),
        ("pissa:niter=-1", "method pissa: niter must be from 0"),
        ("beamlora:interval=0", "method beamlora: interval must be from 1"),
        ("gelora:targets=lm_head", "method gelora: ranks belong to blocks"),
        ("gelora:r=33", "method gelora: rank 33 exceeds the width 32"),
    ],
)
def test_bad_options_are_refused_in_one_line(spec: str, message: str) -> None:
    """The user learns what is wrong with their method, by its own name."""
    with pytest.raises(UserError) as caught:
        recorded("llama", spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_s2ft_refuses_what_its_layers_cannot_do() -> None:
    """Its authors' layers replace nn.Linear, overwrite their gradient, and know no autocast."""
    with pytest.raises(UserError, match="Conv1D"):
        recorded("gpt2", "s2ft")
    with pytest.raises(UserError, match="grad-accum"):
        recorded("llama", "s2ft", grad_accum=2)
    with pytest.raises(UserError, match="autocast"):
        recorded("llama", "s2ft", dtype="fp32", amp="bf16")
    with pytest.raises(UserError, match="loose rows"):
        recorded("opt", "s2ft:targets=fc2")


def test_the_samples_of_geloras_pre_pass_are_not_packed() -> None:
    """A packed step's rows are one; the pre-pass takes eight as they are."""
    plain, packed = (
        step_of("llama", "gelora", attention="flash2", packing=kind).periodic[0].group for kind in ("none", "flat")
    )
    assert [(op.name, op.inputs) for part in packed.parts for op in part.ops] == [
        (op.name, op.inputs) for part in plain.parts for op in part.ops
    ]
