"""The learned factor of 16-bit products: bounded, near its data and on its silicon alone, the same in grids."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import Device, UserError
from perfmodel.devices import profile
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.residual import FADE, FOLDER, OCTAVES, load_residual
from perfmodel.resources import stems

FILES = stems(FOLDER, ".toml")
OF = {name: profile.load(name).residual for name in profile.names() if profile.load(name).residual}
sizes = st.integers(1, 2**20)
files = st.sampled_from(FILES)


def without(device: Device) -> Device:
    """The same device with physical prices alone."""
    return Device(replace(device.profile, residual=""))


@given(files, sizes, sizes, sizes, st.integers(1, 200))
@settings(max_examples=200)
def test_the_factor_is_bounded(name: str, m: int, n: int, k: int, sm_count: int) -> None:
    """No shape may be priced by a factor that no measurement shows."""
    residual = load_residual(name)
    low, high = np.exp(residual.bounds)
    assert 0.8 < low < 1.0 < high < 1.35
    assert low <= residual.factor(np.array(m), np.array(n), np.array(k), sm_count) <= high


@given(files, st.integers(0, 2), sizes, sizes, st.booleans())
@settings(max_examples=200)
def test_far_from_what_was_measured_the_factor_is_one(name: str, axis: int, x: int, y: int, above: bool) -> None:
    """A fit says nothing there: physics alone does."""
    first, last = OCTAVES[axis]
    far = 2.0 ** (last + FADE if above else first - FADE)
    shape = [np.array(x), np.array(y)]
    shape.insert(axis, np.array(far))
    assert load_residual(name).factor(*shape, 132) == 1.0


@pytest.mark.parametrize("name", FILES)
def test_the_factor_has_no_steps_but_at_tiles(name: str) -> None:
    """Neighbouring shapes with as many tiles have nearly one price, over the edge of what was measured too."""
    residual = load_residual(name)
    m, n, k = (np.exp2(np.arange(-2.0, 20.0, 0.01)), np.array([[512.0], [4096.0]]), np.array(4096.0))
    moved = np.abs(np.diff(np.log(residual.factor(m, n, k, 132))))
    same_tiles = np.logical_and.reduce([np.diff(np.ceil(m / height)) == 0 for height, _ in residual.waves])
    assert moved[:, same_tiles].max() < 0.02


@pytest.mark.parametrize("name", ["a100-80gb-sxm", "h100-pcie", "b200", "l40s"])
def test_a_grid_has_the_prices_of_its_points(name: str) -> None:
    """Whatever varies: rows alone, another side too, or many rows."""
    device = Device.load(name)
    m, n = np.array([[1], [77], [4097]]), np.array([32, 3000, 151936])
    for other in (4096, np.array([64, 768, 14336])):
        grid = device.gemm(m, n, other)
        for i, j in np.ndindex(grid.shape):
            k = other if isinstance(other, int) else int(other[j])
            assert grid[i, j] == device.gemm(int(m[i, 0]), int(n[j]), k)
    assert device.gemm(np.arange(1, 8192), 4096, 4096)[4096] == device.gemm(4097, 4096, 4096)


@pytest.mark.parametrize("name", OF)
def test_more_work_takes_hardly_less_time(name: str) -> None:
    """A library changes its kernel with the shape: more work may be a little quicker, as measured, but not by much.

    Of sides that wide loads take: twice an odd side is an even one, which another kernel runs, in less time.
    """
    device, draw = Device.load(name), np.random.default_rng(0)
    m, n, k = (np.exp2(draw.uniform(first, 16, 2000)).astype(int) // 8 * 8 for first in (8, 9, 9))
    base = device.gemm(m, n, k)
    assert (device.gemm(2 * m, n, k) > 0.95 * base).all()
    assert (device.gemm(m, 2 * n, k) > 0.95 * base).all()
    assert (device.gemm(m, n, 2 * k) > base).all()
    assert (device.gemm(2 * m, 2 * n, 2 * k) > base).all()


SHAPE = (2048, 1536, 256)


@pytest.mark.parametrize("name", OF)
def test_the_factor_is_on_what_was_measured_alone(name: str) -> None:
    """Single products in 16 bit, in the layouts where it is known to help; anything else keeps its physical price."""
    device = Device.load(name)
    physics = without(device)
    factor = load_residual(OF[name]).factor(*map(np.array, SHAPE), device.profile.hardware.sm_count)
    assert factor != 1.0
    for dtype, layout in (("bf16", "tn"), ("fp16", "tn"), ("bf16", "nn")):
        words: dict[str, Any] = {"dtype": dtype, "layout": layout}
        assert device.gemm(*SHAPE, **words) == pytest.approx(physics.gemm(*SHAPE, **words) * factor, rel=1e-12)
    others: list[dict[str, Any]] = [{"layout": "nt"}, {"dtype": "fp32"}, {"batch": 4}, {"batch": np.array([2, 8])}]
    for words in others:
        assert np.all(device.gemm(*SHAPE, **words) == physics.gemm(*SHAPE, **words))


@pytest.mark.parametrize("name", OF)
def test_a_factor_stays_on_its_silicon(name: str) -> None:
    """On another chip it made prices worse: who has one has the ratios of the chip that was measured."""
    mine, measured = profile.load(name), profile.load(OF[name])
    assert measured.fitted["gemm.bf16"] == "fitted"
    assert mine.architecture == measured.architecture
    assert mine.compute_capability == measured.compute_capability
    of_the_board: dict[str, Any] = dict.fromkeys(("sustained", "nn_slowdown", "nt_slowdown", "power_share"), 1.0)
    assert replace(mine.gemm["bf16"], **of_the_board) == replace(measured.gemm["bf16"], **of_the_board)


@pytest.mark.parametrize("name", ["rtx-4090", "l4", "v100"])
def test_a_device_without_measurements_has_physical_prices(name: str) -> None:
    """Class defaults are not the ratios on which a factor was fitted."""
    on = profile.load(name)
    assert on.residual == ""
    price = gemm_time(*SHAPE, hardware=on.hardware, parameters=on.gemm["fp16"], dtype="fp16")
    assert Device(on).gemm(*SHAPE, dtype="fp16") == pytest.approx(float(price), rel=1e-12)


def test_an_unknown_residual_is_refused_with_the_nearest() -> None:
    """A device file of one's own may name one."""
    mine = Device(replace(profile.load("h100-sxm"), residual="h100-sxn"))
    with pytest.raises(UserError, match="did you mean 'h100-sxm'"):
        mine.gemm(*SHAPE)
