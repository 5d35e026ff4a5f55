"""Bottleneck adapters: the tape equals a reference in plain torch, call by call, and the closed form of its FLOPs."""

from typing import Any

import pytest
from helpers import architecture_of, by_phase, config_of, setup_of, step_of

pytest.importorskip("transformers")

import reference_adapters as reference
import torch

from perfmodel import methods
from perfmodel.errors import UserError
from perfmodel.recording.record import build
from perfmodel.tracing.programs import models
from perfmodel.tracing.trace import trace_step
from validate.oracle import counts
from validate.oracle.cases import Case

CELLS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("llama", "houlsby:r=8", {"batch": 4, "checkpoint": "block"}),
    ("llama", "houlsby:r=8,activation=silu,adapter_dtype=fp32", {}),
    ("llama", "houlsby:r=8,norms=true", {"dtype": "fp32", "amp": "bf16"}),
    ("llama", "pfeiffer:r=8", {"batch": 1}),
    ("llama", "pfeiffer:r=8,layers=1-2", {"dtype": "fp32", "attention": "eager"}),
    ("gpt2", "houlsby:r=8", {"dtype": "fp32"}),
    ("gpt2", "houlsby:r=8,layers=0+2", {"checkpoint": "block-reentrant", "batch": 4}),
    ("gpt2", "pfeiffer:r=8,norms=true", {"grad_accum": 2}),
    ("gpt2", "pfeiffer:r=8", {"dtype": "fp32", "amp": "bf16", "attention": "eager"}),
    ("bert", "houlsby:r=8,norms=true", {"batch": 4}),
    ("bert", "pfeiffer:r=8", {"dtype": "fp32", "amp": "bf16"}),
    ("gpt_neo", "houlsby:r=8", {}),
    ("gpt_neo", "pfeiffer:r=8", {"dtype": "fp32"}),
    ("opt", "houlsby:r=8", {}),
    ("opt", "pfeiffer:r=8", {"checkpoint": "block"}),
    ("gpt_neox", "houlsby:r=8", {"checkpoint": "block"}),
    ("gpt_neox", "pfeiffer:r=8", {"dtype": "fp32"}),
    ("gpt_bigcode", "pfeiffer:r=8", {}),
    ("falcon", "houlsby:r=8", {}),
    ("mpt", "pfeiffer:r=8", {}),
)


@pytest.mark.parametrize(("name", "spec", "options"), CELLS, ids=lambda v: str(v))
def test_the_tape_equals_the_reference(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes, parameters; peak memory within 2 %."""
    changes = {"dropout": 0.0} if name == "opt" else {}  # transformers drops out between OPT's modules
    config, architecture = config_of(name, **changes), architecture_of(name, **changes)
    setup, method = setup_of(name, **options), methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = reference.apply(models.build_model(config, setup), method, architecture)
    result = counts.judge_step(Case(config, spec, setup), step, trace_step(model, setup, step.optimizer))
    assert result.flops > 0
    assert result.differences == []


def test_the_references_compute_what_the_papers_say() -> None:
    """Houlsby: x + U(act(D(x))); Pfeiffer: r + U(act(D(h))) with h = r + skip."""
    method = methods.parse("houlsby:r=2,activation=relu")
    adapter = reference.Adapter(6, method, torch.float64).to_empty(device="cpu")
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    x, skip, base = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64), torch.tanh

    def by_hand(h: torch.Tensor) -> torch.Tensor:
        inner = (h @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
        return inner @ adapter.up.weight.T + adapter.up.bias

    assert torch.allclose(reference.Serial(base, adapter)(x), base(x) + by_hand(base(x)))
    seen = reference.Skip()
    seen.keep(None, (skip,))
    assert torch.allclose(reference.Parallel(base, adapter, seen, None)(x), base(x) + by_hand(base(x) + skip))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "adapters"), [("houlsby", 2), ("pfeiffer", 1)])
def test_flops_and_parameters_equal_the_closed_form(name: str, method: str, adapters: int) -> None:
    """methods.md 4.12: two products of 2·T·d·k each forward, twice that backward; 2dk + d + k parameters."""
    arch, batch, seq, k = architecture_of(name), 2, 17, 8
    d, tokens, count = arch.hidden, batch * seq, adapters * arch.layers
    mine, bare = by_phase(step_of(name, f"{method}:r={k}")), by_phase(step_of(name, "full"))
    once = 2 * tokens * d * k
    assert mine["forward"] - bare["forward"] == count * 2 * once
    assert step_of(name, f"{method}:r={k}").trainable == count * (2 * d * k + d + k)
    # backward: one more adapter of the same kind costs 4·2·T·d·k, beside the base products that it makes run
    wide = by_phase(step_of(name, f"{method}:r={2 * k}"))
    unneeded = once  # the lowest adapter's input needs no gradient
    assert wide["backward"] - mine["backward"] == count * 4 * once - unneeded


def test_norms_train_only_where_asked() -> None:
    """Houlsby et al. train the norms too; it adds 2 (LayerNorm) or 1 (RMSNorm) vectors a norm."""
    arch = architecture_of("gpt2")
    more = step_of("gpt2", "houlsby:r=8,norms=true").trainable - step_of("gpt2", "houlsby:r=8").trainable
    assert more == (2 * arch.layers + 1) * 2 * arch.hidden


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("houlsby:r=0", "r must be"),
        ("pfeiffer:activation=tanhh", "activation 'tanhh' is unknown"),
        ("pfeiffer:adapter_dtype=int8", "adapter_dtype 'int8' is unknown"),
        ("houlsby:layers=7", "layer 7 is outside 0-2"),
    ],
)
def test_bad_options_are_refused_in_one_line(text: str, needs: str) -> None:
    """A user's slip ends in one line that says what would be right."""
    with pytest.raises(UserError, match=needs) as caught:
        step_of("llama", text)
    assert "\n" not in str(caught.value)
