"""The reference of a stage is the real one: ranks of `torch.distributed.pipelining`, processes that exchange by gloo.

A part of the grid of `perfmodel validate counts --parallel`.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("torch.distributed.pipelining")

import torch.distributed as dist
from torch.distributed.pipelining import schedules

from perfmodel.recording import pipeline as recording
from perfmodel.recording.parallel.schedules import Free, Gather, Pass, Post, Reduce
from validate.oracle import parallel_cases, pipeline
from validate.oracle.cases import Case

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

GRID = list(parallel_cases.pipeline_grid("quick"))
CHOSEN = [
    next(c for c in GRID if c.setup.pp_schedule.startswith(schedule) and (c.setup.pp, c.setup.gpus) == ranks)
    for schedule, ranks in (("1f1b", (3, 3)), ("interleaved", (2, 4)), ("gpipe", (2, 2)))
]
WANTED: tuple[dict[str, Any], ...] = (  # gathered again and again, once, ahead of passes; cut layers; mixed precision
    {"parallel": "fsdp2", "pp_schedule": "1f1b", "reshard": True, "grad_accum": 3, "tp": 1},
    {"parallel": "fsdp2", "pp_schedule": "interleaved:v=3", "reshard": False},
    {"parallel": "fsdp2", "pp_schedule": "1f1b", "shard_group": 2, "amp": "bf16"},
    {"parallel": "fsdp2", "pp_schedule": "gpipe", "tp": 2, "sequence_parallel": False},
    {"parallel": "fsdp2", "pp_schedule": "interleaved:v=2", "tp": 2, "sequence_parallel": True},
    {"parallel": "fsdp2", "pp_schedule": "1f1b", "cp": 2, "reshard": False},
    {"parallel": "ddp", "pp_schedule": "gpipe", "amp": "bf16", "dtype": "fp32"},
)
MESHES = [c for c in parallel_cases.stage_mesh_grid("all") if c.setup.pp == 2]
SHARDED = [next(c for c in MESHES if of.items() <= c.setup.as_dict().items()) for of in WANTED]


WORDS = {Gather: "UNSHARD", Free: "RESHARD", Reduce: "REDUCE_GRAD"}


def named(case: Case) -> str:
    setup = case.setup
    return f"{case.config.name} {case.method} {setup.pp_schedule} {setup.parallel} {setup.gpus}"


@pytest.mark.parametrize("case", [*CHOSEN, *SHARDED], ids=named)
def test_the_tape_equals_every_rank_of_a_real_pipeline(case: Case) -> None:
    """Zero tolerance: calls, bytes, messages with both ends in their order between products; peak within 3 %."""
    result = pipeline.compare_pipeline(case)
    assert result.calls > 0
    assert result.collectives > 0
    assert result.differences == []


def test_a_wrong_order_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle that cannot fail proves nothing: a message too late, or memory that is not there, must be seen."""
    case = next(c for c in GRID if (c.setup.pp_schedule, c.setup.gpus) == ("1f1b", 2))
    build = recording.build_ranks

    def wrong(*args: object) -> list[recording.RankStep]:
        first, *others = build(*args)  # type: ignore[arg-type]
        late = copy.copy(first)
        late.actions = list(first.actions)
        place = next(i for i, (a, _) in enumerate(late.actions) if isinstance(a, Post))
        after = next(i for i, (a, _) in enumerate(late.actions) if i > place and isinstance(a, Pass))
        late.actions.insert(after, late.actions.pop(place))
        late.step = replace(first.step, received_bytes=first.step.received_bytes + 10**6)
        return [late, *others]

    monkeypatch.setattr(recording, "build_ranks", wrong)
    said = pipeline.compare_pipeline(case).differences
    assert {line.split()[2] for line in said} == {"message", "peak"}
    assert all(line.startswith("rank 0") for line in said)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("ranks", "chunks", "micros"), [(2, 2, 4), (3, 2, 6), (4, 3, 8), (2, 1, 5), (4, 2, 4), (2, 5, 4), (5, 4, 10)]
)
def test_interleaved_orders_are_those_of_the_real_schedule(ranks: int, chunks: int, micros: int, sharded: bool) -> None:
    """More ranks and runs of blocks than a machine has cores: the real schedule is asked for its order alone."""
    real = object.__new__(schedules.ScheduleInterleaved1F1B)
    real.pp_group_size, real.n_local_stages, real._n_microbatches = ranks, chunks, micros
    real.microbatches_per_round = micros // max(1, micros // ranks)
    orders = {r: real._calculate_single_rank_operations(r) for r in range(ranks)}
    if sharded:
        orders = {r: list(schedules._add_unshard_reshard(order)) for r, order in orders.items()}
    passes = {r: schedules._add_reduce_grad(order, micros) for r, order in orders.items()}
    theirs = schedules._add_send_recv(passes, lambda stage: stage % ranks, ranks * chunks)
    ours = recording.Schedule("interleaved", chunks).orders(ranks, micros, lambda stage: True, sharded=sharded)
    said = [[word for action in order for word in said_by_torch(action)] for order in ours]
    assert said == [list(map(str, theirs[rank])) for rank in range(ranks)]


def said_by_torch(action: object) -> list[str]:
    """An action as PyTorch writes it; a receive has the number of the stage that gets it."""
    if isinstance(action, Pass):
        return [f"{action.stage}{action.way[0].upper()}{action.micro}"]
    for kind, word in WORDS.items():
        if isinstance(action, kind):
            return [f"{action.stage}{word}"]
    if not isinstance(action, Post):
        return []
    ends = [(d.stage, "SEND", d) for d in action.sends]
    ends += [(d.stage + (1 if d.way == "forward" else -1), "RECV", d) for d in action.receives]
    return [f"{stage}{what}_{d.way[0].upper()}{d.micro}" for stage, what, d in ends]
