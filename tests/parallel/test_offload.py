"""Laws of offloading, which need no torch: what leaves the GPU's memory, what bus and host take, what is refused.

What is copied when is compared with the real programs: tests/oracle/test_parallel.py and test_zero.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws_of_ranks import LLAMA, ROUNDING

from perfmodel import advise, predict
from perfmodel.cli import main
from perfmodel.devices.device import profile_of
from perfmodel.devices.price import ONE_PASS
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.network.files import load
from perfmodel.setup import Setup

FORMS = (
    ("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "optimizer"), ("zero3", "params"), ("fsdp2", "params"),
    ("fsdp1", "params"),
)  # fmt: skip
USUAL: dict[str, Any] = {"dtype": "bf16", "batch": 2, "seq": 256}


def on_bus(faster: float) -> DeviceProfile:
    """An H100 whose bus is so many times as fast."""
    on = profile_of("h100-sxm")
    return replace(on, hardware=replace(on.hardware, bus_bandwidth=63e9 * faster))


@pytest.mark.parametrize(("parallel", "offload"), FORMS)
@pytest.mark.parametrize("method", ["full", "lora:r=8"])
def test_what_is_offloaded_leaves_the_gpu(parallel: str, offload: str, method: str) -> None:
    """The reason to offload at all: masters, states and gradients are gone, and where asked for the weights."""
    setup = Setup(**USUAL, gpus=4, parallel=parallel, offload=offload)
    there, usual = (predict(LLAMA, method, s, "h100-sxm").memory for s in (setup, replace(setup, offload="none")))
    assert there.gradients == there.optimizer == 0
    assert there.weights == (0 if offload == "params" else usual.weights)
    assert there.peak < usual.peak
    assert usual.host == 0


def test_the_hosts_memory_is_what_one_counts_by_hand() -> None:
    """FSDP2 keeps 16-bit weights, gradients and two moments there; ZeRO-2 fp32 ones, and 16-bit copies to send."""
    n = 2 * 2048 * 512 + 5 * (4 * 512**2 + 3 * 512 * 1024 + 2 * 512) + 512  # of the model above
    largest = 2048 * 512
    fsdp = predict(LLAMA, "full", Setup(**USUAL, gpus=4, parallel="fsdp2", offload="params"), "h100-sxm")
    counters = 4 * (3 + 5 * 9)  # fp32, one a tensor
    assert fsdp.total_params == n
    assert fsdp.memory.host == 2 * n // 4 * 4 + counters
    zero = predict(LLAMA, "full", Setup(**USUAL, gpus=4, parallel="zero2", offload="optimizer"), "h100-sxm")
    assert zero.memory.host == (4 * 4 + 2) * n // 4 + 2 * largest


def test_the_hosts_cores_take_what_one_counts_by_hand() -> None:
    """One pass of 28 B a parameter over the memory's bandwidth; what the bus brings back is less than the rest."""
    setup = Setup(**USUAL, gpus=8, parallel="zero2", offload="optimizer", clip_grad=False)
    p = predict("llama-3.2-1b", "full", setup, "h100-sxm")
    part, bandwidth = p.trainable_params / 8, load("dgx-h100").host_bandwidth / 8
    adam = 28 * part / (ONE_PASS * bandwidth)
    assert adam < p.time.communication.offloading["optimizer"] < 2.0 * adam


@pytest.mark.parametrize(("link", "is_slot"), [("pcie", True), ("pcie_host", True), ("nvswitch", False)])
def test_a_slot_with_fewer_lanes_than_the_card_sets_the_pace(tmp_path: Path, link: str, is_slot: bool) -> None:
    """A desktop's second slot often has 4 lanes; what NVLink joins copies over the card's own bus."""
    node = tmp_path / "made-up.toml"
    node.write_text(
        f'name = "made up"\ngpu = "h100-sxm"\ngpus = 2\nlink = "{link}"\nchannels = 4\n'
        "[[tiers]]\ngpus = 2\nbandwidth = 4e9\n"
    )
    setup = Setup(**USUAL, gpus=2, parallel="fsdp2", offload="params", node=str(node))
    wide, narrow = (predict(LLAMA, "full", setup, on_bus(x)).time.phases["total"] for x in (1.0, 4 / 63))
    assert (wide == narrow) is is_slot


@settings(max_examples=10)
@given(
    form=st.sampled_from(FORMS), gpus=st.sampled_from((1, 2, 8)), faster=st.sampled_from((1.5, 4.0, 1e6)),
    method=st.sampled_from(("full", "lora:r=4")), grad_accum=st.sampled_from((1, 3)),
)  # fmt: skip
def test_a_faster_bus_makes_no_step_slower(
    form: tuple[str, str], gpus: int, faster: float, method: str, grad_accum: int
) -> None:
    """And what offloading costs is part of the step."""
    parallel, offload = form
    if parallel.startswith("fsdp") and gpus == 1:
        gpus = 4
    setup = Setup(**USUAL, gpus=gpus, parallel=parallel, offload=offload, grad_accum=grad_accum)
    slow, fast = (predict(LLAMA, method, setup, on_bus(x)).time for x in (1.0, faster))
    assert fast.phases["total"] <= slow.phases["total"] * (1 + ROUNDING)
    for time in (slow, fast):
        assert 0 <= time.communication.offloading["total"] < time.phases["total"]


