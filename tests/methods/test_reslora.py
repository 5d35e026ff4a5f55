"""ResLoRA's shortcuts cross blocks, which the tape records once and repeats: ops and memory have to come out right."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from closed_forms import LAYERS, R, T, adapted_flops, flops_of, products, recorded
from helpers import FIGURES, architecture_of, by_phase, config_of, step_of

pytest.importorskip("peft")

import reference_reslora
import torch
from real_steps import real_steps
from reference import differences

from perfmodel import methods, predict
from perfmodel.errors import UserError
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models, references
from validate.oracle import counts

VARIANTS = ("shortcut=is", "shortcut=is,merge_flag=4", "shortcut=bs,pre_num=1", "shortcut=ms,pre_num=1")


@pytest.mark.parametrize("variant", [*VARIANTS, "shortcut=ms,pre_num=-1,merge_flag=3", "shortcut=bs,pre_num=2"])
@pytest.mark.parametrize(("layers", "batch"), [(3, 1), (6, 4)])
def test_the_tape_equals_the_reference(variant: str, layers: int, batch: int) -> None:
    """Zero tolerance, and peak memory within 2 %: with few blocks, and with some that are recorded once."""
    assert differences("llama", f"reslora:r=4,{variant}", layers=layers, batch=batch) == []


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("reslora:r=3,shortcut=ms,pre_num=2,merge_flag=4,dropout=0.1", {"grad_accum": 2}),
        ("reslora:r=3,shortcut=is,targets=q_proj+o_proj", {"grad_accum": 3, "dtype": "fp32"}),
        ("reslora:r=3,shortcut=bs,pre_num=2,targets=o_proj+up_proj", {"dtype": "fp32", "amp": "bf16"}),
        ("reslora:r=3,shortcut=ms,pre_num=1,layers=0-3+5", {}),
    ],
)
def test_the_tape_equals_the_reference_in_the_corners(spec: str, options: dict[str, Any]) -> None:
    """What modules keep is replaced by the next micro-batch; the chain skips blocks without an adapter."""
    assert differences("llama", spec, layers=6, **options) == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_real_step_makes_the_calls_of_the_tape(name: str, variant: str) -> None:
    """Beside a bias `result +=` adds to a view, whose history autograd rewrites with copies (not of fake tensors)."""
    config, setup, layers = config_of(name, layers=5), Setup(batch=2, seq=9, dtype="fp32"), 5
    architecture = architecture_of(name, layers)
    method = methods.parse(f"reslora:r=4,{variant},targets=all-linear").bind(architecture)
    step = build(architecture, method, setup, "cpu")
    torch.manual_seed(0)
    model = references.apply_reference(models.build_model(config, setup, device="cpu"), method, architecture, setup)
    for module in model.modules():
        if isinstance(module, reference_reslora.ResLinear):
            torch.nn.init.normal_(module.lora_A)
    recorder, losses = real_steps(model, setup, step.optimizer, 3)
    assert losses[-1] < losses[0], "the real step does not train"
    tape = counts.tape_calls(step)
    for phase in PHASES:
        assert counts.without_underscore(tape[phase]) == Counter(counts.without_underscore(recorder.trace.calls[phase]))


def test_shortcuts_compute_what_the_paper_says() -> None:
    """y = Wx + BA(x + x₋₁); y = Wx + Σ BᵢAᵢx; y = Wx + B(Ax + Σ xaᵢ), over the layers before."""
    x = [torch.randn(2, 3, 6, dtype=torch.float64) for _ in range(3)]
    for kind in ("is", "bs", "ms"):
        method = methods.parse(f"reslora:r=2,alpha=2,shortcut={kind},pre_num=2")
        chain = [reference_reslora.ResLinear(torch.nn.Linear(6, 5, dtype=torch.float64), method) for _ in x]
        for module, before in zip(chain[1:], chain, strict=False):
            module.previous = [before]
        for module in chain:
            torch.nn.init.normal_(module.lora_A)
            torch.nn.init.normal_(module.lora_B)
        y = [module(one) for module, one in zip(chain, x, strict=True)][-1]
        a, b = [m.lora_A.t() for m in chain], [m.lora_B.t() for m in chain]
        expected = {
            "is": (x[2] + x[1]) @ a[2] @ b[2],
            "bs": sum(x[2] @ a[i] @ b[i] for i in range(3)),
            "ms": sum(x[i] @ a[i] for i in range(3)) @ b[2],
        }[kind]
        assert torch.allclose(y, chain[2].base(x[2]) + expected)


# closed forms


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_input_and_middle_shortcuts_cost_no_product(name: str) -> None:
    """They add elementwise: FLOPs are those of LoRA, except that the second block's inputs reach back to the first."""
    lora = recorded(name, f"lora:r={R},targets=all-linear")
    for variant in ("shortcut=is", "shortcut=ms,pre_num=2"):
        assert flops_of(recorded(name, f"reslora:r={R},targets=all-linear,{variant}")) == flops_of(lora)


