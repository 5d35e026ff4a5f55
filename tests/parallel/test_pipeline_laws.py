"""Laws of a pipeline, which need no torch: what its order costs, what stages have between them, what links can do."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from helpers import free_host
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perfmodel import predict
from perfmodel.architectures.config import Config
from perfmodel.errors import UserError
from perfmodel.prediction import memory
from perfmodel.prediction.pipeline import RankClocks, run_through
from perfmodel.prediction.placed import Placed
from perfmodel.prediction.predict import Prediction, architecture_of, method_of
from perfmodel.prediction.timeline import advance_clock
from perfmodel.prediction.work import StepWork
from perfmodel.program.part import PHASES
from perfmodel.program.streams import COMPUTE
from perfmodel.recording import pipeline
from perfmodel.recording.parallel.schedules import BACKWARD, FORWARD, Pass, Post, Schedule, Wait
from perfmodel.setup import Setup

LLAMA = Config(
    {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 9,
        "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 2048, "tie_word_embeddings": False,
    },
    "llama", "llama",
)  # fmt: skip
METHODS = ("full", "lora:r=8,targets=all-linear", "lora:r=4", "dora:r=4", "top_k:k=2")
SPECS = ("1f1b", "gpipe", "interleaved:v=2")
ROUNDING = 1e-9
SETUPS = st.builds(
    Setup,
    batch=st.sampled_from((1, 2)),
    seq=st.sampled_from((64, 512)),
    gpus=st.sampled_from((4, 8, 64)),
    pp=st.sampled_from((2, 4)),
    pp_schedule=st.sampled_from(SPECS),
    grad_accum=st.sampled_from((4, 8)),
    checkpoint=st.sampled_from(("none", "block")),
    optimizer=st.sampled_from(("adamw", "sgd")),
    clip_grad=st.booleans(),
    dtype=st.sampled_from(("bf16", "fp32")),
    amp=st.sampled_from((None, "bf16")),
)
WAYS: tuple[dict[str, Any], ...] = (
    {}, {"parallel": "fsdp2"}, {"parallel": "fsdp2", "reshard": False}, {"tp": 2}, {"parallel": "fsdp2", "tp": 2},
    {"parallel": "fsdp2", "cp": 2},
    {"parallel": "fsdp2", "tp": 2, "sequence_parallel": True, "amp": None, "optimizer": "adamw"},
)  # fmt: skip
Job = tuple[Setup, str, dict[str, Any]]
JOBS = st.tuples(SETUPS, st.sampled_from(METHODS), st.sampled_from(WAYS)).filter(
    lambda job: not (job[2].get("tp") and job[1].startswith(("dora", "top_k")))
)


def of_job(job: Job) -> tuple[str, Setup]:
    """Method and setup, on as many GPUs as it takes."""
    setup, method, way = job
    shared = way.get("tp", 1) * way.get("cp", 1)
    return method, replace(setup, gpus=setup.gpus * shared * (2 if way.get("parallel") else 1), **way)


def with_messages(slower: float, method: str, setup: Setup) -> Prediction:
    """A prediction on links that are so many times as slow."""
    known = Placed.between
    with patch.object(Placed, "between", lambda *args: known(*args) * slower):
        return predict(LLAMA, method, setup, "h100-sxm")


def ended(spec: str, micros: int, times: list[tuple[float, float]], message: float) -> list[RankClocks]:
    """Ranks of stages whose passes take so long, forward and backward, at their end."""
    schedule = Schedule.parse(spec)
    stages = len(times)
    orders = schedule.orders(stages // schedule.chunks, micros, lambda stage: stage > 0)

    def parts(action: Any) -> list[Any]:
        return [times[action.stage][action.way == BACKWARD]] if isinstance(action, Pass) else []

    ranks: Any = [SimpleNamespace(actions=[(action, parts(action)) for action in order]) for order in orders]
    priced: Any = SimpleNamespace(
        on=SimpleNamespace(kind="cuda"), by=SimpleNamespace(launch=0.0),
        in_a_row=lambda parts: advance_clock(COMPUTE, sum(parts)),
    )  # fmt: skip
    return run_through(ranks, priced, lambda done: message)


@given(st.sampled_from(SPECS), st.integers(2, 5), st.integers(1, 5), st.floats(0.1, 5), st.floats(0.1, 5))
def test_equal_stages_wait_for_as_long_as_the_pipe_is_deep(
    spec: str, ranks: int, rounds: int, forward: float, backward: float
) -> None:
    """The bubble of m micro-batches is (p - 1) / m of their time, and v runs of blocks on each rank take it by v."""
    chunks, micros = Schedule.parse(spec).chunks, ranks * rounds
    times = [(forward / chunks, backward / chunks)] * (ranks * chunks)
    total = max(at.end for at in ended(spec, micros, times, 0.0))
    work = forward + backward
    assert total == pytest.approx(micros * work + (ranks - 1) * work / chunks)


@settings(max_examples=40)
@given(st.sampled_from(SPECS), st.data())
def test_no_order_beats_its_busiest_rank_and_slower_messages_never_help(spec: str, data: st.DataObject) -> None:
    """Any stage times: a step lasts at least as long as its busiest rank works, and as a micro-batch is on its way."""
    ranks, rounds = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    chunks = Schedule.parse(spec).chunks
    one = st.tuples(st.floats(0.01, 3), st.floats(0, 3))
    times = data.draw(st.lists(one, min_size=ranks * chunks, max_size=ranks * chunks))
    totals = [max(at.end for at in ended(spec, ranks * rounds, times, message)) for message in (0.0, 0.1, 1.0)]
    busiest = max(ranks * rounds * sum(map(sum, times[rank::ranks])) for rank in range(ranks))
    assert totals[0] >= max(busiest, sum(map(sum, times))) * (1 - ROUNDING)
    assert all(fast <= slow * (1 + ROUNDING) for fast, slow in pairwise(totals))


@given(st.sampled_from(SPECS), st.integers(2, 6), st.integers(1, 12), st.integers(0, 6))
def test_every_message_has_two_ends_and_every_pass_its_input(spec: str, ranks: int, micros: int, trains: int) -> None:
    """Each rank does every pass of its stages once, sends what others receive, and waits before it computes."""
    schedule = Schedule.parse(spec)
    try:
        schedule.check(ranks, micros)
    except UserError:
        assume(False)
    stages = ranks * schedule.chunks
    orders = schedule.orders(ranks, micros, lambda stage: stage > trains)
    sent = [done for order in orders for a in order if isinstance(a, Post) for done in a.sends]
    received = [done for order in orders for a in order if isinstance(a, Post) for done in a.receives]
    forth = {Pass(FORWARD, s, i) for s in range(stages - 1) for i in range(micros)}
    back = {Pass(BACKWARD, s, i) for s in range(trains + 1, stages) for i in range(micros)}
    assert sorted(sent) == sorted(received) == sorted(forth | back)
    for rank, order in enumerate(orders):
        passes = [a for a in order if isinstance(a, Pass)]
        assert sorted(passes) == sorted(
            Pass(way, s, i) for way in (FORWARD, BACKWARD) for s in range(rank, stages, ranks) for i in range(micros)
        )
        known: set[Pass] = set()
        for action in order:
            if isinstance(action, Wait):
                known.update(action.post.receives)
            elif isinstance(action, Pass):
                step = -1 if action.way == FORWARD else 1
                before = Pass(action.way, action.stage + step, action.micro)
                assert before in known or before not in forth | back


@settings(max_examples=10)
@given(SETUPS, st.sampled_from(METHODS))
def test_one_stage_is_what_it_was(setup: Setup, method: str) -> None:
    """A schedule is nothing to a model that is all on one GPU."""
    alone, usual = (
        predict(LLAMA, method, replace(setup, pp=1, gpus=1, pp_schedule=spec), "h100-sxm").as_dict()
        for spec in (setup.pp_schedule, "1f1b")
    )
    assert {**alone, "setup": {}} == {**usual, "setup": {}}


@pytest.mark.parametrize(("spec", "pp"), [("1f1b", 4), ("interleaved:v=2", 2), ("interleaved:v=2", 4)])
def test_ranks_share_blocks_evenly(spec: str, pp: int) -> None:
    """Whatever the stages: no rank has two blocks more than another, nor those that are over beside the head."""
    setup = Setup(batch=1, seq=64, gpus=pp, pp=pp, pp_schedule=spec, grad_accum=4)
    pipelined = predict(LLAMA, "full", setup, "h100-sxm").pipeline
    assert pipelined is not None
    of_ranks = [sum(last - first + 1 for first, last in stage.blocks) for stage in pipelined.stages]
    assert sum(of_ranks) == 9
    assert max(of_ranks) - min(of_ranks) == 1
    assert of_ranks[-1] == min(of_ranks)


@pytest.mark.parametrize("spec", SPECS)
def test_the_answered_rank_is_the_one_whose_device_works_most(spec: str) -> None:
    """Ranks that wait for the host take equally long: which of them is answered must not change with micro-batches."""
    setup = Setup(batch=1, seq=64, gpus=8, pp=4, pp_schedule=spec, parallel="fsdp2", reshard=False)
    few, more = (predict(LLAMA, "full", replace(setup, grad_accum=n), "h100-sxm") for n in (4, 16))
    assert few.time.launch_bound_share > 0.2
    assert more.flops["backward"] == 4 * few.flops["backward"]


@settings(max_examples=5)
@given(JOBS)
def test_stages_have_the_model_and_its_work_between_them(job: Job) -> None:
    """No block is lost or done twice: parameters and FLOPs add up, and all that lived in a step has died at its end."""
    method, setup = of_job(job)
    alone: dict[str, Any] = {"gpus": setup.tp * setup.cp, "pp": 1}
    alone |= {} if setup.cp > 1 else {"parallel": "ddp", "reshard": True}
    whole = predict(LLAMA, method, replace(setup, **alone), "h100-sxm")
    cut = predict(LLAMA, method, setup, "h100-sxm")
    assert (cut.total_params, cut.trainable_params) == (whole.total_params, whole.trainable_params)
    architecture = architecture_of(LLAMA)
    ranks = pipeline.build_ranks(architecture, method_of(method).bind(architecture), setup)
    flops = 0
    for ours in ranks:
        assert sum(memory.of_group(group).delta for group in ours.step.groups) == 0
        flops += flops_of(ours)
    assert flops == whole.flops["total"]


def flops_of(ours: pipeline.RankStep) -> Any:
    """FLOPs of a rank's step."""
    return StepWork.of(ours.step).counted["flops"]["total"]


