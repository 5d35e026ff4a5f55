"""Laws of the linear layer that DeepSpeed's ZeRO-3 puts in the place of PyTorch's, which need no DeepSpeed."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ring_laws import LAYERS, LLAMA

from perfmodel import UserError, methods, predict
from perfmodel.architectures import Config, from_config
from perfmodel.prediction.memory import peak_bytes
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup

PRODUCTS = ("mm", "addmm")


def step_of(method: str, **setup: Any) -> Step:
    """A rank's step."""
    architecture = from_config(LLAMA)
    return build(architecture, methods.parse(method).bind(architecture), Setup(gpus=2, **setup))


def products(step: Step) -> int:
    """Products of a step."""
    return sum(count for _, op, count in step.ops() if op.name in PRODUCTS)


@settings(max_examples=4)
@given(st.sampled_from((1024, 4096)), st.sampled_from((1, 2)))
def test_a_lora_keeps_the_inputs_of_frozen_layers(seq: int, batch: int) -> None:
    """PyTorch's layer keeps nothing of x for a weight without a gradient; a Function that saves x does: the gated
    activation of every layer is what a LoRA on queries and values would not need."""
    zero3, zero2 = (step_of("lora:r=4", parallel=form, seq=seq, batch=batch) for form in ("zero3", "zero2"))
    wide = batch * seq * 1024 * 2 * LAYERS  # B of the MLP's inner values in bf16
    assert peak_bytes(zero3) > peak_bytes(zero2) + wide
    assert products(zero3) == products(zero2)


@pytest.mark.parametrize("method", ["full", "lora:r=4", "lora:r=4,targets=all-linear"])
def test_a_block_that_is_run_again_runs_its_last_product(method: str) -> None:
    """Its input is saved behind the product, so that early stopping comes too late; a reentrant checkpoint has no such
    stop."""
    usual, again = (products(step_of(method, parallel=form, seq=64, checkpoint="block")) for form in ("fsdp2", "zero3"))
    last = (
        2 if method.endswith("all-linear") else 1
    )  # the adapter's own product is the last one, and its first is saved
    assert usual < again <= usual + last * LAYERS
    reentrant = [
        products(step_of(method, parallel=form, seq=64, checkpoint="block-reentrant")) for form in ("fsdp2", "zero3")
    ]
    assert reentrant[0] == reentrant[1]


def test_what_is_added_to_its_output_in_place_finds_no_view() -> None:
    """With a bias PyTorch's layer gives a view of a matrix, whose history is written anew; a Function's is none."""
    architecture = from_config(Config({**LLAMA.values, "model_type": "qwen2"}, "qwen2", "qwen2"))
    steps = [
        build(architecture, methods.parse("reslora:r=4").bind(architecture), Setup(seq=64, gpus=2, parallel=form))
        for form in ("zero2", "zero3")
    ]
    copies = [sum(count for _, op, count in step.ops() if op.name == "new_empty_strided") for step in steps]
    assert copies[0] > copies[1] == 0


@pytest.mark.parametrize(
    "asked", [{"parallel": "zero3"}, {"engine": "deepspeed-zero3"}, {"parallel": "zero3", "tp": 2}]
)
def test_several_gpus_run_deepspeeds_python_like_one(asked: dict[str, Any]) -> None:
    """Its hooks gather beside what they do alone: eight GPUs were told a third of one's time."""
    host_bound: dict[str, Any] = {"device": "b200", "method": "lora:r=4", "batch": 1, "seq": 128}
    one = predict("qwen2.5-0.5b", **host_bound, engine="deepspeed-zero3")
    several = predict("qwen2.5-0.5b", **host_bound, gpus=4, **asked)
    assert several.time.phases["forward"] > 0.9 * one.time.phases["forward"]


def test_an_engine_that_is_zero3_takes_no_other_form() -> None:
    with pytest.raises(UserError, match="deepspeed-zero3 is zero3 on several GPUs, not parallel fsdp2"):
        predict("qwen2.5-0.5b", "lora", device="b200", gpus=4, engine="deepspeed-zero3", parallel="fsdp2")
