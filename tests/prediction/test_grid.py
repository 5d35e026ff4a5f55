"""A sweep is one prediction: a grid of setups must give, point by point, what each setup gives alone.

Also here: the totals of a prediction are the sum of their parts, however one cuts them.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from grids import check_every_point
from helpers import FIGURES, METHODS, NAMES, architecture_of, setup_of
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel.calls import costs
from perfmodel.devices import profile
from perfmodel.errors import UserError
from perfmodel.methods import parse
from perfmodel.methods.lora import Lora
from perfmodel.methods.parts.base import Method
from perfmodel.methods.top_k import TopK
from perfmodel.prediction.predict import predict
from perfmodel.program.dims import Axis, formed_once
from perfmodel.program.part import PHASES
from perfmodel.setup import Setup
from validate.oracle.cases import with_targets

few = settings(max_examples=30, derandomize=True)
names = st.sampled_from(NAMES)
sizes = st.lists(st.one_of(st.just(1), st.integers(1, 64)), min_size=1, max_size=4)
DEVICES = ("l40s", next(name for name in profile.names() if name.startswith("cpu")))


@few
@given(*(st.lists(st.integers(1, 9), min_size=2, max_size=2) for _ in range(2)), st.integers(0, 9))
def test_dims_of_a_grid_calculate_as_arrays_do(a: list[int], b: list[int], n: int) -> None:
    """What is formed once is what an array would have given, the same object each time, and nobody writes to it."""
    x, y = np.array(a).view(Axis), np.array(b).view(Axis)
    with formed_once():
        for _ in range(2):  # once made, once remembered
            assert (x * y).tolist() == (np.array(a) * np.array(b)).tolist()
            assert (x * n).tolist() == (n * x).tolist() == [n * v for v in a]
            assert (x + y).tolist() == [v + w for v, w in zip(a, b, strict=True)]
            assert sum([x, y, n]).tolist() == [v + w + n for v, w in zip(a, b, strict=True)]
            assert (-(-x // (n + 1))).tolist() == [-(-v // (n + 1)) for v in a]
        with formed_once():
            made = x * y
        assert made is x * y is y * x
        assert x * n is n * x
        with pytest.raises(ValueError, match="read-only"):
            (x * y)[0] = 0
    assert (x * y).tolist() == made.tolist()
    assert x * y is not x * y  # steps are kept for days, and with them what is remembered of their dims


@few
@given(
    name=names, method=st.sampled_from(METHODS), batches=sizes, seqs=sizes, device=st.sampled_from(DEVICES),
    attention=st.sampled_from(("sdpa", "eager")), checkpoint=st.sampled_from(("none", "block", "block-reentrant")),
    precision=st.sampled_from(({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp32", "amp": "bf16"})),
    optimizer=st.sampled_from(("adamw", "adamw-fused", "sgd")), accum=st.integers(1, 2),
    padded=st.booleans(), compiled=st.sampled_from(("none", "default", "reduce-overhead")),
)  # fmt: skip
def test_a_grid_of_batch_and_seq_equals_its_points(
    name: str, method: str, batches: list[int], seqs: list[int], device: str, attention: str, checkpoint: str,
    precision: dict[str, Any], optimizer: str, accum: int, padded: bool, compiled: str,
) -> None:  # fmt: skip
    """Batch 1 and seq 1 run other programs than their neighbours, so they are where a grid goes wrong."""
    model = architecture_of(name)
    method = with_targets(method, model)
    fixed: Any = {
        "attention": attention, "checkpoint": checkpoint, "optimizer": optimizer, "grad_accum": accum,
        "padded": padded, "compile": compiled, **precision,
    }  # fmt: skip
    setup = setup_of(name, batch=np.array(batches)[:, None], seq=np.array(seqs), **fixed)
    whole = predict(model, method, setup, device)
    check_every_point(
        model, (len(batches), len(seqs)), whole,
        lambda at: (setup_of(name, batch=batches[at[0]], seq=seqs[at[1]], **fixed), parse(method)),
    )  # fmt: skip


@few
@given(
    name=names, ranks=st.lists(st.integers(1, 32), min_size=1, max_size=4), batches=sizes,
    device=st.sampled_from(DEVICES), dtype=st.sampled_from(("bf16", "fp32")), top=st.booleans(),
    optimizer=st.sampled_from(("adamw", "adamw-loop", "adamw-fused")),
)  # fmt: skip
def test_a_grid_of_rank_and_batch_equals_its_points(
    name: str, ranks: list[int], batches: list[int], device: str, dtype: str, top: bool, optimizer: str
) -> None:
    """The rank changes parameters and optimizer launches too, not only GEMMs; rank 1 is the odd one."""

    fixed: Any = {"dtype": dtype, "optimizer": optimizer}
    model = architecture_of(name)
    spec = with_targets("top_k:k=2,inner=lora" if top else "lora", model)

    def method(r: Any) -> Method:
        parsed = parse(spec)
        assert isinstance(parsed, (Lora, TopK))
        return replace(parsed, r=r)

    setup = setup_of(name, batch=np.array(batches), seq=9, **fixed)
    whole = predict(model, method(np.array(ranks)[:, None]), setup, device)
    check_every_point(
        model, (len(ranks), len(batches)), whole,
        lambda at: (setup_of(name, batch=batches[at[1]], seq=9, **fixed), method(ranks[at[0]])),
    )  # fmt: skip


HUGE = Setup(batch=64, seq=32_768, optimizer="sgd", checkpoint="block")  # of 70 B it has a fifth of 2^63 FLOPs


@pytest.mark.parametrize("device", DEVICES)
def test_a_grid_of_huge_steps_equals_its_points(device: str) -> None:
    """Integers of an array wrap around at 2^63 without a word; Python's do not."""
    alone = predict("llama-3.1-70b", "full", HUGE, device)
    whole = predict("llama-3.1-70b", "full", replace(HUGE, batch=np.array([32, 64])), device)
    for figure in ("flops", "bytes"):
        assert int(getattr(whole, figure)["total"][1]) == getattr(alone, figure)["total"] > 0, figure
    assert int(whole.memory.peak[1]) == alone.memory.peak > 0
    assert whole.time.phases["total"][1] == pytest.approx(alone.time.phases["total"], rel=1e-9)