@settings(max_examples=4)
@given(JOBS)
def test_slower_links_never_help_a_step(job: Job) -> None:
    """Time falls with the links to that of free ones, and no further; what is exposed is what they cost."""
    method, setup = of_job(job)
    free, usual, slow = (with_messages(x, method, setup) for x in (0.0, 1.0, 50.0))
    totals = [p.time.phases["total"] for p in (free, usual, slow)]
    assert totals == sorted(totals)
    sent = slow.time.communication
    assert 0 <= sent.exposed["total"] <= slow.time.phases["total"]
    for p in (usual, slow):
        said = p.time.communication
        for seconds in (said.exposed, said.hidden):
            assert sum(seconds[phase] for phase in PHASES) == pytest.approx(seconds["total"], abs=1e-12)
    assert sum(slow.time.components.values()) == pytest.approx(slow.time.phases["total"])
    assert usual.pipeline is not None
    assert 0 <= usual.pipeline.bubble < usual.time.phases["total"]


@settings(max_examples=5)
@given(SETUPS, st.sampled_from(METHODS))
def test_micro_batches_in_flight_are_those_of_the_schedule(setup: Setup, method: str) -> None:
    """1F1B holds as many micro-batches as there are stages from a rank on, GPipe all: that is what 1F1B is for."""
    p = predict(LLAMA, method, setup, "h100-sxm")
    assert p.pipeline is not None
    flight = [stage.in_flight for stage in p.pipeline.stages]
    if setup.pp_schedule == "1f1b":
        assert flight == [min(setup.grad_accum, setup.pp - rank) for rank in range(setup.pp)]
    if setup.pp_schedule == "gpipe":
        assert flight == [setup.grad_accum] * setup.pp
    assert p.memory.peak == max(stage.peak for stage in p.pipeline.stages)


