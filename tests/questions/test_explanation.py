"""The answer in words, and where it turns: what a reader acts on.

Sentences are checked by what they must say; crossovers against a plain loop over single predictions.
"""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers import architecture_of, setup_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perfmodel import UserError, compare, explain, predict
from perfmodel.prediction.predict import Prediction
from perfmodel.questions import sentences
from perfmodel.questions.anatomy import PARTS, Anatomy, Phase
from perfmodel.questions.crossover import Crossover
from perfmodel.questions.speedup import SAME, SpeedUp, verdict
from perfmodel.report.crossings import crossing_in_words

BIG = {"model": "llama-3.2-3b", "device": "l40s", "batch": 4, "seq": 210}
LORA = "lora:r=32,targets=q_proj+v_proj"
A100 = "a100-80gb-sxm"
ROOM = 47.4e9  # of 48
LESS = r"47.4 GB \(48.0 GB less CUDA's context and workspaces\)\.$"


def step_of(**parts: float) -> Anatomy:
    """A step of some seconds by part."""
    return Anatomy({**dict.fromkeys(PARTS, 0.0), **parts}, {"forward": Phase(sum(parts.values()))})


def small(method: str, **changes: Any) -> Prediction:
    return replace(predict(architecture_of("llama"), method, setup_of("llama"), "l40s"), **changes)


def sentence(ratio: float, *, a_fits: bool = True, b_fits: bool = True) -> str:
    a, b = small("full", fits=a_fits), small("lora:r=4", fits=b_fits)
    return sentences.answer(a, b, SpeedUp("b", ratio, ratio / 1.1, ratio * 1.1), "because of this", 48e9, ROOM)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (3.1, "LoRA r=4 on q,v is 3.10x faster than full fine-tuning here [2.82 - 3.41], because of this."),
        (0.5, "LoRA r=4 on q,v is 2.00x slower than full fine-tuning here [1.82 - 2.20], because of this."),
        (1.02, "LoRA r=4 on q,v takes about as long as full fine-tuning here (speed-up 1.02 [0.93 - 1.12]), "
               "because of this."),
    ],
)  # fmt: skip
def test_the_verdict_is_a_sentence(ratio: float, said: str) -> None:
    """Slower is told as a factor above 1, and its interval turns with it."""
    assert sentence(ratio) == said


def test_a_method_that_does_not_fit_is_never_silently_recommended() -> None:
    """A speed-up is worth nothing where the step does not run."""
    assert "fit" not in sentence(3.0)
    assert re.search(rf" Only LoRA r=4 on q,v fits: full fine-tuning needs [\d.]+ \wB of {LESS}",
                     sentence(3.0, a_fits=False))  # fmt: skip
    assert re.search(r" Only full fine-tuning fits: LoRA r=4 on q,v needs", sentence(3.0, b_fits=False))
    assert re.search(rf" Neither fits: they need [\d.]+ \wB and [\d.]+ \wB of {LESS}",
                     sentence(3.0, a_fits=False, b_fits=False))  # fmt: skip


