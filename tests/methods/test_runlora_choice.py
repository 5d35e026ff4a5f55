"""RunLoRA's choice of orders, by FLOPs and by predicted time, and the table that says why."""

from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from closed_forms import LAYERS, recorded

from perfmodel import predict
from perfmodel.cli import main
from perfmodel.methods import runlora
from perfmodel.tape.custom import BACKWARDS, FORWARDS

SETUP: dict[str, Any] = {"device": "l40s", "batch": 4, "seq": 512}


def choices_of(spec: str, **options: Any) -> list[dict[str, Any]]:
    return predict("llama-3.2-1b", spec, **{**SETUP, **options}).choices


def test_the_fewest_flops_are_chosen() -> None:
    """forward2 is cheaper than forward1 from T > nm/(n+m) tokens on, whatever the rank."""
    steps = [recorded("llama", "runlora:r=2", batch=1, seq=s) for s in (8, 40)]
    few, many = ({c.layer.rpartition(".")[2]: c for c in step.method.choices(step)} for step in steps)
    assert set(few) == set(many) == {"q_proj", "v_proj"}
    assert {c.forward for c in few.values()} == {1}
    assert {c.forward for c in many.values()} == {2}  # from T > 32 and T > 21.3
    for choice in [*few.values(), *many.values()]:
        assert choice.forward_flops[choice.forward] == min(choice.forward_flops.values())
        assert choice.backward_flops[choice.backward] == min(choice.backward_flops.values())
        assert choice.copies == LAYERS
        assert choice.forward_seconds is choice.backward_seconds is None


def test_other_methods_choose_nothing() -> None:
    """The list is there all the same: scripts need not ask which method they have."""
    assert choices_of("lora:r=2") == []
    assert predict("gpt2", "full", **SETUP).as_dict()["choices"] == []


@pytest.mark.parametrize("options", [{}, {"device": "h100-sxm", "seq": 4096}])
@pytest.mark.parametrize("rank", [8, 512])
def test_no_fixed_orders_are_predicted_to_be_faster(rank: int, options: dict[str, Any]) -> None:
    """Where the device is busy, what is fastest for a layer on its own is fastest in the step too."""

    def seconds(spec: str) -> float:
        p = predict("llama-3.2-1b", f"runlora:r={rank},targets=q_proj+up_proj,{spec}", **{**SETUP, **options})
        return float(p.time.phases["forward"] + p.time.phases["backward"])

    best = seconds("choose=time")
    assert best <= seconds("choose=flops") * 1.001
    for fixed in [*(f"forward={i}" for i in FORWARDS), *(f"backward={i}" for i in BACKWARDS)]:
        assert best <= seconds(f"choose=time,{fixed}") * 1.005, fixed


def test_time_and_flops_part_where_launches_decide() -> None:
    """With few tokens fewer products win, with more FLOPs: a choice by FLOPs would be blind to it."""
    by_flops, by_time = (choices_of(f"runlora:r=8,choose={c}", batch=1, seq=32)[1] for c in ("flops", "time"))
    assert (by_flops["layer"], by_time["layer"]) == ("self_attn.v_proj", "self_attn.v_proj")
    assert by_time["forward_seconds"][by_time["forward"]] < by_time["forward_seconds"][by_flops["forward"]]
    assert by_time["forward_flops"][by_time["forward"]] > by_time["forward_flops"][by_flops["forward"]]


@pytest.mark.parametrize("model", ["llama-3.2-1b", "gpt2", "opt-125m"])
def test_every_kind_of_layer_has_a_row(model: str) -> None:
    """What was chosen and why, for each adapted layer of a block, with every order's cost."""
    p = predict(model, "runlora:r=8,targets=all-linear,choose=time", **SETUP)
    assert p.step is not None
    assert sorted(c["layer"] for c in p.choices) == sorted(p.step.architecture.linear_names())
    for c in p.choices:
        assert c["copies"] == p.step.architecture.layers
        assert set(c["forward_flops"]) == set(c["forward_seconds"]) == set(FORWARDS)
        assert set(c["backward_flops"]) == set(c["backward_seconds"]) == set(BACKWARDS)
        assert c["forward_seconds"][c["forward"]] == min(c["forward_seconds"].values()) > 0
        assert c["backward_seconds"][c["backward"]] == min(c["backward_seconds"].values()) > 0
        assert c["forward_flops"][1] == runlora.FORWARD_FLOPS[1](4 * 512, c["inputs"], c["outputs"], 8)


def test_the_terminal_shows_the_table() -> None:
    """One row a layer, the best other order beside the chosen one; a fixed order shows what it loses."""
    args = ["predict", "--model", "llama-3.2-1b", "--device", "l40s", "--seq", "2048", "--method"]
    text = CliRunner().invoke(main, [*args, "runlora:r=64,choose=time,forward=1"]).stdout
    assert "orders of the products, chosen by predicted time" in text
    (row,) = (line.split() for line in text.splitlines() if line.startswith("q_proj"))
    assert row[:4] == ["q_proj", "16", "2048x2048", "1:"]
    assert row[6] == "2"
    assert float(row[7]) < 0
    assert "chosen by FLOPs" in CliRunner().invoke(main, [*args, "runlora"]).stdout


def test_a_grid_gives_what_its_points_give() -> None:
    """A grid is split where the fastest order changes."""
    seq = np.array([16, 64, 256, 1024])
    grid = predict("llama-3.2-1b", "runlora:choose=time", **{**SETUP, "batch": 1, "seq": seq})
    points = [predict("llama-3.2-1b", "runlora:choose=time", **{**SETUP, "batch": 1, "seq": int(s)}) for s in seq]
    assert grid.flops["total"].tolist() == [p.flops["total"] for p in points]
    assert grid.time.phases["total"] == pytest.approx([p.time.phases["total"] for p in points])
    assert grid.choices == []
