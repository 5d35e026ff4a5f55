"""The reference of a rank is the real program of a rank: transformers + peft under torch's DDP and FSDP2, and cut as
`tp_plan` says.

A part of the grid of `perfmodel validate counts --parallel`; and two real processes, so that the fake process group is
not all that speaks for it.
"""

import copy
import json
import pickle
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

import reference_axolotl
import torch.distributed as dist
from both_sides import rank_of, tape_of
from helpers import config_of

from perfmodel.cli import main
from perfmodel.program.ranks import Ranks
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from validate.oracle import counts, parallel, parallel_cases, show_counts, traced_ranks
from validate.oracle.cases import Case

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

GRID = list(parallel_cases.rank_grid("quick"))
SETUP = Setup(batch=2, seq=9, gpus=2)


SHARED = [case for case in GRID if case.setup.tp > 1 and not case.setup.sequence_parallel]


TOKENS = [case for case in GRID if case.setup.sequence_parallel]


RINGS = [case for case in GRID if case.setup.cp > 1]


OWN_LOSSES = [case for case in GRID if case.setup.kernels != "torch"]


HALVES = [case for case in GRID if case.setup.fsdp_units == "adapters"]


PLAIN = [case for case in GRID if case.setup.tp == case.setup.cp == 1 and case not in (*OWN_LOSSES, *HALVES)]


CHOSEN = [
    *PLAIN[::17],
    *OWN_LOSSES[::8],
    *HALVES[::3],
    *SHARED[::7],
    *TOKENS[1::9],
    *RINGS[3::11],
]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: f"{c.config.name} {c.method} {c.setup.parallel}")
def test_the_tape_equals_a_rank_of_the_real_program(case: Case) -> None:
    """Zero tolerance: every call, and the collectives in their order between products; peak memory within 3 %."""
    if case.setup.tp > 1:
        pytest.importorskip("transformers.distributed.tensor_parallel", reason="transformers 5.24 brought it")
    result = parallel.compare_rank(case)
    assert result.calls > 0
    assert result.collectives > 0
    assert result.differences == []


