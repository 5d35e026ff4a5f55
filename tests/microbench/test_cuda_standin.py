"""Everything that `validate` does on CUDA, over a stand-in of the GPU (`cuda_standin`): nothing is met for the first
time on rented hardware."""

import ast
import inspect
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("peft")

import torch
import torch.distributed as dist
from campaigns import TINY
from cuda_standin import Gpu, runtime, standin

from perfmodel import Device
from perfmodel.architectures import from_config
from perfmodel.cli import main
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.devices.host import Host
from perfmodel.prediction.predict import predict
from perfmodel.setup import Setup
from validate.calibration import hosts as host_fit
from validate.calibration.hosts import write_host as write_host
from validate.campaign import paper
from validate.campaign import run as campaign
from validate.measuring import clocks, environment, records, team
from validate.measuring import profile as profiling
from validate.measuring.cells import Cell
from validate.measuring.loop import TrainingLoop
from validate.measuring.visit import visit
from validate.microbench import kernels, run, stopwatch, wider
from validate.microbench.designs import MicroCase

ROOT = Path(__file__).parents[1]
A100, H100 = profile.load("a100-80gb-sxm"), profile.load("h100-sxm")
NAMES = {A100: "NVIDIA A100-SXM4-80GB", H100: "NVIDIA H100 80GB HBM3"}  # as their drivers call them
DEFAULT = hosts.load()
# A host that costs next to nothing: so do modules and autograd nodes, whose costs the stand-in cannot see
FAST = replace(DEFAULT, **{f.name: 1e-9 for f in fields(Host) if f.type in (float, "float")})
ONE_BLOCK = TINY.replace("num_hidden_layers = 2", "num_hidden_layers = 1")
GRID = (
    "rounds = 2"
    + ONE_BLOCK
    + """[models.huge]
model_type = "llama"
hidden_size = 65536
intermediate_size = 262144
num_hidden_layers = 2
num_attention_heads = 64
num_key_value_heads = 8
vocab_size = 128256
pad_token_id = 0
[[cells]]
models = ["tiny"]
methods = ["full", "lora:r=4,targets=all-linear"]
setups = [{ batch = 2, seq = 64 }]
[[cells]]
models = ["tiny"]
methods = ["dora:r=4"]
setups = [{ batch = 2, seq = 48, checkpoint = "block", grad_accum = 2, attention = "eager" }]
[[cells]]
models = ["tiny"]
methods = ["full"]
setups = [{ batch = 2, seq = 32, dtype = "fp32", clip_grad = false, optimizer = "adamw-fused" }]
[[cells]]
models = ["huge"]
methods = ["full"]
setups = [{ batch = 1, seq = 16 }]
"""
)


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[Gpu]:
    with standin(A100, NAMES[A100], by=FAST, folder=tmp_path) as found:
        yield found


def perfmodel(*words: str | Path) -> Any:
    return CliRunner().invoke(main, list(map(str, words)))


def test_measured_steps_come_out_as_the_prices_that_drove_them(tmp_path: Path) -> None:
    """The whole way of a record: program, events, profiler, reader, file, prediction. What is lost on it shows here:
    the device took and launched what the model says, so `check` must find no error of time and no other count."""
    output, grid, slow = tmp_path / "records.jsonl", tmp_path / "grid.toml", tmp_path / "fast.toml"
    grid.write_text(GRID)
    write_host(FAST, slow)
    words = ["validate", "measure", "--device", "cuda", "--grid", grid, "--output", output]
    with standin(H100, NAMES[H100], by=FAST, folder=tmp_path):
        done = perfmodel(*words, "--rounds", "1")
        first = records.read_records(output)
        again = perfmodel(*words)
        claim = paper.measured("cuda", output, grid=grid, host=str(slow))
    assert (done.exit_code, again.exit_code) == (0, 0), done.output + again.output
    found = records.read_records(output)
    assert found[: len(first)] == first  # resumed, not measured again
    visits = [r for r in found if r["kind"] == "visit"]
    assert sorted(r["round"] for r in visits) == [0] * 5 + [1] * 5
    assert {r["status"] for r in visits if r["cell"]["model"] == "tiny"} == {"ok"}
    for r in visits:
        if r["cell"]["model"] == "huge":
            assert (r["status"], "out of memory" in r["message"]) == ("oom", True)
    checked = perfmodel("validate", "check", output, "--host", slow, "--json")
    summary = json.loads(checked.output)
    assert checked.exit_code == 0, summary["limits"]
    assert [cell["differences"] for cell in summary["cells"]] == [[]] * 4
    assert all(abs(cell["error"]) < 1e-4 for cell in summary["cells"])
    assert summary["machines"][0]["device"] == "h100-sxm"
    assert [row.cell.method for row in claim] == ["lora:r=4,targets=all-linear"]
    assert claim[0].measured == pytest.approx(claim[0].predicted, rel=1e-4)
    fitted = perfmodel("validate", "fit", "--records", output, "--host", slow, "--dry-run", "--json")
    assert fitted.exit_code == 0, fitted.output
    assert json.loads(fitted.output)["factor_launch"] == pytest.approx(1.0, abs=0.1)