@pytest.mark.parametrize("tokens", [(1, 128), (16, 2048)])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(("parallel", "offload"), FORMS)
def test_offloading_makes_no_step_faster(parallel: str, offload: str, method: str, tokens: tuple[int, int]) -> None:
    """Weights that came from the host were gathered without waiting for what others wait for."""
    batch, seq = tokens
    asked: dict[str, Any] = {"device": "l40s", "gpus": 8, "parallel": parallel, "batch": batch, "seq": seq}
    here, there = (predict("qwen3-0.6b", method, offload=o, **asked).time for o in ("none", offload))
    assert there.phases["total"] >= here.phases["total"] * (1 - ROUNDING)


@pytest.mark.parametrize(("parallel", "offload"), FORMS)
def test_a_grid_equals_its_single_steps(parallel: str, offload: str) -> None:
    """What is offloaded has dims like all else."""
    usual = {**USUAL, "gpus": 4, "parallel": parallel, "offload": offload}
    batches = np.array([1, 3])
    grid = predict(LLAMA, "full", Setup(**{**usual, "batch": batches}), "h100-sxm")
    for i, batch in enumerate(batches.tolist()):
        one = predict(LLAMA, "full", Setup(**{**usual, "batch": batch}), "h100-sxm")
        assert grid.time.phases["total"][i] == pytest.approx(one.time.phases["total"], rel=ROUNDING)
        assert np.broadcast_to(grid.memory.peak, 2)[i] == one.memory.peak


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_one_gpu_offloads_and_exchanges_nothing(stage: str) -> None:
    """What ZeRO-Offload is known for: a model on one GPU whose states have no room there."""
    setup = Setup(**USUAL, parallel=stage, offload="optimizer")
    p = predict(LLAMA, "full", setup, "rtx-4090")
    assert not any(p.time.communication.calls.values())
    assert p.memory.host > 4 * 4 * p.total_params
    assert p.time.communication.exposed["total"] == 0


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        ({"gpus": 4, "offload": "params"}, "DDP keeps everything on the GPU"),
        ({"offload": "optimizer"}, "DDP keeps everything on the GPU"),
        ({"gpus": 4, "parallel": "fsdp2", "offload": "optimizer"}, "use|--offload params"),
        ({"gpus": 4, "parallel": "zero2", "offload": "params"}, "--offload optimizer"),
        ({"gpus": 4, "parallel": "zero2", "offload": "optimizer", "optimizer": "sgd"}, "use adamw"),
        ({"gpus": 4, "parallel": "fsdp2", "offload": "params", "optimizer": "adamw-8bit"}, "use adamw"),
        ({"gpus": 1, "parallel": "fsdp2", "offload": "params"}, "one GPU"),
        ({"gpus": 4, "parallel": "fsdp2", "offload": "params", "tp": 2}, "--tp 1"),
        ({"gpus": 1, "parallel": "zero2", "offload": "optimizer", "compile": "default"}, "not modelled with compile"),
        ({"gpus": 4, "parallel": "fsdp2", "offload": "half"}, "offload 'half' is unknown"),
    ],
)
def test_what_is_not_offloaded_is_refused_in_a_line(setup: dict[str, Any], says: str) -> None:
    """And the line says what would be."""
    with pytest.raises(UserError, match=says):
        predict(LLAMA, "full", Setup(**{**USUAL, **setup}), "h100-sxm")


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("offload", ["params", "optimizer"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_what_a_refusal_names_in_its_place_is_taken(parallel: str, offload: str, gpus: int) -> None:
    """Of three forms that were named for one GPU two were refused."""
    asked = {**USUAL, "offload": offload, "gpus": gpus}
    try:
        predict(LLAMA, "full", Setup(**asked, parallel=parallel), "h100-sxm")
    except UserError as error:
        named = str(error).partition("--parallel ")[2].replace(",", " ").split()
        for other in (word for word in named if word != "or"):
            predict(LLAMA, "full", Setup(**asked, parallel=other), "h100-sxm")
    else:
        assert (parallel, offload, gpus) == ("fsdp2", "params", 4)


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_launcher_that_offloads_is_answered(tmp_path: Path, gpus: int) -> None:
    """Of one GPU too, for which it is written as often as for several."""
    file = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "DEEPSPEED", "num_processes": gpus,
        "mixed_precision": "bf16", "deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "cpu"},
    }  # fmt: skip
    path = tmp_path / "launch.json"
    path.write_text(json.dumps(file))
    asked = ("--model", "gpt2", "--method", "full", "--seq", "64", "--device", "rtx-4090", "--json")
    found = CliRunner().invoke(main, ["predict", *asked, "--accelerate", str(path), "--gpus", str(gpus)])
    assert found.exit_code == 0, found.output
    answer = json.loads(found.stdout[found.stdout.index("{") :])
    assert (answer["setup"]["parallel"], answer["setup"]["offload"]) == ("zero2", "optimizer")
    assert answer["memory_bytes"]["host"] > 0
    assert answer["offloading_s"]["total"] > 0


def test_a_cpu_has_nothing_to_offload_to() -> None:
    """Its memory is the host's."""
    with pytest.raises(UserError, match="is a CPU"):
        predict(LLAMA, "full", Setup(parallel="zero2", offload="optimizer", dtype="bf16"), "cpu-epyc-genoa-1t")


def test_advice_offloads_where_nothing_fits_and_only_there() -> None:
    """Offloading is slow: nobody wants it who has room."""
    setup = Setup(dtype="bf16", seq=256)
    tight = advise("llama-3.2-1b", "full", setup, "h100-sxm", memory_bytes=4.5e9)
    assert tight.best is not None
    assert tight.best.prediction.setup.offload != "none"
    roomy = advise("llama-3.2-1b", "full", setup, "h100-sxm")
    assert roomy.best is not None
    assert roomy.best.prediction.setup.offload == "none"
