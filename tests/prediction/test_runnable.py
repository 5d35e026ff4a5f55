"""Kernels that a GPU does not have are refused: their price would be that of a step which ends in an error."""

from typing import Any

import pytest

from perfmodel import UserError, advise, predict

MODEL = "tinyllama-1.1b"


@pytest.mark.parametrize(
    ("device", "method", "options", "said"),
    [
        ("t4", "lora", {"attention": "flash2"}, "flash-attn is not written for t4, of compute capability 7.5"),
        ("p100", "lora", {"compile": "default"}, "compile default: Triton"),
        ("p4", "full", {"kernels": "liger"}, "kernels liger: Triton"),
        ("p100", "lora:implementation=unsloth,targets=all-linear", {}, "implementation unsloth: Triton"),
        ("v100", "full", {"compile": "default", "dtype": "bf16"}, "leaves bf16 to eager code on v100"),
        ("v100", "lora_8bit", {}, "no 8-bit products for v100"),
        ("a100", "full", {"fp8": "rowwise"}, "the file of a100-80gb-sxm has no float8 peak"),
    ],
)
def test_what_a_device_does_not_run_is_refused(device: str, method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        predict(MODEL, method, device=device, **{"dtype": "fp16", "seq": 64} | options)


def test_what_runs_there_is_answered() -> None:
    for device, method, options in (
        ("t4", "lora_8bit", {}), ("v100", "full", {"compile": "default"}), ("t4", "lora", {"kernels": "liger"}),
        ("rtx-3060", "lora", {"attention": "flash2"}),
    ):  # fmt: skip
        assert predict(MODEL, method, device=device, dtype="fp16", seq=64, **options).time.phases["total"] > 0


def test_advice_names_nothing_that_does_not_run() -> None:
    """Liger's kernels were the first advice on a P100."""
    found = advise(MODEL, "lora", device="p100", dtype="fp16", seq=64)
    assert not any(
        word in str(found.as_dict()) for word in ("liger", "Liger", "torch.compile", "unsloth", "LoRAFusion", "flash2")
    )
    broken = advise(MODEL, "dora", device="h100-sxm", seq=64).as_dict()
    assert "torch.compile" not in str(broken)


@pytest.mark.parametrize(
    ("model", "device", "dtype", "told"),
    [
        (MODEL, "v100", "fp16", "32 heads over 4 in fp16 on v100"), (MODEL, "h100", "fp32", "32 heads over 4 in fp32"),
        (MODEL, "a100", "fp16", ""), ("gpt2", "v100", "fp16", ""),
    ],
)  # fmt: skip
def test_sdpa_without_a_fused_kernel_is_told_of(model: str, device: str, dtype: str, told: str) -> None:
    """Grouped heads take FlashAttention, which takes 16 bit on Ampere and newer: elsewhere scores go through memory."""
    notes = [note for note in predict(model, "full", device=device, dtype=dtype, seq=64).notes if "no fused" in note]
    assert (told in notes[0] and ("--attention eager" in notes[0]) == (dtype != "fp32")) if told else not notes
