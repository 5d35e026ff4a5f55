"""Optimizers for LoRA that peft does not have: the tape equals a reference, which computes what the paper says."""

from typing import Any

import pytest
from helpers import architecture_of

pytest.importorskip("transformers")

import reference_lora_pro  # noqa: F401  # registers its program
import reference_lora_rite
import torch
from reference import differences

from perfmodel import methods
from perfmodel.errors import UserError


@pytest.mark.parametrize(
    ("name", "spec", "options"),
    [
        ("llama", "lora_rite:r=4", {"batch": 4}),
        ("gpt2", "lora_rite:r=3,targets=all-linear", {"dtype": "fp32"}),
        ("opt", "lora_rite:r=4,dropout=0.1", {"grad_accum": 2, "dtype": "fp32", "amp": "bf16"}),
        ("llama", "lora_pro:r=4", {"batch": 4}),
        ("gpt2", "lora_pro:r=3,targets=all-linear", {"dtype": "fp32"}),
    ],
)
def test_the_tape_equals_the_reference(name: str, spec: str, options: dict[str, Any]) -> None:
    """Zero tolerance: calls with shapes and dtypes, FLOPs, bytes, parameters; peak memory within 2 %."""
    assert differences(name, spec, **options) == []


def product_after(scale: float) -> torch.Tensor:
    """BA after three steps of LoRA-RITE, A begun `scale` times as large and B as small."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 7, dtype=torch.float64) * scale, torch.randn(5, 3, dtype=torch.float64) / scale
    pair = torch.nn.Parameter(a), torch.nn.Parameter(b)
    update = reference_lora_rite.LoraRiteUpdate([pair])
    target = torch.randn(5, 7, dtype=torch.float64)
    for _ in range(3):
        (0.01 * (pair[1] @ pair[0] - target)).pow(2).sum().backward()
        update.step()
        update.zero_grad()
    return (pair[1] @ pair[0]).detach()


def test_a_step_of_lora_rite_does_not_hang_on_the_factorisation() -> None:
    """That is what it is for: the same product, split in another way, takes the same steps."""
    torch.testing.assert_close(product_after(1.0), product_after(8.0), rtol=1e-6, atol=1e-6)


def test_lora_rite_has_no_step_on_16_bit_adapters() -> None:
    """PyTorch has no QR in bf16: the authors' program would end in a traceback at its first step."""
    with pytest.raises(UserError, match="no QR of bf16 adapters"):
        methods.parse("lora_rite:adapter_dtype=bf16").bind(architecture_of("llama"))