@settings(max_examples=3)
@given(JOBS)
def test_links_that_cost_nothing_leave_work_and_bubbles(job: Job) -> None:
    """Whatever replicas, stages and those that share layers exchange: without it a step is its work and its bubble."""
    method, setup = of_job(job)
    known = Placed.seconds
    with patch.object(Placed, "seconds", lambda *args: known(*args) * 0.0):
        p = with_messages(0.0, method, setup)
    assert p.time.communication.exposed["total"] == pytest.approx(0.0, abs=1e-6 * p.time.phases["total"])
    assert p.pipeline is not None
    assert p.time.device_busy + p.pipeline.bubble <= p.time.phases["total"] * (1 + ROUNDING)


@settings(max_examples=3)
@given(JOBS)
def test_more_micro_batches_never_raise_the_share_of_the_bubble(job: Job) -> None:
    """It is paid once a step, however long that is; where hosts are slow, few micro-batches hide it in their queues."""
    method, setup = of_job(job)
    sizes = [replace(setup, grad_accum=m) for m in (4, 8, 32)]
    predictions = [predict(LLAMA, method, of_size, "h100-sxm", host=free_host()) for of_size in sizes]
    shares = [p.pipeline.bubble / p.time.phases["total"] for p in predictions if p.pipeline is not None]
    assert len(shares) == 3
    assert all(more <= less + ROUNDING for less, more in pairwise(shares))


