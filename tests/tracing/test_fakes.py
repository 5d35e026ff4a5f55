"""Results of fake tensors that are remembered are those that PyTorch gives."""

from typing import Any

import pytest
from helpers import config_of, setup_of

pytest.importorskip("peft")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from perfmodel.tracing import trace
from perfmodel.tracing.fakes import Fakes
from validate.oracle import counts
from validate.oracle.cases import MIXTURES, STACKS, Case, Config

LORA = "lora:r=4,targets=all-linear,dropout=0.1"
CASES = [
    Case(config_of("llama"), LORA, setup_of("llama", padded=True, checkpoint="block", dtype="fp32", amp="bf16")),
    Case(config_of("gpt2"), "full", setup_of("gpt2", padded=True, grad_accum=2)),
    Case(Config(MIXTURES["mixtral"], "mixtral", "mixtral"), "full", setup_of("llama", padded=True)),
    Case(Config(STACKS["t5"], "t5", "t5"), "full", setup_of("llama", padded=True, optimizer="adamw-foreach")),
]


def told(out: Any, args: Any) -> Any:
    """All that a program can see of a result: what it is, and which arguments change with it."""
    if isinstance(out, (list, tuple)):
        return [told(one, args) for one in out]
    if not isinstance(out, torch.Tensor):
        return type(out)
    storage = out.untyped_storage()
    taken = [t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
    shared = [i for i, key in enumerate(taken) if key == storage._cdata]
    return out.shape, out.stride(), out.dtype, out.device, out.storage_offset(), storage.nbytes(), shared


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.config.name)
def test_every_result_is_that_of_pytorch(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, strides, dtype, device and storage of every call of whole steps, most of them remembered."""
    asked: list[Any] = []
    worked_out: list[Any] = []
    dispatch = FakeTensorMode.dispatch

    class Checked(Fakes):
        def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            theirs = dispatch(self, func, types, args, kwargs)
            asked.append(func)
            ours = super().dispatch(func, types, args, kwargs)
            assert told(ours, args) == told(theirs, args), func
            return ours

    def counted(*args: Any) -> Any:
        worked_out.append(args[1])
        return dispatch(*args)

    monkeypatch.setattr(FakeTensorMode, "dispatch", counted)
    monkeypatch.setattr(trace, "Fakes", Checked)
    assert counts.compare_case(case).differences == []
    assert len(worked_out) < len(asked) / 4


def test_tensors_that_are_alike_but_for_one_thing_are_told_apart() -> None:
    """A product of another dtype, layout or device is another one."""
    with Fakes() as fakes:
        a, b = torch.empty(4, 6), torch.empty(6, 4)
        for left, right in ((a, b), (a, b), (b.t(), b), (a.double(), b.double()), (a.half(), b.half())):
            assert (left @ right).dtype == left.dtype
        known = [key for key in fakes.known if key[0] == id(torch.ops.aten.mm.default)]
        assert len(known) == 4
        ints = torch.zeros(2, dtype=torch.long)
        assert (ints * 0.5).dtype == torch.float32
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert (ints * 0.5).dtype == torch.bfloat16
        finally:
            torch.set_default_dtype(torch.float32)
        assert (ints * 2).dtype == torch.long


def test_a_result_that_shares_its_storage_is_asked_for_again() -> None:
    """What is written to one is seen in the other."""
    with Fakes():
        x = torch.empty(3, 4)
        for _ in range(2):
            kept = torch.ops.aten._unsafe_view(x, [12])
            assert kept.untyped_storage()._cdata == x.untyped_storage()._cdata
            grown = torch.empty(2)
            grown.resize_(5)
            assert grown.shape == (5,)
