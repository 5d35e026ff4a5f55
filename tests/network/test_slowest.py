"""GPUs of one kind differ, and all of a job wait for the slowest."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import predict
from perfmodel.program.stragglers import SPREAD, slowest_of


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=8))
def test_more_gpus_wait_no_less_and_one_alone_for_nobody(gpus: list[int]) -> None:
    """And an array of them is each by itself."""
    found = [slowest_of(n) for n in sorted(gpus)]
    assert found == sorted(found)
    assert slowest_of(np.array(sorted(gpus))).tolist() == found
    assert slowest_of(1) == 1.0


def test_the_mean_of_the_largest_is_that_of_normal_figures() -> None:
    """1 / sqrt(pi) standard deviations of two of them; of more as drawn."""
    assert slowest_of(2) == pytest.approx(1 + SPREAD / math.sqrt(math.pi), rel=5e-4)
    drawn = np.random.default_rng(0).normal(size=(20_000, 64)).max(axis=1).mean()
    assert slowest_of(64) == pytest.approx(1 + SPREAD * drawn, rel=5e-4)


def test_what_gpus_compute_takes_what_the_slowest_takes() -> None:
    """Products do, what travels does not; a CPU's processes are those of the machine that was measured."""
    asked = {"model": "llama-3.2-1b", "method": "lora", "device": "h100-sxm", "batch": 4, "seq": 2048}
    alone, several = (predict(**asked, gpus=n).time.components for n in (1, 8))
    assert several["gemm16"] / alone["gemm16"] == pytest.approx(slowest_of(8), rel=1e-3)
    grid = predict(**asked, gpus=np.array([1, 8])).time.components["gemm16"]
    np.testing.assert_allclose(grid, [alone["gemm16"], several["gemm16"]])
