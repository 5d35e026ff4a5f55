"""Laws of every answer, whatever is asked: any model, method, setup, device and host in any combination.

FUZZ_TRIES=1000 pytest tests/questions/test_any_setup.py asks each law of that many random questions that have answers.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from any_setup import SMALL_MODELS, Question, asked, questions
from fuzzing import bounded, tries
from grids import check_every_point, figures
from hypothesis import assume, example, given, reject
from hypothesis import strategies as st

from perfmodel import compare
from perfmodel.architectures import Architecture, Config, base
from perfmodel.devices.host import Host
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.methods import Method, prefix_tuning
from perfmodel.prediction.memory import CONTEXT, step_segment
from perfmodel.prediction.predict import Prediction
from perfmodel.program.part import PHASES
from perfmodel.setup import Setup

OPPOSITE = {"faster": "slower", "slower": "faster", "same": "same"}
NEAR = 1e-9
LUCK = 0.98  # of the time: a larger product may fill the last wave better (`tests/devices/test_device_laws.py`)


EVEN = 0.02  # of the time, where layers of a part differ in what the host does
LONG = {"batch": 2, "seq": 2048}
BOTH = Question(  # waits for the bus and for the other GPUs, partly at once
    "qwen1.5-7b", "prefix_tuning:tokens=2",
    {"batch": 64, "seq": 4096, "gpus": 8, "parallel": "fsdp2", "offload": "params"}, "rtx-4060-ti", "epyc-genoa",
)  # fmt: skip
WIDENED = Question(Config(SMALL_MODELS["glm4"], "glm4", "glm4"), "trainable_tokens", LONG, "cpu-xeon-2.5ghz-1t")


@tries(50)
@given(questions())
@example(BOTH)
@example(WIDENED)  # its attention in bf16 is quicker than its products, on a CPU without bf16
def test_figures_are_finite_within_their_bounds_and_sums_of_their_parts(question: Question) -> None:
    """They are shown side by side: one that is absurd, or a part that is missing, makes the others worthless."""
    with bounded():
        p = asked(question)
        json.dumps(p.as_dict(), allow_nan=False)
    for name, value in figures(p).items():
        assert value is None or (math.isfinite(value) and value >= 0), (name, value)
    for totals in (p.flops, p.bytes, p.kernels, p.dispatches, p.time.phases):
        assert totals["total"] == pytest.approx(sum(totals[phase] for phase in PHASES), rel=NEAR)
    t, m = p.time, p.memory
    assert sum(t.components.values()) == pytest.approx(t.phases["total"], rel=NEAR)
    assert 0 < t.low <= t.phases["total"] <= t.high
    assert 0 <= t.device_busy <= t.phases["total"] * (1 + NEAR)
    assert 0 <= t.launch_bound_share <= 1
    assert m.peak == m.weights + m.gradients + m.optimizer + m.activations
    assert m.peak <= m.low <= m.high
    room = question.on.capacity
    assert m.peak <= room if p.fits else m.high + CONTEXT > room
    assert 0 <= p.mfu <= 1
    assert 0 <= p.padding < 1
    assert 0 < p.trainable_params <= p.total_params
    assert 0 < p.active_params <= p.total_params


@tries(50)
@given(questions())
@example(Question("llama-3.2-1b", "prefix_tuning", LONG))  # whose lowest layer saves no rotary tables
@example(Question("llama-3.2-1b", "prefix_tuning", {**LONG, "gpus": 4, "parallel": "ddp"}))
@example(Question("llama-3.2-1b", "lora_8bit", {**LONG, "grad_accum": 3}))  # its graph keeps inputs till the next one
@example(
    Question("olmo-2-7b", "lora_8bit:targets=q_proj+v_proj", LONG)
)  # whose layers take each other's output as it is
@example(Question("llama-3.2-1b", "lora_8bit", {**LONG, "grad_accum": 3, "compile": "default"}))
@example(Question("bert-base", "lora_8bit:targets=all-linear", LONG))  # keeps what enters a run, and what leaves it
@example(Question("olmo-2-1b", "lora_8bit", {**LONG, "compile": "default"}))
@example(Question("opt-125m", "top_k", {**LONG, "compile": "default"}))
@example(Question("gpt2", "paca", {**LONG, "grad_accum": 2, "compile": "default"}))  # writes over a parameter
@example(Question("bert-base", "top_k:k=3", {**LONG, "gpus": 4, "parallel": "zero3"}))  # keeps gathered what is below
@example(Question("t5-small", "reslora", LONG))
@example(Question("gpt2", "reslora", {**LONG, "grad_accum": 3, "compile": "default"}))
def test_every_byte_that_a_step_allocates_is_freed_in_it(question: Question) -> None:
    """A leak, or a block that each layer frees again, shifts every later peak and grows with the number of layers."""
    step = asked(question).step
    assume(step is not None)
    assert step_segment(step).delta == 0


@tries(12)
@given(questions())
@example(Question("llama-3.2-1b", "prefix_tuning", {**LONG, "gpus": 4, "parallel": "ddp"}))
@example(Question("flan-t5-small", "reslora", LONG))
@example(Question("gemma-2-2b", "top_k:k=5", {**LONG, "compile": "default"}))
@example(Question("llama-3.2-1b", "lora:r=64", {**LONG, "gpus": 4, "parallel": "fsdp2", "compile": "default"}))
@example(Question("qwen2.5-0.5b", "full", {**LONG, "gpus": 4, "parallel": "ddp", "compile": "default"}))
def test_a_run_of_layers_stands_for_each_of_them(question: Question) -> None:
    """Layers that are alike are recorded once: every count, and memory, is what recording them one by one gives.

    So is the time where one layer is a part; the host's work of a part of several is taken as even over their calls.
    """
    p = asked(question)
    with pytest.MonkeyPatch.context() as patch:
        for room in (base, prefix_tuning):
            patch.setattr(room, "runs_of_layers", one_by_one)
        alone = question.answered()
    of_clocks = ("time_s", "mfu", "communication.exposed", "communication.hidden")
    one, other = (
        {name: value for name, value in figures(found).items() if not name.startswith(of_clocks)}
        for found in (p, alone)
    )
    assert one == pytest.approx(other, rel=NEAR)
    assert alone.time.phases["total"] == pytest.approx(p.time.phases["total"], rel=EVEN)


def one_by_one(
    architecture: Architecture, method: Method, blocks: range | None = None, *, ends_apart: bool = False,
    alone: frozenset[int] = frozenset(),
) -> list[tuple[int, int, int]]:  # fmt: skip
    """`runs_of_layers` of layers that have nothing in common."""
    return [(layer, 1, 1) for layer in (range(architecture.layers) if blocks is None else blocks)]


@tries(12)
@given(questions(), st.integers(2, 3))
def test_a_grid_equals_its_points(question: Question, factor: int) -> None:
    """A sweep is one prediction; what it says of a setup is what is said of it alone."""
    batches, seqs = ([question.setup[name], factor * question.setup[name]] for name in ("batch", "seq"))
    try:
        setup = question.made(batch=np.array(batches)[:, None], seq=np.array(seqs))
        whole = question.answered(batch=setup.batch, seq=setup.seq)
    except UserError:
        reject()  # a point of it is none, or the whole is too large

    def point(at: tuple[int, ...]) -> tuple[Setup, Method]:
        return question.made(batch=batches[at[0]], seq=seqs[at[1]]), question.parsed

    check_every_point(question.model, (2, 2), whole, point, host=question.by, device=question.on)


@tries(12)
@given(questions(), st.sampled_from(("full", "lora", "lora:r=4,targets=all-linear")))
def test_a_comparison_turned_round_is_the_same_comparison(question: Question, other: str) -> None:
    """Who asks the other way round must not hear that both are the faster one."""
    try:
        there, back = (
            compare(question.model, pair, question.made(), question.device, host=question.host).speedups[0]
            for pair in ([question.method, other], [other, question.method])
        )
    except UserError:
        reject()
    assert (1 / back.ratio, 1 / back.high, 1 / back.low) == pytest.approx(
        (there.ratio, there.low, there.high), rel=NEAR
    )
    assert there.low <= there.ratio <= there.high
    assert back.verdict == OPPOSITE[there.verdict]


def faster(device: DeviceProfile) -> Iterator[DeviceProfile]:
    """The device with faster memory, with faster units, with more memory, and with all of it."""
    hw = device.hardware
    rates = {f.name: 1.5 * rate for f in fields(hw) if f.name.endswith("_flops") and (rate := getattr(hw, f.name))}
    units: dict[str, Any] = {**rates, "clock_hz": 1.5 * hw.clock_hz}
    memory = {"memory_bandwidth": 1.5 * hw.memory_bandwidth}
    for changes in (memory, units, {"usable_bytes": 2 * hw.offered}, {**memory, **units}):
        yield replace(device, hardware=replace(hw, **changes))


@tries(12)
@given(questions())
def test_a_faster_device_is_never_slower(question: Question) -> None:
    """Nobody would believe another figure of a model that says so."""
    p = asked(question)
    for device in faster(question.on):
        assert question.answered(device=device, host=question.by).time.phases["total"] <= at_most(p)


@tries(12)
@given(questions(), st.data())
def test_a_faster_host_is_never_slower(question: Question, data: st.DataObject) -> None:
    """Whatever of its costs is lower: some of them, or all."""
    p = asked(question)
    costs = [f.name for f in fields(Host) if isinstance(getattr(question.by, f.name), float)]
    some = data.draw(st.sets(st.sampled_from(costs), min_size=1, max_size=4))
    for chosen in (some, costs):
        host = replace(question.by, **{name: 0.5 * getattr(question.by, name) for name in chosen})
        assert question.answered(host=host).time.phases["total"] <= at_most(p)


def at_most(p: Prediction) -> float:
    """Seconds that no faster machine may take."""
    total: float = p.time.phases["total"]
    return total * (1 + NEAR)


@tries(12)
@given(questions(), st.sampled_from(("batch", "seq", "grad_accum")))
def test_more_work_is_never_less(question: Question, which: str) -> None:
    """Twice the samples, the length or the micro-batches: no figure falls, but for time where kernels get luckier.

    Or fewer: where heads are grouped and the card is older than FlashAttention, PyTorch writes attention out without a
    mask and fuses it with one, which two documents of different lengths need, or more tokens than a window.
    """
    p = asked(question)
    size = getattr(question.made(), which)
    try:
        more = question.answered(**{which: 2 * size})
    except UserError:
        reject()
    for name in ("flops", "bytes"):
        assert getattr(more, name)["total"] >= getattr(p, name)["total"], name
    assert more.memory.peak >= p.memory.peak
    if more.kernels["total"] >= p.kernels["total"]:
        assert more.time.phases["total"] >= p.time.phases["total"] * LUCK