STEP = ("optimizer", "clipping")
REASONS: dict[str, tuple[Anatomy, Anatomy, str, str]] = {
    "the optimizer dominates": (
        step_of(gemm_forward=0.1, optimizer=0.2), step_of(gemm_forward=0.1, optimizer=0.001), "faster",
        "because the optimizer step dominates at 840 tokens a step: 200 ms of 300 ms, now 1.00 ms",
    ),
    "its clipping is of the optimizer, as in the row of that name": (
        step_of(gemm_forward=0.1, optimizer=0.2, clipping=0.05), step_of(gemm_forward=0.1, optimizer=0.001), "faster",
        "because the optimizer step with clipping dominates at 840 tokens a step: 250 ms of 350 ms, now 1.00 ms",
    ),
    "a part is gone": (
        step_of(gemm_forward=0.1, gemm_weight_grad=0.1), step_of(gemm_forward=0.1), "faster",
        "because it does without 100 ms of weight-gradient GEMMs",
    ),
    "something is taken back": (
        step_of(gemm_forward=0.1, gemm_weight_grad=0.1), step_of(gemm_forward=0.1, adapter_gemm=0.04), "faster",
        "because it does without 100 ms of weight-gradient GEMMs, though it adds 40.0 ms of adapter GEMMs",
    ),
    "adapters cost more than they save": (
        step_of(gemm_forward=0.1, optimizer=0.03), step_of(gemm_forward=0.1, adapter_pointwise=0.06), "slower",
        "because it adds 60.0 ms of adapter casts and pointwise kernels, more than it saves: 30.0 ms in the optimizer",
    ),
    "the host": (
        step_of(gemm_forward=0.1), step_of(gemm_forward=0.1, waiting=0.05), "slower",
        "because the device waits 50.0 ms longer for the host",
    ),
    "less of the host": (
        step_of(gemm_forward=0.1, waiting=0.05), step_of(gemm_forward=0.1, waiting=0.01), "faster",
        "because the device waits 40.0 ms less for the host",
    ),
    "even": (
        step_of(gemm_forward=0.1, optimizer=0.03), step_of(gemm_forward=0.1, adapter_gemm=0.028), "same",
        "because what it adds, mainly 28.0 ms of adapter GEMMs, uses up what it saves, mainly 30.0 ms in the optimizer",
    ),
    "many small savings": (
        step_of(gemm_forward=0.1, optimizer=0.03, gemm_weight_grad=0.03),
        step_of(gemm_forward=0.1, adapter_gemm=0.04), "faster",
        "because all that it saves, mainly 30.0 ms of weight-gradient GEMMs, outweighs 40.0 ms of adapter GEMMs",
    ),
    "many small costs": (
        step_of(gemm_forward=0.1, optimizer=0.05),
        step_of(gemm_forward=0.1, adapter_gemm=0.04, adapter_pointwise=0.03), "slower",
        "because all that it adds, mainly 40.0 ms of adapter GEMMs, outweighs the saving of 50.0 ms in the optimizer",
    ),
    "no change": (step_of(gemm_forward=0.1), step_of(gemm_forward=0.1), "same",
                  "because no part of the step changes much"),
}  # fmt: skip


OPPOSITE = {"faster": "slower", "slower": "faster", "same": "same"}


@given(ratio=st.floats(0.5, 2.0) | st.floats(0.94, 0.96) | st.floats(1.04, 1.06))
def test_who_asks_the_other_way_round_gets_the_opposite_verdict(ratio: float) -> None:
    """5 % is 5 % of the faster step, whichever of the two is the baseline."""
    assume(abs(ratio - 1 - SAME) > 1e-9)
    assume(abs(1 / ratio - 1 - SAME) > 1e-9)
    assert verdict(1 / ratio) == OPPOSITE[verdict(ratio)]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_a_comparison_turned_round_is_the_same_comparison(batch: int) -> None:
    """Ratio, interval and verdict of A against B and of B against A."""
    methods = ["full", "lora:r=8,targets=all-linear"]
    asked = {"device": "a100-80gb-sxm", "batch": batch, "seq": 128}
    (there,), (back,) = (compare("smollm2-135m", m, **asked).speedups for m in (methods, methods[::-1]))  # type: ignore[arg-type]
    assert back.verdict == OPPOSITE[there.verdict]
    assert (1 / back.ratio, 1 / back.high, 1 / back.low) == pytest.approx((there.ratio, there.low, there.high))


@pytest.mark.parametrize("case", REASONS)
def test_the_reason_is_the_largest_part_of_the_waterfall(case: str) -> None:
    """A verdict without its cause tells nobody what to change."""
    before, after, verdict_, said = REASONS[case]
    assert sentences.why(before, after, verdict_, 840) == said


some_seconds = st.lists(  # whose sums are exact: rounding must not decide which of two is larger
    st.sampled_from([0.0, 1 / 128, 1 / 64, 1 / 16, 1 / 8]), min_size=len(PARTS), max_size=len(PARTS)
)


