"""Intervals: they hold their centre, widen with ignorance, and shrink where errors are shared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import compare, predict
from perfmodel.devices import profile
from perfmodel.prediction import intervals

shares = st.dictionaries(
    st.sampled_from(("gemm16", "gemm32", "attention", "memory", "optimizer", "host")),
    st.floats(1e-6, 10.0),
    min_size=1,
)


@given(center=st.floats(1e-6, 1e3), spread=st.floats(0, 2))
def test_an_interval_contains_its_centre(center: float, spread: float) -> None:
    """Whatever else is wrong, the stated value must lie between the stated bounds."""
    low, high = intervals.interval_bounds(center, spread)
    assert low <= center <= high


@given(parts=shares)
def test_a_step_against_itself_has_only_the_unexplained_error(parts: dict[str, float]) -> None:
    """Errors shared by both methods cancel in their ratio: that is why a verdict is surer than a time."""
    on = profile.load("a100-80gb-sxm")
    total = sum(parts.values())
    assert intervals.ratio_sigma(parts, total, parts, total, on) == pytest.approx(intervals.UNEXPLAINED_RATIO)
    assert intervals.step_sigma(parts, total, on) >= intervals.UNEXPLAINED


def test_attention_is_as_uncertain_as_the_kernel_that_pytorch_prefers() -> None:
    """cuDNN's kernel on Hopper, FlashAttention-2 on Ampere: each has been measured by itself."""
    for device, block in (("h100-sxm", "attention_cudnn"), ("a100-80gb-sxm", "attention")):
        on = profile.load(device)
        assert intervals.sigma("attention", on) == intervals.SIGMA_OF_MEAN * on.residuals[block]["mean"]


@pytest.mark.parametrize("device", profile.names())
def test_every_device_predicts_inside_its_own_interval(device: str) -> None:
    """Also devices that nobody measured: they say so and are wider."""
    p = predict("gpt2", "lora:r=8", device=device, dtype="fp32", batch=2, seq=128)
    assert 0 < p.time.low < p.time.phases["total"] < p.time.high
    assert sum(p.time.components.values()) == pytest.approx(p.time.phases["total"])


def test_a_device_without_measurements_says_so_and_is_less_sure() -> None:
    """A guess must not look like a measurement."""
    known, guessed = (predict("llama-3.2-1b", device=d, batch=4, seq=1024) for d in ("h100-sxm", "rtx-5090"))
    assert not [n for n in known.notes if "class" in n]
    assert [n for n in guessed.notes if "class" in n]
    width = [np.log(p.time.high / p.time.low) for p in (known, guessed)]
    assert width[0] < width[1]


def test_a_ratio_is_surer_than_the_times_it_is_made_of() -> None:
    """Full against top-K on one device share most of their kernels."""
    c = compare("llama-3.2-1b", ("full", "top_k:k=12"), device="a100-80gb-sxm", batch=4, seq=2048)
    (s,) = c.speedups
    time = c.predictions[0].time
    assert np.log(s.high / s.low) < np.log(time.high / time.low)
