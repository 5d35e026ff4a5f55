"""Types of elements are PyTorch's."""

import pytest

pytest.importorskip("torch")

import torch

from perfmodel.program.dtypes import FLOATING, ITEMSIZE, promote

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "i64": torch.int64, "bool": torch.bool}


@pytest.mark.parametrize("a", TYPES)
@pytest.mark.parametrize("b", TYPES)
def test_two_types_give_the_one_that_pytorch_gives(a: str, b: str) -> None:
    """A product in bf16 where PyTorch computes in fp32 would be priced at a quarter of its time."""
    assert set(FLOATING) < set(TYPES)
    assert TYPES[promote(a, b)] == torch.promote_types(TYPES[a], TYPES[b])
    assert ITEMSIZE[a] == TYPES[a].itemsize