@settings(derandomize=True, max_examples=300)
@given(a=some_seconds, b=some_seconds)
def test_a_reason_never_contradicts_its_verdict(a: list[float], b: list[float]) -> None:
    """Faster in spite of more added than saved is only true of sums, and must then be said of sums."""
    before, after = (step_of(**dict(zip(PARTS, seconds, strict=True))) for seconds in (a, b))
    assume(sum(a) and sum(b))
    said = sentences.why(before, after, verdict(before.total / after.total), 1000)
    assert said.startswith("because ")
    change = [y - x for name, x, y in zip(PARTS, a, b, strict=True) if name not in STEP]
    change.append(sum(after.parts[name] - before.parts[name] for name in STEP))  # told as one
    down, up = -min(change), max(change)
    if "though it adds" in said:
        assert down > up
    if "more than it saves:" in said:
        assert up > down


def test_the_sentences_of_the_two_stories() -> None:
    """The README's two cases: the optimizer makes full fine-tuning slow, fp32 adapters make LoRA slow."""
    (fast,) = compare(methods=("full", LORA), **BIG).speedups
    assert fast.answer.startswith("LoRA r=32 on q,v is 2.")
    assert "because the optimizer step with clipping dominates at 840 tokens a step" in fast.answer
    (slow,) = compare("tinyllama-1.1b", ("full", "lora:r=8,targets=all-linear"), device="a100-80gb-sxm", batch=4,
                      seq=512).speedups  # fmt: skip
    assert "slower than full fine-tuning here" in slow.answer
    assert "of adapter GEMMs" in slow.answer


def test_a_grid_of_comparisons_has_verdicts_but_no_sentence() -> None:
    """Sweeps compare arrays; a reason needs one setup."""
    (s,) = compare(architecture_of("llama"), ("full", "lora"), device="l40s", batch=2, seq=np.array([16, 64])).speedups
    assert s.verdict.shape == (2,)
    assert s.answer == ""


def ratio_of(model: Any, a: str, b: str, device: str, **setup: Any) -> float:
    one, two = (predict(model, m, device=device, **setup) for m in (a, b))
    return float(one.time.phases["total"] / two.time.phases["total"])


def changes_of(ratios: dict[int, float]) -> list[tuple[int, str, str]]:
    """Every change of the verdict between neighbours."""
    told = [(value, verdict(ratio)) for value, ratio in sorted(ratios.items())]
    return [(v, one, two) for (_, one), (v, two) in pairwise(told) if one != two]


ALL, HALF = "lora:r={r},targets=all-linear", "lora:r={r},targets=all-linear,adapter_dtype=bf16"
CROSSING: dict[str, tuple[str, str, str, dict[str, Any], tuple[str, ...]]] = {
    "batch and seq": ("tinyllama-1.1b", "full", ALL, {"batch": 4, "seq": 512}, ("batch", "seq")),
    "a batch of 1": ("gpt2", "lora:r={r}", "full", {"batch": 1, "seq": 256}, ("batch", "seq", "size")),
    "rank": ("tinyllama-1.1b", "full", HALF, {"batch": 4, "seq": 128}, ("size",)),
}


