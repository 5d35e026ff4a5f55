"""Which kernel attention gets: the tape's rule and that of traced programs were written apart and must be one."""

from itertools import product
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from perfmodel.calls import sdpa
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


@pytest.mark.parametrize(
    ("capability", "cudnn_first", "heads", "masked", "kernel"),
    [
        ("9.0", False, (128, 128), False, "flash"), ("9.0", True, (128, 128), False, "cudnn"),
        ("9.0", True, (256, 256), False, "cudnn"), ("10.3", True, (64, 64), True, "cudnn"),
        ("10.0", True, (256, 256), False, "flash"), ("10.0", True, (256, 256), True, "efficient"),
        ("10.0", True, (192, 128), False, "cudnn"), ("8.0", False, (192, 128), False, "efficient"),
        ("9.0", True, (512, 512), False, "efficient"), ("9.0", False, (128, 128), True, "efficient"),
    ],
)  # fmt: skip
def test_the_kernel_depends_on_what_is_preferred_and_on_the_head(
    capability: str, cudnn_first: bool, heads: tuple[int, int], masked: bool, kernel: str
) -> None:
    """On an H100 FlashAttention-2 takes twice as long as cuDNN's kernel, which not every PyTorch prefers; on a B200 the
    latter has no backward pass of heads of 256, as Gemma's (sdp_utils.cpp).
    """
    found = sdpa.choose(capability, *heads, cudnn_first=cudnn_first, half=True, grouped=False, masked=masked)
    assert found == kernel


@pytest.mark.parametrize(("capability", "kernel"), [("9.0", "cudnn"), ("10.0", "flash")])
def test_a_tape_asks_for_the_head_size(capability: str, kernel: str) -> None:
    """What the rule says of a Gemma's heads must be what a step of it runs."""
    q, k, v = (Parameter(name, (1, 4, 8, 256), "bf16", kind="weight", trainable=False) for name in "qkv")
    with recording(Tape("cuda", capability)) as tape:
        part = tape.begin("attention", PHASES[0])
        sdpa_attention(q, k, v, None, causal=True, p=0.0)
    assert {op.name for op in part.ops if op.name.startswith(FUSED)} == {f"{FUSED}_{kernel}_attention"}