@pytest.mark.parametrize("spec", SPECS)
def test_weights_that_stay_are_gathered_once_a_step(spec: str) -> None:
    """What torchtitan's default is for: as many bytes for 4 micro-batches as for 32, of which LoRA saves none."""
    at: dict[str, Any] = {"gpus": 8, "pp": 2, "pp_schedule": spec, "parallel": "fsdp2", "clip_grad": False}

    def sent(method: str, *, reshard: bool, micros: int) -> dict[str, Any]:
        p = predict(LLAMA, method, device="h100-sxm", **at, grad_accum=micros, reshard=reshard)
        return p.time.communication.nbytes

    stays, again = ([sent("full", reshard=reshard, micros=n) for n in (4, 32)] for reshard in (False, True))
    lora = sent("lora:r=8", reshard=False, micros=4)
    assert stays[0]["all_gather"] == stays[1]["all_gather"] < again[0]["all_gather"]
    assert again[1]["all_gather"] > 4 * again[0]["all_gather"]
    assert lora["all_gather"] == pytest.approx(stays[0]["all_gather"], rel=0.2)
    assert lora["reduce_scatter"] < 0.1 * stays[0]["reduce_scatter"]


@settings(max_examples=2)
@given(JOBS)
def test_a_grid_of_pipelines_equals_its_points(job: Job) -> None:
    """A sweep along batch and GPUs is so many predictions."""
    method, setup = of_job(job)
    batch, gpus = np.array([[1], [4]]), np.array([1, 4]) * setup.pp * setup.tp * setup.cp
    grid = predict(LLAMA, method, replace(setup, batch=batch, gpus=gpus), "h100-sxm")
    for i, j in np.ndindex(2, 2):
        one = predict(LLAMA, method, replace(setup, batch=int(batch[i, 0]), gpus=int(gpus[j])), "h100-sxm")
        assert grid.time.phases["total"][i, j] == pytest.approx(one.time.phases["total"], rel=1e-9)
        assert grid.memory.peak[i, j] == one.memory.peak


