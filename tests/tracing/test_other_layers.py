"""Layers that no language model has, as modules of one's own: their products are those that PyTorch counts."""

from typing import Any

import pytest

pytest.importorskip("peft")

import torch
from torch.utils.flop_counter import FlopCounterMode

from perfmodel import predict_module


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (torch.nn.ConvTranspose1d(8, 8, 6, stride=4), (2, 8, 30)),
        (torch.nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1), (2, 8, 6, 6)),
        (torch.nn.ConvTranspose2d(8, 4, 3), (2, 8, 6, 6)),
        (torch.nn.Conv2d(8, 8, 3, stride=2), (2, 8, 9, 9)),
        (torch.nn.LSTM(16, 16, batch_first=True), (2, 5, 16)),
        (torch.nn.GRU(16, 16), (5, 2, 16)),
    ],
)
def test_products_of_other_layers_are_those_that_torch_counts(module: torch.nn.Module, x: tuple[int, ...]) -> None:
    """Transposed filters of as many channels were taken for plain ones, a CPU's LSTM for a call without products."""

    def squared(out: Any) -> torch.Tensor:
        return (out[0] if isinstance(out, tuple) else out).pow(2).mean()  # type: ignore[no-any-return]

    p = predict_module(module, torch.ones(x), loss=squared, device="a100-80gb-sxm")
    with FlopCounterMode(display=False) as counter, torch.backends.mkldnn.flags(enabled=False):
        squared(module(torch.ones(x))).backward()  # type: ignore[no-untyped-call]
    assert p.flops["total"] == counter.get_total_flops()