@pytest.mark.parametrize("case", CROSSING)
def test_crossovers_agree_with_single_predictions(case: str) -> None:
    """Every point is what `predict` says of it, and every change lies between two consecutive integers."""
    model, a, b, setup, axes = CROSSING[case]
    found = explain(model, a.format(r=8), b.format(r=8), device=A100, axes=axes, **setup).crossovers
    assert [c.axis for c in found] == [{"size": "r"}.get(axis, axis) for axis in axes]
    for c in found:
        edges = {v for change in c.changes for v in (change.value - 1, change.value)}
        assert edges <= set(c.values), "a change between two points that are not neighbours"
        for value in {c.here, c.values[0], c.values[len(c.values) // 2], c.values[-1], *edges}:
            point = {"batch": setup["batch"], "seq": setup["seq"], "r": 8, c.axis: value}
            r = point.pop("r")
            single = ratio_of(model, a.format(r=r), b.format(r=r), A100, **point)
            i = c.values.index(value)
            assert c.ratio[i] == pytest.approx(single, rel=1e-12)
            assert c.verdict[i] == verdict(single)


def test_crossovers_agree_with_brute_force() -> None:
    """Over a range in which every integer is a point, no change may be missed or made up."""
    b = ALL.format(r=8)
    (c,) = explain(
        "tinyllama-1.1b", "full", b, device=A100, host="epyc-genoa", batch=3, seq=128, axes=("batch",)
    ).crossovers
    dense = {v: ratio_of("tinyllama-1.1b", "full", b, A100, batch=v, seq=128, host="epyc-genoa") for v in range(2, 17)}
    assert len(changes_of(dense)) >= 3, "the test needs a range with changes"
    assert [(x.value, x.before, x.after) for x in c.changes if x.value <= 16] == changes_of(dense)


def test_one_target_after_another() -> None:
    """The method's own targets come first, then the rest of the block; each point is a prediction of its own."""
    (c,) = explain("tinyllama-1.1b", "full", "lora:targets=q_proj+v_proj", device="a100-80gb-sxm", batch=4, seq=512,
                   axes=("targets",)).crossovers  # fmt: skip
    assert c.names[:3] == ("q_proj", "v_proj", "k_proj")
    assert (c.here, c.values) == (2, [1, 2, 3, 4, 5, 6, 7])
    for n, ratio in zip(c.values, c.ratio, strict=True):
        targets = "+".join(c.names[:n])
        assert ratio == pytest.approx(
            ratio_of("tinyllama-1.1b", "full", f"lora:targets={targets}", "a100-80gb-sxm", batch=4, seq=512)
        )


def test_blocks_are_tried_one_by_one() -> None:
    """k is a number of blocks: another program each, up to all of them."""
    (c,) = explain("gpt2", "full", "top_k:k=3", device="l40s", batch=2, seq=64, axes=("size",)).crossovers
    assert (c.axis, c.here, c.values) == ("k", 3, [1, 2, 3, 4, 8, 12])
    assert c.ratio == sorted(c.ratio, reverse=True)


def test_an_unknown_axis_is_a_mistake() -> None:
    with pytest.raises(UserError, match="batch, seq, size, targets"):
        explain("gpt2", axes=("rank",))


@pytest.mark.parametrize(
    ("multiple", "shared"), [(4, {"tp": 4, "sequence_parallel": True, "nodes": 3}), (6, {"cp": 3, "nodes": 2})]
)
def test_sizes_that_ranks_share_are_tried_in_their_steps(multiple: int, shared: dict[str, Any]) -> None:
    """Other lengths and ranks are refused; a change still lies between two that follow one another."""
    setup = {"gpus": 12, "parallel": "fsdp2", "batch": 4, "seq": 12 * multiple, **shared}
    lengths, ranks = explain("tinyllama-1.1b", "full", "lora", device=A100, axes=("seq", "size"), **setup).crossovers
    assert (lengths.here, ranks.here) == (12 * multiple, 8)
    assert all(value % multiple == 0 for value in lengths.values)
    assert {change.value - multiple for change in lengths.changes} <= set(lengths.values)
    assert min(ranks.values) == (4 if "tp" in shared else 2)


@pytest.mark.parametrize("options", [{}, {"batch": 4, "lengths": "100:200"}])
def test_parts_of_tensor_parallel_ranks_are_cut_once(options: dict[str, Any]) -> None:
    """What is asked again of an answer is asked of the whole model: the verdict along an axis is the verdict here."""
    setup = {"gpus": 2, "tp": 2, "batch": 2, "seq": 128, **options}
    found = explain("tinyllama-1.1b", "full", "lora", device=A100, axes=("batch",), **setup)
    (c,) = found.crossovers
    assert c.ratio[c.values.index(c.here)] == pytest.approx(found.speedup.ratio, rel=1e-9)
    assert sum(found.before.parts.values()) == pytest.approx(found.a.time.phases["total"], rel=1e-9)


@pytest.mark.parametrize(("axis", "setup"), [("seq", {"batch": 2, "seq": 300}), ("batch", {"batch": 3, "seq": 128})])
def test_no_stretch_of_an_axis_is_passed_over(axis: str, setup: dict[str, int]) -> None:
    """A verdict that turns twice between two points would be missed: each is at most a quarter above the one before."""
    (found,) = explain("gpt2", "full", "lora", device=A100, axes=(axis,), **setup).crossovers
    assert setup[axis] in found.values
    assert max(found.values) >= 2 * setup[axis]
    for low, high in pairwise(found.values):
        assert high <= max(low + 1, 1.27 * low)  # a quarter, rounded


def axis(verdicts: str, **extra: Any) -> Crossover:
    """An axis 1, 2, 3, … with verdicts by their first letters."""
    full = [{"f": "faster", "s": "slower", "=": "same"}[v] for v in verdicts]
    values = list(range(1, len(full) + 1))
    fits = {"fits_a": [True] * len(full), "fits_b": [True] * len(full), **extra}
    return Crossover("batch", "", 1, values, [1.0] * len(full), full, **fits)


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ("f", "batch 1: faster throughout, speed-up 1.00 to 1.00"),
        ("fs", "batch 1 to 2: faster up to 1, slower from 2 on"),
        ("fff", "batch 1 to 3: faster throughout, speed-up 1.00 to 1.00"),
        ("ffs", "batch 1 to 3: faster up to 2, slower from 3 on"),
        ("f==s", "batch 1 to 4: faster up to 1, the same at 2 to 3, slower from 4 on"),
        ("f=f=fss", "batch 1 to 7: faster up to 1, slower from 6 on, turning 5 times in between"),
    ],
)
def test_crossovers_in_words(verdicts: str, said: str) -> None:
    """Where the advice ends must be readable at a glance, also where the verdict flickers."""
    assert crossing_in_words(axis(verdicts), ("A", "B")) == said