def test_what_lies_below_all_that_trains_goes_back_nowhere() -> None:
    """LoRA's point in a pipeline: stages below the lowest trainable block receive no gradient and run no backward."""
    p = predict(LLAMA, "top_k:k=2", device="h100-sxm", gpus=4, pp=4, grad_accum=4)
    assert p.pipeline is not None
    assert [stage.backward > 0 for stage in p.pipeline.stages] == [False, False, False, True]
    architecture = architecture_of(LLAMA)
    ranks = pipeline.build_ranks(architecture, method_of("top_k:k=2").bind(architecture), p.setup)
    back = [a for ours in ranks for a, _ in ours.actions if isinstance(a, Post) for d in a.sends if d.way == BACKWARD]
    assert back == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": 6, "pp": 4}, "pp 4 does not divide the 6 GPUs"),
        ({"pp_schedule": "interleaved"}, "use 1f1b, gpipe or interleaved:v=2"),
        ({"grad_accum": 2}, "use --grad-accum 4 or more"),
        ({"pp_schedule": "interleaved:v=2", "grad_accum": 9}, "use --grad-accum 8"),
        ({"pp_schedule": "interleaved:v=4"}, "16 stages are more than the 9 blocks"),
        ({"gpus": 8, "parallel": "fsdp1"}, "not modelled with fsdp1; use --parallel ddp or fsdp2"),
        ({"gpus": 8, "parallel": "zero1"}, "zero1, whose pipeline module is another program; use --parallel ddp"),
        ({"gpus": 8, "parallel": "fsdp2", "offload": "params"}, "not modelled with offload params"),
        ({"gpus": 8, "parallel": "fsdp2", "fsdp_units": "blocks"}, "not modelled with fsdp_units blocks"),
        ({"gpus": 8, "cp": 2}, "cp: shared sequences not modelled with parallel ddp; use --parallel fsdp2"),
        (
            {"gpus": 8, "cp": 2, "cp_rotate": "ulysses", "parallel": "zero1"},
            "ulysses not modelled with pp 4; use --pp 1",
        ),
        ({"gpus": 16, "tp": 2, "sequence_parallel": True}, "sequence_parallel: ddp takes no cut layers"),
        ({"gpus": 16, "shard_group": 3, "parallel": "fsdp2"}, r"the 4 GPUs of the job \(of 4 stages\)"),
        ({"kernels": "liger"}, "not modelled with kernels liger"),
        ({"checkpoint": "block-reentrant"}, "use --checkpoint block"),
        ({"compile": "default"}, "compile: not modelled with pp 4"),
    ],
)
def test_what_is_not_modelled_ends_in_one_line(options: dict[str, Any], said: str) -> None:
    """Nobody gets another program's answer."""
    with pytest.raises(UserError, match=said):
        predict(LLAMA, "full", device="h100-sxm", **{"gpus": 4, "pp": 4, "grad_accum": 4, **options})


@pytest.mark.parametrize(
    ("model", "method", "said"),
    [
        ("llama-3.2-1b", "lora", "shares one weight between its embedding and its head"),
        ("gpt2", "lora", "how gpt2 is cut into stages is not modelled"),
        ("llama-3.1-8b", "vera", "not modelled with vera"),
    ],
)
def test_models_and_methods_that_are_not_cut_say_so(model: str, method: str, said: str) -> None:
    """As above, of what stages are made of."""
    with pytest.raises(UserError, match=said):
        predict(model, method, device="h100-sxm", gpus=4, pp=4, grad_accum=4)


def test_a_message_between_nodes_takes_the_cards() -> None:
    """Where a stage's next one lies decides its price: the last GPU of a node sends through network cards."""
    job: dict[str, Any] = {"device": "h100-sxm", "gpus": 8, "pp": 4, "grad_accum": 8, "batch": 8, "seq": 2048}
    inside, outside = (predict(LLAMA, "full", **job, nodes=nodes) for nodes in (1, 4))
    assert outside.time.communication.exposed["total"] > inside.time.communication.exposed["total"]


def test_stages_that_lie_on_nodes_unevenly_have_an_answer() -> None:
    """Twelve GPUs stand on two nodes of six, so the second of three stages on both: NCCL does not mind."""
    job: dict[str, Any] = {
        "device": "h100-sxm",
        "parallel": "fsdp2",
        "nodes": 2,
        "grad_accum": 6,
        "batch": 8,
        "seq": 2048,
    }
    uneven, even = (predict(LLAMA, "full", **job, gpus=gpus, pp=pp) for gpus, pp in ((12, 3), (16, 4)))
    assert uneven.time.communication.exposed["total"] < 2 * even.time.communication.exposed["total"]