@pytest.mark.parametrize(("batch", "seq"), [(512, 32_768), (64, 1_000_000), (4096, 131_072)])
@pytest.mark.parametrize("device", DEVICES)
def test_a_grid_of_steps_beyond_what_integers_of_arrays_hold_is_refused(device: str, batch: int, seq: int) -> None:
    """Each of them has an answer alone."""
    setup = replace(HUGE, batch=batch, seq=seq)
    assert predict("llama-3.1-70b", "full", setup, device).flops["total"] > 2**62
    with pytest.raises(UserError, match="exceed 64-bit integers"):
        predict("llama-3.1-70b", "full", replace(setup, batch=np.array([batch // 2, batch])), device)


@few
@given(
    name=names, method=st.sampled_from(METHODS), accum=st.integers(1, 3), checkpoint=st.sampled_from(("none", "block"))
)
def test_totals_are_the_sum_of_their_parts_by_phase_kind_and_part(
    name: str, method: str, accum: int, checkpoint: str
) -> None:
    """Explanations cut the total in these ways; a remainder would be time or traffic that nothing explains."""
    model, setup = architecture_of(name), setup_of(name, batch=2, seq=9, grad_accum=accum, checkpoint=checkpoint)
    p = predict(model, with_targets(method, model), setup, "l40s")
    assert p.step is not None
    for figure, of_op in FIGURES.items():
        reported = getattr(p, figure)
        assert reported["total"] == sum(reported[phase] for phase in PHASES)
        for cut in ("phase", "kind", "part"):
            sums: dict[str, Any] = defaultdict(int)
            for part, op, times in p.step.ops():
                key = {"phase": part.phase, "kind": costs.kind(op), "part": part.name}[cut]
                sums[key] += times * of_op(op)
            assert sum(sums.values()) == reported["total"], (figure, cut)
            if cut == "phase":
                assert {phase: sums[phase] for phase in PHASES} == {phase: reported[phase] for phase in PHASES}


@few
@given(name=names, method=st.sampled_from(METHODS), device=st.sampled_from(DEVICES))
def test_memory_and_time_of_a_prediction_are_consistent(name: str, method: str, device: str) -> None:
    """The figures of one prediction are shown side by side, so they must add up there too."""
    model = architecture_of(name)
    p = predict(model, with_targets(method, model), setup_of(name, batch=2, seq=9), device)
    m, t = p.memory, p.time
    assert m.peak == m.weights + m.gradients + m.optimizer + m.activations
    assert m.peak <= m.low <= m.high  # bounds of what the allocator reserves for the peak of live bytes
    assert t.phases["total"] == pytest.approx(sum(t.phases[phase] for phase in PHASES))
    assert t.low <= t.phases["total"] <= t.high
    assert 0 <= t.device_busy <= t.phases["total"] * (1 + 1e-9)
    assert 0 <= t.launch_bound_share <= 1
    assert t.launch_bound_share == pytest.approx(1 - t.device_busy / t.phases["total"])
    assert p.fits == (m.peak <= profile.load(device).capacity)


@pytest.mark.parametrize("name", NAMES)
def test_a_bigger_batch_never_takes_less_time(name: str) -> None:
    """Whoever sweeps the batch expects a curve that rises."""
    batches = np.arange(1, 65)
    time = predict(architecture_of(name), "full", setup_of(name, batch=batches, seq=32), "l40s").time.phases["total"]
    assert (np.diff(time) >= -1e-12).all()


@pytest.mark.parametrize("routing", ["balanced", "zipf:1.1"])
@pytest.mark.parametrize("device", ["a10", "h100-sxm", "cpu-epyc-genoa-2c"])
def test_experts_that_few_tokens_do_not_hit_run_no_product(device: str, routing: str) -> None:
    """Two tokens hit four of eight experts: the points of a grid with more must not lend them the others' kernels."""
    setup = Setup(batch=np.array([[1], [2]]), seq=np.array([2, 40]), routing=routing)
    whole = predict("mixtral-8x7b", "full", setup, device)
    for at in np.ndindex(2, 2):
        alone = predict("mixtral-8x7b", "full", replace(setup, batch=at[0] + 1, seq=(2, 40)[at[1]]), device)
        assert np.broadcast_to(whole.kernels["total"], (2, 2))[at] == alone.kernels["total"]
        if (device, routing) != ("cpu-epyc-genoa-2c", "zipf:1.1"):  # a CPU's floor is one for all like products
            assert np.broadcast_to(whole.time.phases["total"], (2, 2))[at] == pytest.approx(
                alone.time.phases["total"], rel=1e-9
            )


def test_sums_over_a_grid_of_ranks_on_a_cpu() -> None:
    """Whether a sum runs along rows is asked of a matrix whose width is a rank, too."""
    setup = Setup(batch=1, seq=4)
    ranks = np.array([1, 2, 8])
    whole = predict(architecture_of("gpt2"), replace(parse("adalora:r=1"), r=ranks), setup, "cpu-epyc-genoa-2c")
    for i, r in enumerate(ranks):
        alone = predict(architecture_of("gpt2"), f"adalora:r={r}", setup, "cpu-epyc-genoa-2c")
        assert whole.time.phases["total"][i] == pytest.approx(alone.time.phases["total"], rel=1e-9)


def test_a_rank_that_decides_how_many_ops_there_are_splits_the_grid() -> None:
    """HRA multiplies one reflection after another: every rank is a program of its own."""
    setup, ranks = Setup(batch=1, seq=16), np.array([1, 4, 2])
    whole = predict(architecture_of("llama"), replace(parse("hra"), r=ranks), setup, "l40s")
    for i, r in enumerate(ranks):
        alone = predict(architecture_of("llama"), f"hra:r={r}", setup, "l40s")
        assert whole.time.phases["total"][i] == pytest.approx(alone.time.phases["total"], rel=1e-9)
        assert whole.kernels["total"][i] == alone.kernels["total"]


def test_work_between_steps_over_a_grid_of_ranks() -> None:
    """A fresh optimizer state has a parameter's shape, or not, at every point of a grid."""
    ranks, setup = np.array([1, 2, 8]), Setup(batch=1, seq=16, optimizer="adamw-8bit")
    whole = predict(architecture_of("llama"), replace(parse("cola:r=4"), r=ranks), setup, "l40s")
    for i, r in enumerate(ranks):
        alone = predict(architecture_of("llama"), f"cola:r={r}", setup, "l40s")
        assert alone.periodic
        for a, b in zip(whole.periodic, alone.periodic, strict=True):
            assert np.broadcast_to(a.seconds, 3)[i] == pytest.approx(float(b.seconds), rel=1e-9)
            assert np.broadcast_to(a.bytes, 3)[i] == b.bytes


def test_points_of_a_grid_do_not_refuse_one_another() -> None:
    """A long sequence of few samples and many samples of a short one are asked for together, as explanations do."""
    pairs = {"batch": np.array([512, 1]), "seq": np.array([16, 32768])}
    assert predict("llama-2-13b", device="a100-80gb-sxm", **pairs).flops["total"].shape == (2,)
    with pytest.raises(UserError, match="is too large"):
        predict("llama-2-13b", device="a100-80gb-sxm", batch=np.array([2**24, 1]), seq=np.array([2**20, 16]))
