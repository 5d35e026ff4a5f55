"""A rank's step of TRL's objectives under DDP and FSDP against programs in plain torch, in torch's fake process group.

Their losses are those of `tests/references/reference_objectives.py`, their models prepared as accelerate and TRL do it.
"""

from typing import Any

import pytest

pytest.importorskip("peft")

import torch.distributed as dist
from both_sides import flat_collectives
from reference_objectives import LOSSES
from reference_own_losses import OWN_LOSSES
from reference_steps import judged_rank, traced_rank

from perfmodel.errors import UserError
from perfmodel.prediction import memory
from validate.oracle import parallel

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

ALL = {**LOSSES, **OWN_LOSSES}
LORA = "lora:r=4,targets=all-linear,dropout=0.1"
MIXED = {"dtype": "fp32", "amp": "bf16", "checkpoint": "block", "gpus": 3}
CASES: tuple[tuple[str, str, str, str, dict[str, Any]], ...] = (
    ("dpo", "ddp", "qwen2", "full", {"ddp": "find-unused", "grad_accum": 2}),
    ("dpo", "ddp", "llama", LORA, MIXED),
    ("dpo", "fsdp2", "llama", "full", MIXED),
    ("dpo", "fsdp2", "llama", LORA, {"grad_accum": 2}),
    ("kto", "fsdp2", "llama", "full", MIXED),
    ("kto", "fsdp2", "llama", "lora:r=4", {"checkpoint": "block", "gpus": 4}),
    ("dpo", "fsdp2", "llama", "full", {**MIXED, "reshard": False}),
    ("kto", "fsdp2", "llama", "lora:r=4", {"reshard": False, "grad_accum": 2}),
    ("dpo", "fsdp2", "llama", "lora:r=4", {"gpus": 4, "shard_group": 2, "grad_accum": 2}),
    ("kto", "fsdp2", "llama", "full", {**MIXED, "gpus": 6, "shard_group": 3, "reshard": False}),
    ("simpo", "fsdp2", "llama", "full", MIXED),
    ("reward", "ddp", "llama", LORA, {"grad_accum": 2}),
    ("asft", "ddp", "qwen2", "full", {**MIXED, "grad_accum": 2}),
    ("ppo", "ddp", "qwen2", "full", {"dtype": "fp32", "amp": "bf16", "prompt": 5, "gpus": 3}),
    ("ppo", "ddp", "llama", "lora:r=4", {"reference": "model", "grad_accum": 2, "checkpoint": "block"}),
    ("asft", "fsdp2", "llama", "full", MIXED),
    ("asft", "fsdp2", "gpt2", "full", {"gpus": 4, "shard_group": 2}),
    ("asft", "fsdp2", "qwen2", "lora:r=4", {"reference": "model", "reshard": False}),
    ("grpo", "ddp", "llama", "full", MIXED),
    ("grpo", "fsdp2", "llama", "lora:r=4", {"reference": "adapter-off", "checkpoint": "block-reentrant"}),
    ("grpo", "fsdp2", "qwen2", "full", {"reference": "model", "prompt": 5}),
)  # fmt: skip

FLAT: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("dpo", "llama", "full", {"reshard": False}),
    ("kto", "gpt2", "full", {"grad_accum": 2, "checkpoint": "block"}),
    ("grpo", "llama", "full", {"reference": "model", "prompt": 5, "shard_group": 2}),
    ("asft", "llama", "full", {"reshard": False}),
    ("dpo", "qwen2", "full", {**MIXED, "gpus": 4}),
    ("kto", "llama", "lora:r=4", {**MIXED, "gpus": 4, "reshard": False}),
    ("dpo", "llama", "lora:r=4", {}),
    ("kto", "llama", "lora:r=4", {"reshard": False, "grad_accum": 2, "checkpoint": "block"}),
)


@pytest.mark.parametrize(("objective", "form", "name", "method", "setup"), CASES)
def test_a_rank_makes_the_calls_and_collectives_of_a_program_in_torch(
    objective: str, form: str, name: str, method: str, setup: dict[str, Any]
) -> None:
    """The reference is gathered again, and what is logged waits for every rank: dozens of small messages a step."""
    asked = {"gpus": 2, **setup}
    found = judged_rank(name, method, ALL, objective=objective, parallel=form, **asked)
    assert found.collectives > 0
    assert found.differences == []


@pytest.mark.parametrize(
    ("objective", "setup"),
    [
        ("ppo", {"parallel": "fsdp2"}),
        ("ppo", {"parallel": "zero2"}),
        ("ppo", {"parallel": "ddp", "ddp": "find-unused"}),
        ("ebft", {"parallel": "ddp"}),
    ],
)
def test_what_no_form_has_is_refused(objective: str, setup: dict[str, Any]) -> None:
    """Their trainers prepare models in ways of their own."""
    with pytest.raises(UserError, match=f"objective {objective}"):
        judged_rank("llama", "full", LOSSES, objective=objective, gpus=2, **setup)


@pytest.mark.parametrize(("objective", "name", "method", "setup"), FLAT)
def test_fsdp1_gathers_and_reduces_what_the_real_one_does(
    objective: str, name: str, method: str, setup: dict[str, Any]
) -> None:
    """A reference's root is gathered once in a training and stays. Adapters' units come in another order, as in SFT."""
    found, real = traced_rank(
        name, method, ALL, objective=objective, parallel="fsdp1", **{"gpus": 4, "clip_grad": False, **setup}
    )
    ours, theirs = parallel.collectives(found.step), flat_collectives(real)
    if method != "full":
        ours, theirs = (sorted(c._replace(products=0) for c in those) for those in (ours, theirs))
    assert ours == theirs
    if not setup.get("reshard", True) and "amp" not in setup:  # what is freed in place the recorder does not follow
        assert memory.peak_bytes(found.step) == pytest.approx(real.trace.peak, rel=parallel.PEAK_TOLERANCE)
