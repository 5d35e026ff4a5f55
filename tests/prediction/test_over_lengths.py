"""Padding, packing and lengths of documents: laws that hold whatever the model of a kernel says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import predict
from perfmodel.devices import host as hosts
from perfmodel.devices.device import profile_of
from perfmodel.errors import UserError
from perfmodel.prediction.over_lengths import drawn
from perfmodel.program.part import PHASES
from perfmodel.questions.anatomy import WAITING, dissect

MODEL, DEVICE = "tinyllama-1.1b", "a100-80gb-sxm"
few = settings(max_examples=15, derandomize=True)
attentions = st.sampled_from(("sdpa", "eager", "flash2"))


def answer(**setup: Any) -> Any:
    """A prediction of LoRA."""
    return predict(MODEL, "lora:r=8", device=DEVICE, **setup)


def seconds(**setup: Any) -> float:
    """Its step time."""
    return float(answer(**setup).time.phases["total"])


@few
@given(batch=st.integers(1, 8), seq=st.integers(32, 1500), attention=attentions, grouped=st.booleans())
def test_constant_lengths_are_the_plain_step(batch: int, seq: int, attention: str, grouped: bool) -> None:
    """A distribution without spread says nothing new: the answer must not move."""
    plain = answer(batch=batch, seq=seq, attention=attention)
    for setup in ({"lengths": f"{seq}:{seq}"}, {"lengths": [9 * seq], "group_by_length": grouped}):
        same = answer(batch=batch, seq=seq, attention=attention, **setup)
        assert same.time.phases == pytest.approx(plain.time.phases)
        assert (same.flops, same.kernels, same.memory, same.padding) == (plain.flops, plain.kernels, plain.memory, 0.0)
        assert same.tokens_per_second == pytest.approx(plain.tokens_per_second)


@few
@given(batch=st.integers(1, 8), mean=st.integers(50, 1000), more=st.integers(1, 500), attention=attentions)
def test_longer_documents_are_never_faster(batch: int, mean: int, more: int, attention: str) -> None:
    """More tokens cannot take less time, padded, packed or flat."""
    for packing in ("none", "varlen", "flat"):
        short, long = (
            seconds(batch=batch, seq=2048, attention=attention, packing=packing, lengths=f"{m}:{2 * m}")
            for m in (mean, mean + more)
        )
        assert short <= long * 1.005


@few
@given(batch=st.integers(2, 8), mean=st.integers(50, 600), spread=st.floats(1.2, 3.0), attention=attentions)
def test_padding_is_what_micro_batches_have_too_much(batch: int, mean: int, spread: float, attention: str) -> None:
    """Larger micro-batches pad more, sorting pads less, and what counts is the tokens of the documents."""
    given = {"seq": 4096, "attention": attention, "lengths": f"{mean}:{mean * spread}"}
    here, larger = answer(batch=batch, **given), answer(batch=2 * batch, **given)
    grouped = answer(batch=batch, group_by_length=True, **given)
    assert 0 <= grouped.padding < here.padding < larger.padding < 1
    assert grouped.time.phases["total"] <= here.time.phases["total"] * 1.0001  # the host may be what takes longest
    assert here.setup.tokens == pytest.approx(batch * mean, rel=0.05)
    assert here.memory.peak >= answer(batch=batch, seq=4096, attention=attention).memory.peak * 0.9


@few
@given(mean=st.integers(100, 1000), seq=st.sampled_from((2048, 4096, 8192)))
def test_packed_rows_serve_tokens_faster_than_padded_ones(mean: int, seq: int) -> None:
    """With flash-attn a packed row has no padding and no pair of tokens more than the documents have."""
    given = {"seq": seq, "attention": "flash2", "batch": 4, "lengths": f"{mean}:{2.5 * mean}"}
    packed, padded = answer(packing="varlen", **given), answer(**given)
    assert packed.tokens_per_second > padded.tokens_per_second
    assert packed.flops["total"] / packed.setup.tokens < padded.flops["total"] / padded.setup.tokens


@few
@given(shorter=st.integers(2, 16), batch=st.integers(1, 4))
def test_attention_within_documents_follows_the_squares_of_their_lengths(shorter: int, batch: int) -> None:
    """Half as long documents have half the pairs: the FLOPs that are no attention's stay."""
    row = {"seq": 4096, "batch": batch, "attention": "flash2", "packing": "varlen"}
    whole, parts = answer(**row), answer(lengths=[4096 // shorter], **row)
    rest = answer(lengths=[1], **row).flops["total"]  # each token sees itself
    share = (4096 // shorter) / 4096
    assert (parts.flops["total"] - rest) / (whole.flops["total"] - rest) == pytest.approx(share, rel=0.01, abs=1e-3)
    assert parts.time.phases["total"] < whole.time.phases["total"]


def test_a_mask_of_the_row_costs_sdpa_all_of_it_whatever_the_documents() -> None:
    """SDPA computes what the mask then hides: short documents make nothing faster."""
    row = {"seq": 2048, "batch": 2, "packing": "varlen"}
    assert seconds(lengths=[100], **row) == seconds(lengths=[1000], **row) > seconds(seq=2048, batch=2)


def test_dense_rows_are_plain_rows_without_padding() -> None:
    """Documents behind one another under one causal mask are one sample to the program."""
    plain, dense = answer(batch=2, seq=1024), answer(batch=2, seq=1024, packing="dense", lengths="100:300")
    assert dense.time == plain.time
    assert dense.memory == plain.memory
    assert dense.tokens_per_second == plain.tokens_per_second


def test_flat_rows_hold_as_many_tokens_as_their_samples() -> None:
    """Without padding a micro-batch is as long as its documents, and at the worst as long as it may be."""
    flat = answer(batch=4, seq=2048, packing="flat", attention="flash2", lengths=[100, 300])
    as_one = answer(batch=1, seq=800, packing="varlen", attention="flash2", lengths=[100, 300])
    assert flat.time.phases["total"] == pytest.approx(as_one.time.phases["total"], rel=1e-6)
    worst = answer(batch=4, seq=300, packing="flat", attention="flash2")
    assert flat.memory.peak == worst.memory.peak > as_one.memory.peak


@pytest.mark.parametrize("attention", ["sdpa", "flash2"])
@pytest.mark.parametrize(
    "extra", [{}, {"group_by_length": True}, {"packing": "varlen"}, {"packing": "flat"}, {"packing": "dense"}]
)
def test_a_grid_gives_what_its_points_give(attention: str, extra: dict[str, Any]) -> None:
    """Sweeps and crossovers ask for grids, of which some points have no padding."""
    batch, seq = np.array([1, 2, 2, 5]), np.array([300, 60, 700, 700])
    given = {"attention": attention, "lengths": [100, 200, 400, 900], **extra}
    grid = answer(batch=batch, seq=seq, **given)
    for i, (b, s) in enumerate(zip(batch, seq, strict=True)):
        one = answer(batch=int(b), seq=int(s), **given)
        assert grid.time.phases["total"][i] == pytest.approx(one.time.phases["total"], rel=1e-9)
        assert grid.flops["total"][i] == one.flops["total"]
        assert grid.memory.peak[i] == one.memory.peak
        assert np.broadcast_to(grid.padding, 4)[i] == pytest.approx(one.padding)
        assert grid.tokens_per_second[i] == pytest.approx(one.tokens_per_second)


def test_ranks_may_vary_where_lengths_do() -> None:
    """An explanation's axes are grids over a method's size too."""
    ranks = np.array([2, 8, 64])
    from perfmodel.methods import parse

    method = replace(parse("lora:r=2"), r=ranks)  # type: ignore[call-arg]
    grid = predict(MODEL, method, device=DEVICE, batch=3, seq=512, lengths="100:300")
    one = predict(MODEL, "lora:r=8", device=DEVICE, batch=3, seq=512, lengths="100:300")
    assert grid.time.phases["total"][1] == pytest.approx(one.time.phases["total"], rel=1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "flash2"])
def test_the_parts_of_a_mean_step_add_up_to_it(attention: str) -> None:
    """An explanation of an averaged step is the average of the steps' parts."""
    p = answer(batch=4, seq=1024, attention=attention, lengths="100:300")
    on = profile_of(DEVICE)
    apart = dissect(p, on, hosts.host_of("default", on))
    assert sum(apart.parts.values()) == pytest.approx(p.time.phases["total"])
    assert apart.total == pytest.approx(p.time.phases["total"])
    assert sum(share for share, _ in drawn(p.setup)) == pytest.approx(1.0)


@pytest.mark.parametrize("packing", ["none", "flat"])
@pytest.mark.parametrize("form", [{"parallel": "ddp"}, {"parallel": "fsdp2"}, {"parallel": "zero1"}])
def test_several_gpus_wait_for_the_one_with_the_most(form: dict[str, Any], packing: str) -> None:
    """Work of a rank stays what it was on average; who meets in every micro-batch waits longer than once a step."""
    given = {"batch": 8, "seq": 2048, "lengths": "600:1800", "packing": packing, "grad_accum": 4}
    alone, together = answer(**given), answer(**given, gpus=8, **form)
    plain, alike = (answer(**{**given, "lengths": [1024]}, **several) for several in ({}, form | {"gpus": 8}))
    longer, longer_alike = (
        b.time.phases["total"] / a.time.phases["total"] for a, b in ((alone, together), (plain, alike))
    )
    assert longer > 1.05 * longer_alike
    assert together.time.low <= together.time.phases["total"] <= together.time.high
    assert together.padding == alone.padding
    assert together.mfu < alone.mfu
    more = answer(**given, gpus=64, **form)
    assert more.time.phases["total"] > together.time.phases["total"]
    lockstep = answer(**given, gpus=8, parallel="fsdp2").time.phases["total"]
    assert together.time.phases["total"] <= 1.05 * lockstep
    numbers = answer(**given, gpus=np.array([1, 8, 64]), **form)
    for found, one in zip(numbers.time.phases["total"], (alone, together, more), strict=True):
        assert found == pytest.approx(one.time.phases["total"], rel=1e-9)
    on = profile_of(DEVICE)
    apart = dissect(together, on, hosts.host_of("default", on))
    assert sum(apart.parts.values()) == pytest.approx(together.time.phases["total"])
    of_host = sum(dissect(p, on, hosts.host_of("default", on)).parts[WAITING] for p in (alone, alike))
    assert apart.parts[WAITING] <= of_host + 1e-3  # who waits for another rank does not wait for the host


@pytest.mark.parametrize("packing", ["none", "flat"])
def test_the_table_of_a_pipeline_is_that_of_its_step(packing: str) -> None:
    """Ranks that wait longer than the step takes would contradict it, as would peaks above that of the step."""
    given = {"batch": 1, "seq": 2048, "gpus": 4, "pp": 2, "parallel": "ddp", "grad_accum": 4, "packing": packing}
    found, full = answer(**given, lengths="300:900"), answer(**given)
    assert found.pipeline.time == found.time
    assert found.pipeline.bubble < 0.7 * full.pipeline.bubble
    for stage, fuller in zip(found.pipeline.stages, full.pipeline.stages, strict=True):
        assert stage.forward < fuller.forward
        assert stage.backward < fuller.backward
        assert stage.waiting < found.time.phases["total"]
        assert stage.peak == fuller.peak
    assert max(stage.peak for stage in found.pipeline.stages) == found.memory.peak


@pytest.mark.parametrize(
    ("model", "method", "setup", "complaint"),
    [
        ("gpt2", "full", {"packing": "varlen"}, "not modelled for gpt2; use packing dense"),
        (MODEL, "prompt_tuning", {"packing": "varlen"}, "virtual tokens"),
        (MODEL, "full", {"packing": "varlen", "compile": "default"}, "use packing dense"),
        (MODEL, "full", {"packing": "dense", "padded": True}, "leaves no padding"),
        (MODEL, "full", {"packing": "dense", "group_by_length": True}, "leaves no padding"),
        (MODEL, "full", {"packing": "varlenn"}, "varlen"),
        ("gpt2", "full", {"padded": True, "attention": "flash2"}, "use sdpa"),
    ],
)
def test_what_does_not_go_together_is_refused(model: str, method: str, setup: dict[str, Any], complaint: str) -> None:
    """A program that nobody checked must not be answered for."""
    with pytest.raises(UserError, match=complaint):
        predict(model, method, device=DEVICE, batch=2, seq=128, **setup)


@pytest.mark.parametrize("packing", ["none", "varlen"])
def test_flash_attn_on_a_cpu_is_refused(packing: str) -> None:
    """The package runs on GPUs only."""
    with pytest.raises(UserError, match="GPU only"):
        predict(MODEL, "full", device="cpu-epyc-genoa-2c", batch=1, seq=64, packing=packing, attention="flash2")


def test_the_answer_says_what_share_is_padding() -> None:
    """The line that tells a user to pack."""
    notes = answer(batch=4, seq=1024, lengths="100:300").notes
    assert any("of the tokens are padding" in note for note in notes)
    notes = answer(batch=4, seq=1024, packing="varlen", attention="flash2").notes
    assert any("--lengths" in note for note in notes)


@pytest.mark.parametrize("spec", ["20:40", "7:9", "300:900"])
def test_means_of_phases_add_up_to_the_mean_of_the_step(spec: str) -> None:
    """Numbers rounded apart would differ by one from the sum that stands beside them."""
    for batch in range(1, 9):
        p = predict("llama-3.2-1b", "reslora", device="l40s", batch=batch, seq=64, lengths=spec)
        for counted in (p.kernels, p.dispatches, p.flops, p.bytes):
            assert counted["total"] == sum(counted[phase] for phase in PHASES)