def test_block_shortcuts_cost_pre_num_adapters_more() -> None:
    """2Tr(n+m) forward and 4Tr(n+m) backward for each earlier block's adapter, where there are that many."""
    per_block = len(products("llama")) // LAYERS
    adapters = [min(i // per_block, 1) + 1 for i in range(LAYERS * per_block)]
    extra = iter([*adapters, *adapters])
    expected = adapted_flops(
        "llama",
        lambda n, m: next(extra) * 2 * T * R * (n + m),
        lambda n, m, needed: next(extra) * (4 * T * R * (n + m) - 2 * T * n * R * (not needed)),
    )
    assert flops_of(recorded("llama", f"reslora:r={R},shortcut=bs,pre_num=1,targets=all-linear")) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_more_block_always_costs_the_same(name: str, variant: str) -> None:
    """Blocks between the ends are recorded once: a wrong count would show at depth 80."""
    steps = [step_of(name, f"reslora:r=4,{variant}", layers=7 + i) for i in range(3)]
    for figure, of_op in FIGURES.items():
        first, second, third = (by_phase(s, of_op) for s in steps)
        for phase in ("forward", "backward"):
            assert third[phase] - second[phase] == second[phase] - first[phase], (figure, phase)


def test_merge_flags_make_the_host_wait() -> None:
    """A norm that is read back in every layer is why some merges slow training down."""
    options: dict[str, Any] = {"device": "a100-80gb-sxm", "batch": 1, "seq": 256}
    plain, synced = (
        predict("llama-3.2-1b", f"reslora:shortcut=is,merge_flag={flag},targets=all-linear", **options)
        for flag in (0, 4)
    )
    assert synced.time.phases["forward"] > plain.time.phases["forward"]
    assert synced.dispatches["forward"] == plain.dispatches["forward"] + 2 * 16 * 7


def test_a_grid_gives_what_its_points_give() -> None:
    """Kept tensors are arrays like all others."""
    seq = np.array([16, 40])
    grid = predict("gpt2", "reslora:shortcut=ms", device="l40s", batch=2, seq=seq)
    for i, s in enumerate(seq):
        point = predict("gpt2", "reslora:shortcut=ms", device="l40s", batch=2, seq=int(s))
        assert (grid.flops["total"][i], grid.memory.peak[i]) == (point.flops["total"], point.memory.peak)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("reslora:shortcut=as", {}, "method reslora: shortcut 'as' is unknown: use is, bs or ms"),
        ("reslora:pre_num=0", {}, "method reslora: pre_num must be from 1, or -1 for all"),
        ("reslora:merge_flag=2", {}, "method reslora: merge_flag must be 0, 3 or 4"),
        ("reslora:targets=lm_head", {}, "method reslora: the head has no earlier block"),
        ("reslora:adapter_dtype=fp32", {}, "method reslora: adapter_dtype must be the base's"),
        ("reslora", {"checkpoint": "block"}, "method reslora: shortcuts reach out of checkpointed blocks"),
    ],
)
def test_bad_options_are_refused_in_one_line(spec: str, options: dict[str, Any], message: str) -> None:
    """Shortcuts need earlier blocks, whole and at hand."""
    with pytest.raises(UserError) as caught:
        recorded("llama", spec, **options)
    assert str(caught.value).startswith(message)
