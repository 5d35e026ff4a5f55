"""T5: what its encoder and decoder ask of setups and methods, and the kernel that trains its position bias."""

from typing import Any

import pytest

from perfmodel import UserError, methods, predict
from perfmodel.architectures import Config, from_config
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from validate.oracle.cases import STACKS

BIASES = 2 * 32 * 4  # of both stacks: 32 buckets, 4 heads


def step_of(method: str, capability: str = "9.0", **setup: Any) -> Step:
    architecture = from_config(Config(STACKS["t5"], "t5", "t5"))
    return build(
        architecture, methods.parse(method).bind(architecture), Setup(**{"seq": 20, **setup}), "cuda", capability
    )


def kernels(step: Step) -> dict[str, int]:
    found: dict[str, int] = {}
    for _, op, count in step.ops():
        if op.name.endswith("_attention_backward"):
            name = op.name.removeprefix("_scaled_dot_product_").removesuffix("_attention_backward")
            found[name] = found.get(name, 0) + count
    return found


def test_a_trained_bias_takes_the_kernel_that_gives_it_a_gradient() -> None:
    """cuDNN's, Hopper's first choice, gives none: 3 + 4 blocks attend to themselves, 4 across, where nothing trains."""
    full = step_of("full")
    assert kernels(full) == {"efficient": 7, "cudnn": 4}
    assert sum(p.numel for p in full.parameters if "relative_attention_bias" in p.name and p.used) == BIASES
    assert kernels(step_of("lora:r=4")) == {"cudnn": 11}
    assert kernels(step_of("lora:r=4", checkpoint="block")) == {
        "efficient": 4,
        "cudnn": 7,
    }  # zeros that need a gradient


def test_a_trained_bias_has_a_gradient_of_every_sample_which_are_summed() -> None:
    """As the kernel writes them: a batch's worth of memory traffic that one of (1, heads, seq, seq) does not show."""
    step = step_of("full", "8.0", batch=3)
    made = {tuple(s.shape) for _, op, _ in step.ops() if "efficient_attention_backward" in op.name for s in op.outputs}
    assert (3, 4, 20, 20) in made
    summed = [op for _, op, _ in step.ops() if op.name == "sum.dim_IntList" and op.inputs[0].shape == (3, 4, 20, 20)]
    assert {op.outputs[0].shape for op in summed} == {(1, 4, 20, 20)}


@pytest.mark.parametrize(
    ("method", "setup", "says"),
    [
        ("full", {"dtype": "fp16"}, "fp16"),
        ("lora:r=4,layers=0-1", {}, "targets=/regex/"),
        ("qlora:r=4", {}, "fp32"),
        ("prompt_tuning:tokens=4", {}, "encoder-decoder"),
        ("lora:r=4,modules_to_save=lm_head", {}, "encoder-decoder"),
        ("full", {"objective": "dpo"}, "causal language model"),
        ("full", {"checkpoint": "block-reentrant"}, "reentrant"),
        ("full", {"packing": "varlen"}, "packing"),
    ],
)
def test_what_is_not_mirrored_is_refused(method: str, setup: dict[str, Any], says: str) -> None:
    """In one line, before anything is answered for another program."""
    with pytest.raises(UserError, match=says) as caught:
        step_of(method, **setup)
    assert "\n" not in str(caught.value)


def test_an_answer_says_of_what_seq_is_the_length() -> None:
    """One number for two stacks: whoever has short targets must know."""
    answer = predict("flan-t5-small", "lora:r=4", device="a100-80gb-sxm", batch=2, seq=16)
    assert any("decoder's target alike" in note for note in answer.notes)
