"""What cannot be meant is one line that names the argument, whichever door it comes through; near misses are taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel import Device, Job, Node, Setup, UserError, advise, compare, explain, plan, predict, sweep, traced
from perfmodel.resources import DATA

MODEL = "gpt2"
PLAN = {"device": "l40s", "samples": 100}
Ask = Callable[..., Any]

ENTRIES: dict[str, Ask] = {
    "predict": predict,
    "compare": compare,
    "explain": lambda *given, **options: explain(*given, **{"axes": (), **options}),
    "advise": advise,
    "sweep": sweep,
    "plan": lambda *given, **options: plan(*given, **{**PLAN, **options}),
}
# to each of them: argument -> what is given, and how the line begins
ALIKE: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model must be a name"), ({"model": 5}, "model must be a name"),
    ({"model": ["gpt2"]}, "model must be a name"), ({"model": b"gpt2"}, "model must be a name"),
    ({"device": 3}, "device must be "), ({"device": b"l40s"}, "device must be "),
    ({"device": ["l40s", None]}, "device must be "), ({"device": {}}, ""),
    ({"setup": {"batch": 4}}, "setup must be a Setup"), ({"setup": "l40s"}, "setup must be a Setup"),
    ({"node": 5, "gpus": 2}, "node must be "), ({"image_size": "448"}, "images are counted from 0"),
    ({"image_size": None}, "images are counted from 0"), ({"images": 1.5}, "images are counted from 0"),
    ({"image_size": (1, 2, 3)}, "images are counted from 0"), ({"qat": 5}, "qat 5 is unknown"),
    ({"routing": None}, "routing None is unknown"), ({"pp_schedule": 5}, "pp_schedule 5 is unknown"),
    ({"dtype": np.array(["bf16", "fp16"])}, "dtype array("), ({"optimizer": None}, "optimizer None is unknown"),
    ({"tp": [1, 2]}, "tp must be one integer"), ({"grad_accum": [1, 2]}, "grad_accum must be one integer"),
    ({"prompt": [1, 2]}, "prompt must be one integer"), ({"clip_grad": "no"}, "clip_grad must be True or False"),
    ({"clip_grad": [True]}, "clip_grad must be True or False"), ({"seq": "512"}, "seq must "),
    ({"batch": [1.5]}, "batch must hold integers"), ({"batch": [[1], [1, 2]]}, "batch must "),
    ({"batchsize": 4}, "unknown setup option 'batchsize': did you mean 'batch'?"),
]  # fmt: skip
METHODS = [None, 5, {"name": "lora"}, ["lora", None], b"lora", {}]
BY_ENTRY: list[tuple[Ask, dict[str, Any], str]] = [
    (compare, {"methods": "lora"}, "compare needs at least two methods"),
    (explain, {"axes": None}, "axes must be "), (explain, {"axes": 5}, "axes must be "),
    (explain, {"axes": ["rank"]}, "axis 'rank' is unknown"),
    (advise, {"memory_bytes": "24GB"}, "memory_bytes must be a number"),
    (advise, {"memory_bytes": True}, "memory_bytes must be a number"),
    (advise, {"memory_bytes": [1e9]}, "memory_bytes must be a number"), (advise, {"memory_bytes": 0}, "memory must be"),
    (advise, {"min_trainable": "20M"}, "min_trainable must be a number"),
    (advise, {"min_trainable": -5}, "min_trainable must be a number"),
    (advise, {"batch": [1, 2]}, "advise takes one batch"),
    (sweep, {"k": [1, 2]}, "a sweep over k needs a method"), (sweep, {"batch": []}, "batch must hold integers"),
    (sweep, {"rank": None}, "rank must hold integers"), (sweep, {"device": None}, "device must be "),
    (predict, {"device": None}, "device must be "),
    *((plan, {**PLAN, **given}, begins) for given, begins in [
        ({"samples": "1k"}, "samples must be a whole number"), ({"samples": 1.5}, "samples must be a whole number"),
        ({"samples": np.array([1, 2])}, "samples must be a whole"), ({"epochs": None}, "epochs must be a number"),
        ({"epochs": "3"}, "epochs must be a number"), ({"samples": None, "tokens": "50M"}, "tokens must be a number"),
        ({"drop_last": "no"}, "drop_last must be True or False"), ({"global_batch": "8"}, "global_batch must be "),
        ({"global_batch": 2.5}, "global_batch must be "), ({"global_batch": -1}, "global_batch must be "),
        ({"gpus": []}, "gpus must be "), ({"gpus": "8"}, "gpus must be "), ({"price": None}, "price must be "),
        ({"price": "cheap"}, "price 'cheap': "), ({"price": {"l40s": -2}}, "price 'l40s=-2': "),
        ({"price": {"l40s": float("nan")}}, "price 'l40s=nan': "),
        ({"price": {"l40x": 2}}, "unknown device 'l40x': did you mean 'l40'?"),
        ({"price_kind": "spott"}, "price_kind 'spott' is unknown: did you mean 'spot'?"),
        ({"price_kind": None}, "price_kind None is unknown"), ({"deadline": "2"}, "deadline must be a number"),
        ({"node_power": "5"}, "node_power must be a number"), ({"grid_co2": "x"}, "grid_co2 must be a number"),
        ({"samples": None, "job": {"samples": 100}}, "job must be a Job"), ({"methods": []}, "a plan needs a method"),
    ]),
]  # fmt: skip


def refusal(ask: Ask, **given: Any) -> str:
    """The one line that a question is refused with."""
    if ask is ENTRIES["plan"] or ask is plan:
        given = {name: value for name, value in given.items() if name != "samples" or value is not None}
    with pytest.raises(UserError) as refused:
        ask(**given)
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("given", "begins"), ALIKE, ids=str)
def test_every_entry_names_the_argument(entry: str, given: dict[str, Any], begins: str) -> None:
    if entry == "sweep" and "batch" in given:
        pytest.skip("its axes take any iterable")
    assert refusal(ENTRIES[entry], **{"model": MODEL, **given}).startswith(begins)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("host", [None, 3, {}])
def test_a_host_is_named(entry: str, host: Any) -> None:
    assert refusal(ENTRIES[entry], model=MODEL, host=host).startswith("host must be ")


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_are_named(method: Any) -> None:
    for entry, name in (("predict", "method"), ("explain", "a"), ("explain", "b"), ("advise", "method")):
        assert refusal(ENTRIES[entry], model=MODEL, **{name: method}).startswith("method must be a text")
    if method:
        for entry in ("compare", "sweep", "plan", "advise"):
            assert "method" in refusal(ENTRIES[entry], model=MODEL, methods=method)


@pytest.mark.parametrize(("ask", "given", "begins"), BY_ENTRY)
def test_arguments_of_one_entry(ask: Ask, given: dict[str, Any], begins: str) -> None:
    assert refusal(ask, model=MODEL, **given).startswith(begins)


def test_other_doors() -> None:
    node = Node.load("dgx-h100")
    for ask, begins in (
        (lambda: Device.load(None), "device must be "), (lambda: Node.load(None), "node must be "),
        (lambda: node.collective(None, 5), "collective None is unknown"), (lambda: Job(samples="x"), "samples must"),
        (lambda: node.collective("all_gather", 5, dtype=["bf16"]), "dtype ['bf16'] is unknown"),
        (lambda: Device.load("l40s").gemm(1, 2, 3, dtype=["bf16"]), "dtype ['bf16'] is unknown"),
        (lambda: Device.load("l40s").gemm([[1], [2, 3]], 2, 3), "dims must be "),
        (lambda: predict(""), "model: no name"),
        (lambda: node.collective("all_gather", [[1], [2, 3]]), "message_bytes must be "),
        (lambda: Setup(batch="x"), "batch must be "), (lambda: traced(None), "model must be "),
    ):  # fmt: skip
        assert refusal(ask).startswith(begins)


def test_long_and_broken_values_are_cut_to_a_line() -> None:
    line = refusal(predict, model=MODEL, method=np.arange(1000).reshape(50, 20))
    assert line.startswith("method must be a text")
    assert len(line) < 200


def test_one_method_may_stand_alone() -> None:
    assert [m.spec() for m in sweep(MODEL, "lora").methods] == ["lora:r=8"]
    assert plan(MODEL, "lora", **PLAN).methods == ("lora:r=8",)
    assert advise(MODEL, "lora", methods="full").tried > 1


def test_a_host_is_the_path_of_a_file() -> None:
    file = DATA / "hosts" / "epyc-milan.toml"
    assert predict(MODEL, host=file).time.phases == predict(MODEL, host="epyc-milan").time.phases
    assert len(sweep(MODEL, device=Path(DATA / "devices" / "l40s.toml"), host=file).table()["step_s"]) == 2


def test_a_list_is_an_array() -> None:
    arrays = predict(MODEL, batch=np.array([1, 2]), seq=np.array([128, 256]))
    for given in ([1, 2], (1, 2), range(1, 3)):
        assert np.array_equal(predict(MODEL, batch=given, seq=[128, 256]).memory.peak, arrays.memory.peak)


def test_a_column_of_pandas_is_an_array() -> None:
    pandas = pytest.importorskip("pandas")
    assert Setup(batch=pandas.Series([1, 2])).batch.tolist() == [1, 2]


def test_a_price_may_stand_alone() -> None:
    for price in (2.5, "2.5", [2.5], {"L40S": 2.5}):
        assert [run.price.usd for run in plan(MODEL, "lora", price=price, **PLAN).runs] == [2.5]


def test_a_whole_number_may_be_a_float() -> None:
    assert Job(samples=1e4) == Job(samples=10_000)
    assert isinstance(Job(samples=1e4).samples, int)
