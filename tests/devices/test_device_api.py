"""Prices as an API: what `Device` answers is what predictions are made of."""

import numpy as np
import pytest

from perfmodel import Device, UserError, predict
from perfmodel.devices import price

DEVICES = ("h100-sxm", "l40s", "cpu-xeon-2.5ghz-1t")


@pytest.mark.parametrize("name", DEVICES)
def test_every_op_of_a_step_has_the_price_that_the_step_has(name: str) -> None:
    """One table prices both; asking for one op must not go another way."""
    device = Device.load(name)
    step = predict("gpt2", "lora", device=device, seq=32).step
    assert step is not None
    ops = [op for part, _ in step.parts() for op in part.ops]
    together = price.durations(ops, device.profile)
    for op, seconds in list(zip(ops, together, strict=True))[::7]:
        assert device.op(op) == pytest.approx(float(seconds), rel=1e-12)


@pytest.mark.parametrize("name", DEVICES)
def test_arrays_are_their_single_answers(name: str) -> None:
    device = Device.load(name)
    m, n = np.array([[64], [2048]]), np.array([128, 4096, 4096])
    whole = device.gemm(m, n, 512, dtype="fp32", layout="nt")
    assert whole.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        assert whole[i, j] == pytest.approx(device.gemm(int(m[i, 0]), int(n[j]), 512, dtype="fp32", layout="nt"))
    seqs = np.array([128, 1024])
    forward = device.attention(2, seqs, 8, 64)
    assert forward[1] == pytest.approx(device.attention(2, 1024, 8, 64))
    assert (device.attention(2, seqs, 8, 64, backward=True) > forward).all()
    assert device.pointwise(10**8, 10**8) > device.pointwise(10**6, 10**6)


@pytest.mark.parametrize(
    ("method", "args", "options"),
    [
        ("gemm", (0, 4, 4), {}), ("gemm", (4, 4, 4), {"dtype": "int3"}), ("gemm", (4, 4, 4), {"layout": "tt"}),
        ("gemm", (4, 4, 4), {"batch": 2, "layout": "nn"}), ("attention", (1, 16, 4, -64), {}),
        ("attention", (1, 16, 4, 64), {"kernel": "fast"}), ("pointwise", ("much", 4), {}),
    ],
)  # fmt: skip
def test_what_no_kernel_has_is_refused_in_one_line(method: str, args: tuple, options: dict) -> None:
    with pytest.raises(UserError) as refused:
        getattr(Device.load("l40s"), method)(*args, **options)
    assert "\n" not in str(refused.value)