def test_the_environment_of_a_gpu_is_what_its_driver_tells(gpu: Gpu) -> None:
    """Records are judged by it, and an old driver answers only some of the questions."""
    found = environment.gpu()
    assert found["name"] == NAMES[A100]
    assert (found["major"], found["minor"], found["multi_processor_count"]) == (8, 0, 108)
    assert (found["driver_version"], found["clocks.max.sm"]) == ("570.124.06", "1410 MHz")
    assert "vbios_version" not in found
    assert environment.describe("cuda", 1)["gpu"] == found


def representatives() -> list[MicroCase]:
    """The smallest case of every kind that a calibration or a campaign has."""
    found: dict[Any, MicroCase] = {}
    for cases in wider.campaign_blocks("cuda", ("fp32", "bf16")).values():
        for case in sorted(cases, key=lambda c: prod(n for _, n in c.sizes)):
            found.setdefault((case.block, case.op, case.dtype, case.layout, case.backward), case)
    return list(found.values())


def test_every_kind_of_microbenchmark_runs(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that fails on the device leaves a hole that is only found when the machine has been given back."""
    shorten(monkeypatch)
    watch = stopwatch.stopwatch("cuda", 1)
    left_out = []
    for case in representatives():
        record = run.attempt(case, "cuda", watch)
        if record["kind"] != "microbench":
            left_out.append((case, record))
        else:
            assert record["clock"] == clocks.EVENTS
            assert record["seconds"]["least"] > 0 or case.block == "host"  # whose clock is not the stand-in's
    assert left_out == []
    kernels.release_pools("cuda")
    assert gpu.live == 0, "a training step that follows needs the memory"


def test_a_benchmark_takes_what_its_kernel_takes(gpu: Gpu) -> None:
    """Between two events lies the device's time, not that of Python or of the first launch's way there."""
    gpu.by = DEFAULT
    case = MicroCase("gemm", "mm", "bf16", (("m", 2048), ("n", 2048), ("k", 2048)), "tn")
    timing = stopwatch.CudaStopwatch()(*kernels.build_call(case, "cuda"), 0.05, 5)
    assert timing.median == pytest.approx(Device(A100).gemm(2048, 2048, 2048, in_step=True), rel=1e-3)


def test_a_visit_that_runs_out_of_memory_gives_it_back(gpu: Gpu) -> None:
    """The next cell must not fail for the memory of the one before."""
    cell = Cell.from_dict(tiny())
    gpu.memory_bytes = 300_000
    found = visit(cell, "cuda", threads=1, warm_up=1, steps=1)
    assert found["status"] == "oom"
    assert gpu.live == 0


def tiny() -> dict[str, Any]:
    """The grid's first cell."""
    config = tomllib.loads(GRID)["models"]["tiny"]
    return {"model": "tiny", "config": config, "method": "full", "setup": Setup(batch=2, seq=64).as_dict()}


def test_work_of_the_step_before_is_not_profiled(gpu: Gpu) -> None:
    """A device runs behind its host: without a synchronisation the trace begins amid kernels that nobody launched."""
    program = TrainingLoop(Cell.from_dict(tiny()), "cuda")
    gpu.by = replace(FAST, call=0.0)
    program.step()
    assert gpu.device_s > gpu.host_s
    found = profiling.profile_step(program)
    assert found.unlaunched == 0


CHECKED = [name for name in runtime.NAMES if name != "Event"]


@pytest.mark.parametrize("name", CHECKED)
def test_what_stands_for_torch_cuda_is_as_it_is_there(name: str) -> None:
    """A stand-in that knows more than the real module would hide a call that fails on a GPU."""
    real, ours = getattr(torch.cuda, name), getattr(runtime.Runtime, name)
    there = inspect.signature(real).parameters
    here = [p for p in inspect.signature(ours).parameters if p != "self"]
    assert set(here) <= set(there)
    needed = [p.name for p in there.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert set(needed) <= set(here)


def test_events_are_as_they_are_there() -> None:
    """As above."""
    real = torch.cuda.Event
    assert "enable_timing" in inspect.signature(real.__new__).parameters
    for name in ("record", "synchronize", "query", "elapsed_time"):
        there = list(inspect.signature(getattr(real, name)).parameters)
        assert list(inspect.signature(getattr(runtime.Event, name)).parameters) == there


def test_properties_of_a_device_are_those_of_pytorch(gpu: Gpu) -> None:
    """On a CPU build the real class is only described (`torch/_C/__init__.pyi`)."""
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    told = re.search(r"class _CudaDeviceProperties:\n((?:    .*\n)+)", stub)
    assert told is not None
    assert set(vars(torch.cuda.get_device_properties())) <= set(re.findall(r"    (\w+):", told[1]))


def used_of_cuda() -> set[str]:
    """Names of `torch.cuda` in validate/."""
    names = set()
    for path in (ROOT / "validate").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                names.add(node.attr)
    return names


def test_nothing_of_torch_cuda_is_used_beside_the_stand_in() -> None:
    """What it does not stand for would be run on a GPU for the first time."""
    assert used_of_cuda() <= set(runtime.NAMES)


PLAN = (
    ONE_BLOCK
    + """[[stages]]
name = "floors"
blocks = ["host", "copies", "attention backends", "gemm unaligned bf16"]
most = 4
[[stages]]
name = "lists"
blocks = ["optimizer lists"]
most = 1
[[stages]]
name = "kernels"
blocks = ["gemm fp32", "gemm bf16", "pointwise fp32", "pointwise bf16", "attention"]
most = 78
[[stages]]
name = "host costs"
programs = 10
[[stages]]
name = "steps"
cells = [{ models = ["tiny"], methods = ["full", "lora:r=4"], setups = [{ batch = 2, seq = 32 }] }]
[[stages]]
name = "QLoRA"
needs = ["no_such_package"]
cells = [{ models = ["tiny"], methods = ["ia3"], setups = [{ batch = 2, seq = 16 }] }]
"""
)


def test_a_calibration_finds_the_card_that_it_ran_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command: what it times, fits and writes must predict the card whose prices made the times."""
    shorten(monkeypatch)
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path / "home"))
    slow = {d: replace(p, math_efficiency=0.6 * p.math_efficiency) for d, p in A100.gemm.items()}
    card = replace(A100, gemm=slow)
    with standin(card, NAMES[A100], folder=tmp_path):
        done = perfmodel("calibrate", "--device", "cuda", "--name", "card", "--seconds", "5", "--json")
    assert done.exit_code == 0, done.output
    profile.forget()
    found = profile.load("card")
    for phase, ours in step_on(found).items():
        assert ours == pytest.approx(step_on(card)[phase], rel=0.01)
        if phase == "forward":
            assert ours > 1.2 * step_on(A100)[phase]


def step_on(card: Any) -> dict[str, float]:
    return predict("llama-3.2-1b", "full", device=card, batch=8, seq=1024, host="default").time.phases


def shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few repeats of each case: the stand-in does not vary, and of the host's costs no test of it asks."""
    monkeypatch.setattr(stopwatch, "CUDA_BURST", 1e-5)
    for name, few in (("WARM_UP", 1), ("STEPS", 3), ("LAYERS", 2)):
        monkeypatch.setattr(host_fit, name, few)
    monkeypatch.setattr(stopwatch, "WARM_UP", 1)
    monkeypatch.setattr(run, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(run, "REPEATS", 1)
    monkeypatch.setattr(run, "NEEDED", 130)
    monkeypatch.setattr(kernels, "MOST_COPIES", 2)


def test_a_campaign_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of rented hardware hangs on it. Its own process keeps off CUDA: its workers are forked from it."""
    shorten(monkeypatch)
    monkeypatch.setattr(campaign, "GRACE", 300.0)  # fake tensors take longer than a GPU's, on a busy machine far longer
    (tmp_path / "plan.toml").write_text(PLAN)
    words = ["validate", "campaign", "--device", "cuda", "--budget", "10m", "--plan", tmp_path / "plan.toml"]
    with standin(H100, NAMES[H100], by=FAST, folder=tmp_path) as gpu:
        done = perfmodel(*words, "--output", tmp_path / "c", "--json")
    assert done.exit_code == 0, done.output
    assert not gpu.asked
    summary = json.loads(done.output)
    assert summary["missing"] == []
    found = records.read_records(tmp_path / "c" / "records.jsonl")
    assert {r["stage"]: r["status"] for r in found if r["kind"] == "unmeasured"} == {"QLoRA": "missing"}
    assert (tmp_path / "c" / "page.html").exists()
    assert [cell["differences"] for cell in summary["check"]["cells"]] == [[], []]


def test_processes_that_share_a_gpu_box_join_by_nccl(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the device of its own rank, and DDP is told which. (What NCCL then does needs GPUs.)"""
    asked: list[Any] = []
    join = dist.init_process_group
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    monkeypatch.setattr(dist, "init_process_group", lambda backend: (asked.append(backend), join("gloo", **alone)))
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(team, "DistributedDataParallel", lambda model, **how: how)
    for name in team.LAUNCHED:
        monkeypatch.setenv(name, "0")
    try:
        together = team.join("ddp", "cuda")
        assert (asked, together.backend, together.first) == ([0, "nccl"], "nccl", True)
        setup, architecture = together.setup(Setup()), from_config(Cell.from_dict(tiny()).config)
        told: Any = team.wrap_for_team(torch.nn.Linear(1, 1), setup, architecture, "cuda")
        assert told == {"device_ids": [0], "find_unused_parameters": False, "static_graph": False}
    finally:
        team.leave()
