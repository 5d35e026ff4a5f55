"""Methods that peft does not have: the tape equals a reference program written from the paper, call by call."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from closed_forms import ATTENTION, HEAD, LAYERS, LINEARS, R, T, adapted_flops, flops_of, recorded
from helpers import architecture_of, config_of, setup_of

pytest.importorskip("transformers")

import reference_optim
import torch
from reference import differences

from perfmodel import methods
from perfmodel.errors import UserError
from perfmodel.methods import runlora
from perfmodel.prediction import memory
from perfmodel.program.dims import MixedStructure
from perfmodel.tracing.programs import references
from validate.oracle import counts
from validate.oracle.cases import Case

PROJECTED = ("galore:r=4", "apollo:r=4")
SPECS = ("paca:r=4", "lisa:gamma=2", "badam:block=1", "runlora:r=4", "lora_fa:r=4,projected=false", *PROJECTED)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    ("name", "dtype", "batch"), [("llama", "bf16", 4), ("llama", "fp32", 1), ("gpt2", "bf16", 1), ("gpt2", "fp32", 4)]
)
def test_the_tape_equals_the_reference(name: str, spec: str, dtype: str, batch: int) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes, parameters; peak memory within 2 %."""
    assert differences(name, spec, dtype=dtype, batch=batch) == []


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "paca:r=3,layers_to_transform=1", {"checkpoint": "block"}),
        ("gpt2", "paca:r=3,targets=all-linear", {"dtype": "fp32", "amp": "bf16"}),
        ("opt", "runlora:r=3,targets=all-linear", {"grad_accum": 2}),
        ("llama", "lisa:gamma=1", {"checkpoint": "block-reentrant"}),
        ("llama", "apollo:r=1,scale_type=tensor", {"dtype": "fp32", "amp": "bf16"}),
    ],
)
def test_the_tape_equals_the_reference_in_the_corners(name: str, spec: str, options: dict[str, Any]) -> None:
    """Recomputed forwards write the columns again; autocast follows a custom Function into its backward."""
    assert differences(name, spec, **options) == []


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bf16"), ("qwen2", "fp32"), ("gpt2", "bf16"), ("qwen3", "bf16")])
def test_adam_mini_equals_the_reference(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    """Names decide which weights share a second moment; biases are Adam's."""
    monkeypatch.setitem(sys.modules, "adam_mini", SimpleNamespace(Adam_mini=reference_optim.AdamMini))
    setup = setup_of(name, dtype=dtype, optimizer="adam-mini")
    assert counts.compare_case(Case(config_of(name), "full", setup)).differences == []


@pytest.mark.parametrize("order", range(1, 9))
def test_every_order_of_runlora_equals_the_reference(order: int) -> None:
    """A linear with a bias (GPT-2) and one without (Llama) take different products in the same order."""
    name, forward = ("llama", "gpt2")[order > 4], (order - 1) % 4 + 1
    assert differences(name, f"runlora:r=4,forward={forward},backward={order}", layers=2, batch=4) == []


# the references compute what the papers say


def test_the_reference_of_paca_is_a_linear_layer_with_some_columns_trained() -> None:
    """Its hand-written backward has to give the gradients that autograd gives."""
    base, method = torch.nn.Linear(6, 5, dtype=torch.float64), methods.parse("paca:r=2,alpha=2")
    layer = references.PacaLinear(base.requires_grad_(False), method)
    torch.nn.init.normal_(layer.paca_w)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    layer(x).backward(g)
    weight = base.weight.detach().clone().requires_grad_(True)
    again = x.detach().clone().requires_grad_(True)
    torch.nn.functional.linear(again, weight, base.bias).backward(g)
    assert torch.allclose(x.grad, again.grad)
    assert torch.allclose(layer.paca_w.grad, weight.grad[:, layer.indices])
    assert torch.equal(weight[:, layer.indices], layer.paca_w)


@pytest.mark.parametrize("bias", [True, False])
def test_all_orders_of_runlora_compute_the_same(bias: bool) -> None:
    """Reordered products are equal products: y = b + xW + (xU)V and its gradients."""
    x, w, u, v, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 6), (6, 5), (6, 2), (2, 5), (5,)))
    g = torch.randn(2, 3, 5, dtype=torch.float64)
    trained = [t.requires_grad_(True) for t in (x, u, v)]
    expected = x @ w + x @ u @ v + (b if bias else 0)
    grads = torch.autograd.grad(expected, trained, g)
    for forward in range(1, 5):
        for backward in range(1, 9):
            y = references.RunLoraModule.apply(x, w, u, v, b if bias else None, forward, backward)
            assert torch.allclose(y, expected)
            found = torch.autograd.grad(y, trained, g)
            assert all(torch.allclose(one, other) for one, other in zip(found, grads, strict=True))


