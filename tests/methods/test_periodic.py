"""Work besides the steps (block switches, merges, SVDs): counted and priced like a step, but never in its figures."""

from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import SMALL, architecture_of, calls_by_name, step_of

from perfmodel import predict
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.methods.parts.periodic import Periodic
from perfmodel.tape.tensor import Parameter

SPECS = ("lisa:gamma=2,interval=7", "badam:interval=30")
SETUP: dict[str, Any] = {"device": "l40s", "batch": 2, "seq": 17}


def elements(step: Any, name: str) -> int:
    """Elements that the periodic work of a step makes with calls of one name."""
    parts = [p for work in step.periodic for p in work.group.parts]
    return sum(p.repeat * op.outputs[0].numel for p in parts for op in p.ops if op.name == name)


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "adamw-loop", "adamw-fused", "sgd", "sgd-momentum"])
def test_a_fresh_state_is_what_torch_makes_at_a_first_step(optimizer: str) -> None:
    """A switch of blocks costs what the optimizer's first step has beyond a later one."""
    torch = pytest.importorskip("torch")
    from perfmodel.tracing.programs.updates import make_optimizer

    shapes, calls = [(4, 3), (5,)], []
    parameters = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    update = make_optimizer(parameters, optimizer)
    for _ in range(2):
        for p in parameters:
            p.grad = torch.ones_like(p)
        with torch.profiler.profile() as profiler:
            update.step()
        calls.append({e.key.removeprefix("aten::"): e.count for e in profiler.key_averages()})
    names = ("zeros_like", "zeros", "clone")
    more = {n: calls[0].get(n, 0) - calls[1].get(n, 0) for n in names}
    (work,) = step_of("llama", "lisa", optimizer=optimizer, device="cpu").periodic
    tape = {n: sum(p.repeat for p in work.group.parts for op in p.ops if op.name == n) for n in names}
    matrices = sum(p.repeat for p in work.group.parts) or 1
    if optimizer == "sgd":
        assert more["clone"] == 0
    else:
        assert {n: count / len(shapes) for n, count in more.items()} == {n: c / matrices for n, c in tape.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_a_switch_fills_the_states_of_what_becomes_active(spec: str) -> None:
    """LISA keeps the states of the embedding and the head; BAdam has none outside its block."""
    step = step_of("llama", spec)
    inside = [p for p in step.parameters if p.requires_grad and ".layers." in p.name]
    assert elements(step, "zeros_like") == 2 * sum(p.numel * p.count for p in inside) > 0


@pytest.mark.parametrize("spec", SPECS)
def test_the_figures_of_the_step_stay_without_it(spec: str) -> None:
    """A step that holds a share of a switch would be no step that anyone can measure."""
    step = step_of("gpt2", spec)
    assert not any("zeros_like" in calls_by_name(step, phase) for phase in ("forward", "backward", "optimizer"))


@pytest.mark.parametrize("spec", SPECS)
def test_json_has_seconds_and_their_share_of_a_step(spec: str) -> None:
    """Amortising is a division by the interval that the user gave."""
    (entry,) = predict("gpt2", spec, **SETUP).as_dict()["periodic"]
    assert set(entry) == {"what", "every", "seconds", "flops", "bytes", "seconds_per_step"}
    assert entry["every"] == int(spec.rpartition("=")[2])
    assert entry["seconds_per_step"] == pytest.approx(entry["seconds"] / entry["every"])
    assert entry["seconds"] > 0
    assert entry["bytes"] > 0
    assert predict("gpt2", "full", **SETUP).as_dict()["periodic"] == []


def test_a_grid_gives_what_its_points_give() -> None:
    """Batch 1 and 2 do not share one program: the list has to be put together again as the figures are."""
    batch = np.array([1, 2, 8])
    (grid,) = predict("gpt2", "lisa", **{**SETUP, "batch": batch}).periodic
    points = [predict("gpt2", "lisa", **{**SETUP, "batch": int(b)}).periodic[0] for b in batch]
    assert (grid.what, grid.every) == (points[0].what, points[0].every)
    for figure in ("seconds", "flops", "bytes", "seconds_per_step"):
        assert getattr(grid, figure).tolist() == [getattr(p, figure) for p in points]


def test_the_terminal_has_a_line_for_it() -> None:
    """What a run pays beside its steps must not hide in the JSON."""
    model = ["--model", "gpt2", "--device", "l40s"]
    text = CliRunner().invoke(main, ["predict", *model, "--method", "lisa"]).stdout
    assert "every 20 steps: switch of blocks" in text
    assert "a step on average" in " ".join(text.split())
    text = CliRunner().invoke(main, ["compare", *model, "--methods", "full", "badam"]).stdout
    assert "badam, every 50 steps: switch of the block" in text


def test_the_interval_is_one_integer() -> None:
    """An array of intervals has no single list of costs."""
    with pytest.raises(UserError, match="one integer"):
        Periodic("merge", np.array([2, 3]), lambda step: None)  # type: ignore[arg-type]


def test_parameters_of_small_models_have_the_names_that_recorders_look_for() -> None:
    """Recorders find blocks by their path in the module tree."""
    for name in SMALL:
        path = architecture_of(name).layer_path + "."
        assert any(p.name.startswith(path) and isinstance(p, Parameter) for p in step_of(name).parameters)


@pytest.mark.parametrize(("every", "beside"), [(1, []), (2, [2]), (10, [10])])
def test_what_is_done_in_every_step_is_part_of_the_step(every: int, beside: list[int]) -> None:
    """AdaLoRA's allocation with deltaT=1 would otherwise be counted twice, or never."""
    p = predict(architecture_of("llama"), f"adalora:delta_t={every}", device="l40s", seq=16)
    assert [x["every"] for x in p.as_dict()["periodic"]] == beside


@pytest.mark.parametrize("method", ["galore:r=4", "fedgalore:r=4", "apollo:r=4"])
def test_a_new_projection_replaces_the_one_in_use(method: str) -> None:
    """GaLore's SVD gives what the next steps project by, rows of Vᴴ of a tall gradient, columns of U of a wide one;
    APOLLO draws it.
    """
    step = step_of("llama", method, dtype="bf16")
    weights = [p.shape for p in step.parameters if ".layers." in p.name and len(p.shape) == 2]
    expected = {(4, n) if m >= n else (m, 4) for m, n in weights}
    svd = next(work for work in step.periodic if "project" in work.what)
    made = [op.outputs[0] for part in svd.group.parts for op in part.ops if op.name == "_to_copy"]
    assert {x.shape for x in made if x.dtype == "bf16"} == expected
