"""What a trace is made of: the answers to reads of data, what an op says of its call, where a block's calls stand."""

from collections import Counter

import pytest

pytest.importorskip("torch")

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from perfmodel.program.marks import BEFORE, BEHIND, IN, OUT, marking
from perfmodel.tracing import growth, modules, parts
from perfmodel.tracing.calls import Calls
from perfmodel.tracing.cuda_forms import cuda_forms
from perfmodel.tracing.trace import CallRecorder


@pytest.mark.parametrize("dense", [True, False])
def test_reads_of_data_are_answered_as_a_batch_answers_them(dense: bool) -> None:
    """Is the mask all ones (of a padded batch it is not)? Is any value infinite? How many are there?"""
    recorder = CallRecorder(dense=dense)
    with FakeTensorMode(), recorder.observe("forward"):
        mask = torch.ones(2, 3, dtype=torch.bool)
        assert bool(mask.all()) is dense
        assert bool(mask.flatten()[:1]) is True
        assert bool(torch.isinf(torch.ones(2)).any()) is False
        assert int(mask.sum()) == 1


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_causal_where_the_call_says_so(causal: bool) -> None:
    """A causal kernel leaves out half of its products; PyTorch does not pass on a flag that has its default."""
    calls, q = Calls(cuda=True), torch.ones(1, 2, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    recorder = CallRecorder(keep=calls.keep)
    recorder.recording = True
    with FakeTensorMode(allow_non_fake_inputs=True), cuda_forms("8.0"), recorder.observe("forward"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)
    assert [op.attrs.causal for op in calls.ops.values() if "scaled_dot_product" in op.name] == [causal]


@pytest.mark.parametrize(
    ("base", "more", "added", "start"),
    [("ab", "azb", "z", 1), ("xb", "xab", "a", 1), ("ab", "abcd", "cd", 2), ("bc", "abcd", None, 0)],
)
def test_the_calls_of_a_further_block_are_found_in_one_place(
    base: str, more: str, added: str | None, start: int
) -> None:
    """Their order decides what waits for what; calls that stand in two places have none."""

    def keys(text: str) -> list[growth.Key]:
        return [(0, phase, (name,)) for phase in ("forward", "backward") for name in text]

    adds = Counter(keys(more)) - Counter(keys(base))
    found, behind = growth._inserted(keys(more), keys(base), adds, 0, 0)
    assert found == (None if added is None else keys(added))
    assert behind == {(0, "forward"): start, (0, "backward"): start}


def test_a_block_among_others_that_are_like_it_stands_in_its_own_place() -> None:
    """A further frozen block ran behind those that train, whose forward calls are the same."""

    def keys(blocks: int) -> list[growth.Key]:
        forward = [(IN, "b"), ("mm", ""), (OUT, "b")] * blocks
        backward = [(BEFORE, "b"), ("mm", ""), (BEHIND, "b")] * blocks
        calls = (("forward", [("embedding", ""), *forward, ("loss", "")]), ("backward", [("loss", ""), *backward]))
        return [(0, phase, (marking(*call).name if call[1] else call[0],)) for phase, those in calls for call in those]

    more, base = keys(4), keys(3)
    adds = Counter(more) - Counter(base)
    for below in range(4):
        found, behind = growth._inserted(more, base, adds, below, 3 - below)
        assert found is not None
        assert Counter(found) == adds
        assert behind == {(0, "forward"): 1 + 3 * below, (0, "backward"): 1 + 3 * (3 - below)}


@pytest.mark.parametrize(
    ("shape", "dtype", "seq"),
    [((5, 16), "int64", 16), ((5, 16), "float32", 1), ((5, 7, 16), "float32", 7), ((5, 3, 8, 8), "float32", 1)],
)
def test_tokens_have_a_length_features_and_images_have_none(shape: tuple[int, ...], dtype: str, seq: int) -> None:
    """Tokens a second follow from it: 16 features of a sample are no 16 tokens."""
    setup = modules._setup(torch.nn.Linear(16, 3), torch.zeros(shape, dtype=getattr(torch, dtype)))
    assert (setup.batch, setup.seq, setup.dtype) == (5, seq, "fp32")


def test_work_of_the_host_is_counted_under_a_name_that_has_a_price() -> None:
    """A name misspelt where work is counted would be host time that nobody misses."""
    place = (0, "backward")
    counted, misspelt = (growth.Term(1, Counter(), Counter({(place, name): 3}), []) for name in ("hooks", "hook"))
    assert parts._parts(counted, Calls(), place)[0].host.hooks == 3
    with pytest.raises(AttributeError, match="hook"):
        parts._parts(misspelt, Calls(), place)