@pytest.mark.parametrize(
    ("dropout", "options"),
    [
        ("", {"checkpoint": "block", "grad_accum": 2}),
        (",dropout=0.1", {"gpus": 4, "shard_group": 2, "amp": "bf16"}),
        ("", {"gpus": 3, "grad_accum": 2, "sync_each_batch": True, "reshard": False}),
    ],
)
def test_what_a_function_gathers_by_hand_is_reduced_behind_all_else(
    dropout: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Axolotl's kernels call no module, so that no hook of a LoRA's half runs; of many layers alike, once a layer."""
    plain = parallel.alone
    monkeypatch.setattr(parallel, "alone", lambda *given: reference_axolotl.patch(plain(*given)))
    method = f"lora:r=4,targets=all-linear,implementation=axolotl{dropout}"
    setup = replace(SETUP, dtype="bf16", parallel="fsdp2", fsdp_units="adapters", **options)
    assert parallel.compare_rank(Case(config_of("llama", layers=6), method, setup)).differences == []


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp32", "amp": "fp16", "gpus": 3},
        {"dtype": "fp16", "amp": None, "gpus": 2, "offload": "params"},
        {"dtype": "fp32", "amp": "fp16", "gpus": 4, "shard_group": 2},
    ],
)
def test_gradients_of_a_small_range_are_divided_before_they_are_summed(options: dict[str, Any]) -> None:
    """In fp16 NCCL's own average would overflow; the grid has bf16 and fp32, where it does not."""
    case = Case(config_of("llama"), "lora:r=4", replace(SETUP, parallel="fsdp2", grad_accum=2, **options))
    assert parallel.compare_rank(case).differences == []


PROCESS = """
import json, pickle, sys
import torch.distributed as dist
from validate.oracle import parallel
folder, rank = sys.argv[1], int(sys.argv[2])
with open(folder + "/case", "rb") as file:
    case, optimizer = pickle.load(file)
dist.init_process_group("gloo", init_method="file://" + folder + "/store", rank=rank, world_size=2)
found = parallel.traced_rank(case, optimizer).collectives
if rank == 0:
    print(json.dumps(found), flush=True)
dist.barrier()
"""


@pytest.mark.parametrize("form", parallel_cases.FORMS)
def test_two_processes_exchange_what_the_tape_has(form: str, ready: list[str], tmp_path: Path) -> None:
    """The fake process group must not have changed the program: with real ones the sequence is the same."""
    case = Case(config_of("llama", layers=2), "lora:r=4", replace(SETUP, parallel=form, grad_accum=2))
    step = tape_of(case)
    (tmp_path / "case").write_bytes(pickle.dumps((case, step.optimizer)))
    started = [
        subprocess.Popen([*ready, "-c", PROCESS, str(tmp_path), str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said, _ = (process.communicate(timeout=120)[0] for process in started)
    assert [parallel.Collective(*row) for row in json.loads(said)] == parallel.collectives(step)


# the oracle itself


@pytest.fixture(scope="module")
def traced() -> tuple[Case, Step, parallel.RankRecorder]:
    """A case whose tape and trace agree."""
    case = Case(config_of("llama"), "lora:r=4", replace(SETUP, parallel="fsdp2"))
    step = tape_of(case)
    real = rank_of(case, step)
    assert parallel.judge_rank(case, step, real).differences == []
    return case, step, real


def later(ops: list[Any], at: int) -> None:
    product = next(i for i, op in enumerate(ops) if i > at and op.name.startswith(parallel.PRODUCTS))
    ops.insert(product, ops.pop(at))


def over_others(ops: list[Any], at: int) -> None:
    ops[at] = copy.copy(ops[at])
    ops[at].attrs = ops[at].attrs._replace(ranks=Ranks(3))


@pytest.mark.parametrize("change", [lambda ops, at: ops.pop(at), later, over_others])
def test_a_wrong_tape_is_reported(traced: tuple[Case, Step, parallel.RankRecorder], change: Any) -> None:
    """An oracle that cannot fail proves nothing: a collective that is lost, late, or of others must be seen."""
    case, step, real = traced
    group = step.groups[0]
    part = next(p for p in group.parts if p.phase == "backward" and any(op.attrs.ranks for op in p.ops))
    ops = list(part.ops)
    change(ops, next(i for i, op in enumerate(ops) if op.attrs.ranks))
    parts = [replace(p, ops=ops) if p is part else p for p in group.parts]
    wrong = replace(step, groups=[replace(group, parts=parts), *step.groups[1:]])
    assert any(line.startswith("collective") for line in parallel.judge_rank(case, wrong, real).differences)


@pytest.mark.parametrize("off", [0.96, 1.04])
def test_wrong_memory_is_reported(traced: tuple[Case, Step, parallel.RankRecorder], off: float) -> None:
    """What a rank holds decides on how many GPUs a model fits."""
    case, step, real = traced
    wrong = copy.copy(real)
    wrong.trace = replace(real.trace, peak=round(real.trace.peak * off))
    (line,) = parallel.judge_rank(case, step, wrong).differences
    assert line.startswith("peak memory")


def test_the_command_lists_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever changed a form reads in the table how much of it was compared."""
    found = counts.Result(GRID[0], 7, 0, 3, 1.0, [], collectives=12345)
    monkeypatch.setattr(parallel_cases, "rank_grid", lambda which: GRID[:1])
    for grid in ("pipeline_grid", "compiled_grid"):
        monkeypatch.setattr(parallel_cases, grid, lambda which: [])
    monkeypatch.setattr(traced_ranks, "traced_grid", lambda which: [])
    monkeypatch.setattr(show_counts, "megatron_grid", lambda which: [])
    monkeypatch.setattr(parallel, "compare_rank", lambda case: found)
    words = CliRunner().invoke(main, ["validate", "counts", "--parallel"])
    assert words.exit_code == 0
    assert "12,345" in words.stdout
    assert "collectives" in words.stdout


def test_layers_are_cut_over_ranks_that_divide_their_heads() -> None:
    """Over two and over four, where keys and values have heads for that many; PyTorch's clipping refuses the mix."""
    cases = list(parallel_cases.tensor_grid("all"))
    assert {case.setup.tp for case in cases} == {2, 4}
    assert all(case.config.values["num_key_value_heads"] % case.setup.tp == 0 for case in cases)
    assert not any(case.setup.clip_grad for case in cases)
