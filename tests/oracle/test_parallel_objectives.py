"""A rank's step of TRL's objectives under DDP and FSDP2 against programs in plain torch, in torch's fake process group.

Their losses are those of `tests/references/reference_objectives.py`, their models prepared as accelerate and TRL do it.
"""

from typing import Any

import pytest

pytest.importorskip("peft")

import torch.distributed as dist
from reference_objectives import LOSSES
from reference_steps import judged_rank

from perfmodel import predict
from perfmodel.errors import UserError

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

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
    ("simpo", "fsdp2", "llama", "full", MIXED),
    ("reward", "ddp", "llama", LORA, {"grad_accum": 2}),
    ("grpo", "ddp", "llama", "full", MIXED),
    ("grpo", "fsdp2", "llama", "lora:r=4", {"reference": "adapter-off", "checkpoint": "block-reentrant"}),
    ("grpo", "fsdp2", "qwen2", "full", {"reference": "model", "prompt": 5}),
)  # fmt: skip


@pytest.mark.parametrize(("objective", "parallel", "name", "method", "setup"), CASES)
def test_a_rank_makes_the_calls_and_collectives_of_a_program_in_torch(
    objective: str, parallel: str, name: str, method: str, setup: dict[str, Any]
) -> None:
    """The reference is gathered again, and what is logged waits for every rank: dozens of small messages a step."""
    asked = {"gpus": 2, **setup}
    found = judged_rank(name, method, LOSSES, objective=objective, parallel=parallel, **asked)
    assert found.collectives > 0
    assert found.differences == []


@pytest.mark.parametrize("objective", ["ppo", "asft", "ebft"])
def test_what_no_form_has_is_refused(objective: str) -> None:
    """Their trainers prepare models in ways of their own."""
    with pytest.raises(UserError, match=f"several are not modelled with objective {objective}"):
        judged_rank("llama", "full", LOSSES, objective=objective, parallel="ddp", gpus=2)


def test_a_reference_is_refused_where_it_was_not_compared() -> None:
    """Log-probabilities made before need no pass, so they go with every form."""
    options: dict[str, Any] = {"device": "h100-sxm", "gpus": 2, "parallel": "fsdp1", "seq": 64, "objective": "dpo"}
    with pytest.raises(UserError, match="objective dpo is not modelled with parallel fsdp1"):
        predict("llama-3.2-1b", "full", **options)
    found = predict("llama-3.2-1b", "full", reference="precomputed", **options)
    assert found.time.communication.calls["all_gather"] > 15  # what is logged