def test_a_verdict_that_never_turns_is_told_with_the_speed_up_at_both_ends() -> None:
    """Whether it grows or fades along the axis is all that is left to say."""
    fading = replace(axis("fff"), ratio=[2.5, 1.8, 1.3])
    assert crossing_in_words(fading, ("A", "B")) == "batch 1 to 3: faster throughout, speed-up 2.50 to 1.30"


def test_crossovers_say_where_memory_ends() -> None:
    """A verdict beyond the memory is no advice."""
    told = crossing_in_words(axis("fff", fits_a=[True, False, False], fits_b=[True, True, False]), ("A", "B"))
    assert told.endswith("; in memory: A up to 1, B up to 2 (of the values tried)")
    assert crossing_in_words(axis("f", fits_a=[False]), ("A", "B")).endswith(
        "; in memory: A nowhere, B up to 1 (of the values tried)"
    )


def test_flutter_at_the_edge_of_a_verdict_is_not_told() -> None:
    """ "The same at 375 to 376, faster at 377" is noise of the tile sizes, not a place where anything turns."""
    turning = replace(axis("ff==f=="), values=[64, 374, 375, 376, 377, 378, 512])
    told = crossing_in_words(turning, ("A", "B"))
    assert told == "batch 64 to 512: faster up to 374, the same from 378 on"


@pytest.mark.parametrize(("lengths", "of"), [("300:900", "longest micro-batch"), ("300:300", "step"), (None, "step")])
def test_kernels_of_unequal_micro_batches_are_told_to_be_those_of_the_longest(lengths: str | None, of: str) -> None:
    """110 ms of kernels stood below a step of 71 ms."""
    found = explain("smollm2-135m", "full", "lora", device="l40s", batch=4, seq=1024, lengths=lengths)
    assert found.as_dict()["kernels_of"] == of
    assert bool(found.of_longest) == (of != "step")
