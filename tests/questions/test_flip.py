"""Qwen-1.8B on an A100: LoRA is faster at 256 tokens and slower at 4096 and 8192.

https://github.com/QwenLM/Qwen/blob/2df8e8ac45/README.md#profiling-of-memory-and-speed: one A100-SXM4-80GB, batch 1,
eight micro-batches a step, flash-attn 2, seconds a step to 0.1 s. What the scripts set (finetune/, at 69a7eebbf5):
finetune_ds.sh runs full fine-tuning through DeepSpeed (ds_config_zero3.json; the README: "we use DeepSpeed ZeRO 3 in
this script"), finetune_lora_single_gpu.sh runs LoRA without, in bf16 autocast; both checkpoint, reentrantly as PyTorch
2.0 does by default. LoRA r=64 with dropout 0.05 on all linears. Their image (docker/Dockerfile, at 6c467b507b) has peft
0.5.0, whose adapters are fp32 beside a bf16 base, and flash-attn 2.3.3 with its norm kernel.
"""

from functools import cache

import pytest

from perfmodel import Setup, compare
from perfmodel.program.software import SoftwareStack
from perfmodel.questions.comparison import Comparison

MEASURED = {256: (2.1, 1.0), 2048: (2.3, 1.7), 4096: (2.8, 3.3), 8192: (5.6, 6.8)}  # tokens: full, LoRA
LORA = "lora:r=64,targets=all-linear,dropout=0.05"
LONG = (4096, 8192)


@cache
def table(seq: int, full: str = "full:engine=deepspeed-zero3", host: str = "default") -> Comparison:
    """`perfmodel compare --methods full:engine=deepspeed-zero3 lora:...`."""
    setup = Setup(
        batch=1, seq=seq, grad_accum=8, dtype="bf16", amp="bf16", checkpoint="block-reentrant", attention="flash2",
        stack=SoftwareStack.of("torch=2.0,cuda=11.8"),
    )  # fmt: skip
    return compare("qwen-1.8b", [full, LORA], setup, "a100-80gb-sxm", host=host)


def seconds(seq: int, full: str = "full:engine=deepspeed-zero3", host: str = "default") -> tuple[float, float]:
    first, second = table(seq, full, host).predictions
    return float(first.time.phases["total"]), float(second.time.phases["total"])


@pytest.mark.parametrize(("seq", "verdict"), [(256, "faster"), (4096, "slower"), (8192, "slower")])
def test_the_verdict_flips_with_the_length(seq: int, verdict: str) -> None:
    """What `compare` answers, by its own rule of 5 %."""
    assert table(seq).speedups[0].verdict == verdict


@pytest.mark.parametrize("seq", LONG)
def test_times_are_near_what_was_measured_where_the_gpu_works(seq: int) -> None:
    """Nothing waits for the host there: each within 5 %, the rounding taken off, and the speed-up too."""
    for predicted, measured in zip(seconds(seq), MEASURED[seq], strict=True):
        assert abs(predicted - measured) - 0.05 <= 0.05 * measured
    full, lora = MEASURED[seq]
    assert (full - 0.05) / (lora + 0.05) * 0.95 < table(seq).speedups[0].ratio < (full + 0.05) / (lora - 0.05) * 1.05


@pytest.mark.parametrize("seq", [256, 2048])
def test_where_the_host_is_the_limit_its_speed_decides(seq: int) -> None:
    """Theirs is unknown, between an EPYC 9004 and half its speed; with the latter 2048 tokens come out right too.

    LoRA at 2048 waits for neither: there the GPU's time is judged as where it works.
    """
    for fast, slow, measured in zip(
        seconds(seq, host="epyc-genoa"), seconds(seq, host="half-speed"), MEASURED[seq], strict=True
    ):
        of_gpu = 0.05 * measured if slow - fast < 0.001 * slow else 0.0
        assert fast - 0.05 <= measured <= slow + 0.05 + of_gpu
    full, lora = seconds(seq, host="half-speed")
    assert full > 1.3 * lora


def test_the_host_of_its_years_is_near_theirs() -> None:
    """By AMD's figures of the CPU in a DGX A100: within a fifth, where a newer one is a quarter off and more."""
    for usual, new, measured in zip(seconds(256), seconds(256, host="epyc-genoa"), MEASURED[256], strict=True):
        assert abs(usual / measured - 1) < 0.2 < 0.25 < 1 - new / measured


def test_the_cause_is_the_engine_at_short_and_the_adapters_at_long_sequences() -> None:
    """Without DeepSpeed full fine-tuning would be faster at 256 tokens too; at 4096 nothing waits for the host."""
    without, lora = seconds(256, "full")
    assert without < lora < seconds(256)[0]
    short, long = table(256).predictions, table(4096).predictions
    assert float(short[0].time.launch_bound_share) > 0.5
    assert float(long[1].time.launch_bound_share) < 0.05
    assert float(long[1].time.components["memory"]) > 1.2 * float(long[0].time.components["memory"])