# closed forms

INPUT_GRADIENT = {  # of RunLoRA, by backward order, beyond 2·T·n·m
    **dict.fromkeys((1, 2), lambda n, m: 2 * T * n * R),
    **dict.fromkeys((3, 6), lambda n, m: 2 * T * R * (n + m)),
    **dict.fromkeys((4, 5, 7, 8), lambda n, m: 2 * n * m * R),
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_adapters_are_the_closed_form(name: str) -> None:
    """PaCA: 4Tnm + 2Tmr. LoRA-FA: LoRA without dA. No weight-gradient GEMM beside them, or the sums would not fit."""
    paca = adapted_flops(name, lambda n, m: 0, lambda n, m, needed: 2 * T * m * R)
    assert flops_of(recorded(name, f"paca:r={R},targets=all-linear")) == paca
    lora_fa = adapted_flops(
        name, lambda n, m: 2 * T * R * (n + m), lambda n, m, needed: 2 * T * m * R + 2 * T * R * (n + m) * needed
    )
    assert flops_of(recorded(name, f"lora_fa:r={R},targets=all-linear")) == lora_fa


@pytest.mark.parametrize("backward", range(1, 9))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_runlora_are_the_closed_form(name: str, backward: int) -> None:
    """The formulas that the orders are chosen by count what the operator does."""
    forward = backward % 4 + 1

    def forward_extra(n: int, m: int) -> Any:
        return runlora.FORWARD_FLOPS[forward](T, n, m, R) - 2 * T * n * m

    def backward_extra(n: int, m: int, needed: bool) -> Any:
        extra = runlora.BACKWARD_FLOPS[backward](T, n, m, R) - 2 * T * n * m
        return extra if needed else extra - INPUT_GRADIENT[backward](n, m)

    step = recorded(name, f"runlora:r={R},targets=all-linear,forward={forward},backward={backward}")
    assert flops_of(step) == adapted_flops(name, forward_extra, backward_extra)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_flops_of_blocks_are_the_closed_form(name: str) -> None:
    """LISA: gradients through all blocks, weights of gamma. BAdam: gradients down to the active block."""
    block = sum(2 * T * n * m for n, m in LINEARS[name][0])
    attention = 5 * ATTENTION
    for gamma in (1, 2, 3):
        _, backward = flops_of(recorded(name, f"lisa:gamma={gamma}"))
        assert backward == LAYERS * (block + attention) + gamma * block + 2 * HEAD
    for active in range(LAYERS):
        _, backward = flops_of(recorded(name, f"badam:block={active}"))
        assert backward == (LAYERS - active) * (block + attention) + block + HEAD


def test_the_mean_over_a_cycle_is_the_cost_of_badam() -> None:
    """dX of (D+1)/2 blocks on average and dW of one: what a user should compare with LoRA."""
    method = methods.parse("badam").bind(architecture_of("llama"))
    cycle = [flops_of(recorded("llama", m))[1] for m in method.cycle()]
    block = sum(2 * T * n * m for n, m in LINEARS["llama"][0])
    assert sum(cycle) / LAYERS == (LAYERS + 1) / 2 * (block + 5 * ATTENTION) + block + HEAD
    assert sum(cycle) / LAYERS == flops_of(recorded("llama", "badam"))[1]


# what the papers promise


@pytest.mark.parametrize("spec", ["paca:r=3,targets=all-linear", "lora_fa:r=3,targets=all-linear"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_frozen_weight_gets_no_gradient(name: str, spec: str) -> None:
    """A GEMM of a frozen weight's shape in backward would be its gradient."""
    step = recorded(name, spec)
    frozen = {p.shape for p in step.parameters if not p.requires_grad}
    made = {op.outputs[0].shape for part, op, _ in step.ops() if part.phase == "backward" and op.name == "mm"}
    assert made
    assert not frozen & made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_less_is_kept_for_backward_than_with_lora(name: str) -> None:
    """The papers' point: PaCA keeps T·r elements of an input and LoRA-FA T·r of xAᵀ, LoRA keeps T·n."""

    def kept(spec: str) -> Any:
        group = recorded(name, f"{spec}:r={R},adapter_dtype=bf16,targets=all-linear").groups[0]
        forward = memory.of_group(type(group)([p for p in group.parts if p.phase == "forward"]))
        return forward.delta

    assert kept("paca") < kept("lora")
    assert kept("lora_fa") < kept("lora")


@pytest.mark.parametrize("spec", SPECS)
def test_a_grid_gives_what_its_points_give(spec: str) -> None:
    """Dims may be arrays: batch, and the rank where there is one."""
    batch = np.array([2, 3, 5])
    points = [flops_of(recorded("llama", spec, batch=int(b), seq=40)) for b in batch]
    forward, backward = flops_of(recorded("llama", spec, batch=batch, seq=40))
    assert [(int(f), int(b)) for f, b in zip(forward, backward, strict=True)] == points
    if "r=4" in spec:
        bound = methods.parse(spec)
        ranks = type(bound)(r=np.array([2, 6]), targets=bound.targets)  # type: ignore[call-arg]
        points = [flops_of(recorded("llama", type(bound)(r=r, targets=bound.targets))) for r in (2, 6)]  # type: ignore
        forward, backward = (np.broadcast_to(x, 2) for x in flops_of(recorded("llama", ranks)))
        assert [(int(f), int(b)) for f, b in zip(forward, backward, strict=True)] == points


def test_a_grid_across_a_crossover_is_split() -> None:
    """One tape holds one order: a sweep over tokens has to notice where the choice changes."""
    with pytest.raises(MixedStructure):
        recorded("llama", "runlora:r=2", batch=np.array([1, 8]), seq=8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("paca:targets=q_prj", "method paca: target 'q_prj' matches no linear layer"),
        ("paca:r=0", "method paca: r must be"),
        ("paca:r=65", "method paca: r 65 exceeds the 64 inputs"),
        ("paca:layers_to_transform=3", "method paca: layer 3 is outside 0-2"),
        ("lisa:gamma=4", "method lisa: gamma 4 exceeds the 3 blocks"),
        ("lisa:gamma=0", "method lisa: gamma must be"),
        ("lisa:interval=0", "method lisa: interval must be"),
        ("badam:block=3", "method badam: block 3 is outside 0-2"),
        ("badam:block=-1", "method badam: block -1 is outside 0-2"),
        ("runlora:targets=nothing", "method runlora: target 'nothing' matches no linear layer"),
        ("runlora:r=33", "method runlora: rank 33 exceeds the width 32"),
        ("runlora:choose=luck", "method runlora: choose 'luck' is unknown: use flops or time"),
        ("runlora:choose=time", "method runlora: choose=time needs a device"),
        ("runlora:forward=5", "method runlora: forward must be from 1 to 4, got 5"),
        ("runlora:backward=0", "method runlora: backward must be from 1 to 8, got 0"),
        ("runlora:adapter_dtype=fp32", "method runlora: adapter_dtype must be the base's"),
        ("lora_fa:targets=nothing", "method lora_fa: target 'nothing' matches no linear layer"),
        ("lora_fa:r=33", "method lora_fa: rank 33 exceeds the width 32"),
    ],
)
def test_bad_options_are_refused_in_one_line(spec: str, message: str) -> None:
    """The user learns what is wrong with their method, by its own name."""
    with pytest.raises(UserError) as caught:
        recorded("llama", spec)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_runlora_refuses_autocast() -> None:
    """Its in-place products mix dtypes there: the real operator would fail."""
    with pytest.raises(UserError, match="autocast"):
        recorded("llama", "runlora:r=2", dtype="fp32", amp="bf16")


def test_galore_without_options_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`optim="galore_adamw"` without `optim_args`: with another rank it would be the price of another program."""
    made: Any = pytest.importorskip("transformers.trainer_optimizer")
    package = SimpleNamespace(GaLoreAdafactor=None, GaLoreAdamW=None, GaLoreAdamW8bit=None)
    monkeypatch.setitem(sys.modules, "galore_torch", package)
    monkeypatch.setattr(made, "is_galore_torch_available", lambda: True)
    monkeypatch.setattr(made, "_setup_low_rank_optimizer", lambda *given: (None, given[4]))
    run = SimpleNamespace(optim="galore_adamw")
    _, theirs = made._get_galore_optimizer(SimpleNamespace(args=run, model=None, optim_args={}, optimizer_kwargs={}))
    ours: Any = methods.parse("galore")
    assert (theirs["rank"], theirs["update_proj_gap"]) == (ours.r, ours.update_proj_gap)


def test_spread_blocks_are_the_last_of_equal_parts() -> None:
    """Where LLaMA-Pro adds its own: behind every L/K blocks, not the last K."""
    bound = methods.parse("top_k:k=2,spread=true").bind(architecture_of("llama", layers=6))
    assert [layer for layer in range(6) if bound.has(layer)] == [2, 5]
    last = methods.parse("top_k:k=2").bind(architecture_of("llama", layers=6))
    assert [layer for layer in range(6) if last.has(layer)] == [4, 5]
