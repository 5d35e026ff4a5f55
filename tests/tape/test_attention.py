"""Which kernel attention gets: the tape's rule and that of traced programs were written apart and must be one."""

from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from perfmodel.program.part import PHASES
from perfmodel.program.software import SoftwareStack
from perfmodel.tape.attention import sdpa_attention
from perfmodel.tape.core import Tape, recording
from perfmodel.tape.tensor import Parameter
from perfmodel.tracing.cuda_forms import cuda_forms

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CAPABILITIES = ("7.5", "8.0", "8.9", "9.0", "10.0", "10.3", "12.0")
STACKS = [SoftwareStack.of(told) for told in ("current", "torch=2.6", "torch=2.5.0")]
FUSED = "_scaled_dot_product"


def traced(capability: str, stack: SoftwareStack, dtype: str, heads: int, masked: bool) -> set[str]:
    """The fused kernels that PyTorch runs under `cuda_forms`; none is the math path."""
    called: set[str] = set()

    class Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.add(func._schema.name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Names(), cuda_forms(capability, stack):
        q, k, v = (torch.ones(2, h, 8, 16, dtype=DTYPES[dtype]) for h in (4, heads, heads))
        mask = torch.ones(2, 1, 8, 8, dtype=torch.bool) if masked else None
        torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, enable_gqa=heads < 4)
    return {name for name in called if name.startswith(FUSED)}


def recorded(capability: str, stack: SoftwareStack, dtype: str, heads: int, masked: bool) -> set[str]:
    """The same of the tape."""
    q, k, v = (
        Parameter(name, (2, h, 8, 16), dtype, kind="weight", trainable=False)
        for name, h in (("q", 4), ("k", heads), ("v", heads))
    )
    mask = Parameter("mask", (2, 1, 8, 8), "bool", kind="weight", trainable=False) if masked else None
    with recording(Tape("cuda", capability, stack)) as tape:
        part = tape.begin("attention", PHASES[0])
        sdpa_attention(q, k, v, mask, causal=not masked, p=0.0)
    return {op.name for op in part.ops if op.name.startswith(FUSED)}


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: f"torch {stack.as_dict()['torch']}")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_tape_and_trace_choose_the_same_kernel(capability: str, stack: SoftwareStack) -> None:
    """cuDNN's and FlashAttention's differ in speed by tens of per cent, and the math path by much more."""
    for dtype, (heads, masked) in product(DTYPES, ((4, False), (4, True), (2, False))):
        case = capability, stack, dtype, heads, masked
        assert recorded(*case) == traced(*case), case
    assert recorded(capability, stack, "fp32", 4, False) == {f"{FUSED}_efficient_attention"}
