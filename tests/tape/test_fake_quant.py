"""Fake quantisation: the calls of torchao's layers, what they save, and where they are modelled."""

from functools import partial
from typing import Any

import pytest
from helpers import config_of, setup_of, step_of

from perfmodel import methods, predict
from perfmodel.architectures import from_config
from perfmodel.errors import UserError
from perfmodel.prediction import memory
from perfmodel.recording.record import build

QAT = "int8-int4:16"


@pytest.mark.parametrize(
    ("name", "tied", "options"),
    [
        ("llama", False, {}),
        ("llama", True, {"grad_accum": 2}),
        ("qwen2", False, {"checkpoint": "block"}),
        ("llama", False, {"dtype": "fp32", "amp": "bf16"}),
        ("opt", True, {"dtype": "fp32"}),
        ("phi3", False, {"amp": "bf16", "checkpoint": "block-reentrant"}),
        ("falcon", True, {}),
    ],
)
def test_the_tape_is_torchaos_program(name: str, tied: bool, options: dict[str, Any]) -> None:
    """Rounding, its scales and all that autograd makes of them, call by call, as Axolotl prepares a model."""
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig
    from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig, IntxFakeQuantizeConfig

    from perfmodel.tracing.programs import models, updates
    from perfmodel.tracing.trace import trace_step
    from validate.oracle.cases import Case
    from validate.oracle.counts import judge_step

    setup = setup_of(name, **{"seq": 16, "qat": QAT, **options})
    config = config_of(name, tie_word_embeddings=tied)
    architecture = from_config(config)
    method = methods.parse("full").bind(architecture)
    model = models.build_model(config, setup, device="meta")
    inputs = IntxFakeQuantizeConfig(dtype=torch.int8, granularity="per_token", is_symmetric=False)
    weights = Int4WeightFakeQuantizeConfig(group_size=16, activation_dtype=torch.bfloat16)
    quantize_(model, QATConfig(weight_config=weights, activation_config=inputs))
    if tied:  # on the meta device torchao makes new weights
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    step = build(architecture, method, setup, "cpu", view_replay=True)
    trace = trace_step(model, setup, step.optimizer, make=partial(updates.make, method=method))
    assert judge_step(Case(config, "full", setup), step, trace).differences == []


def test_weights_are_saved_several_times_over() -> None:
    """Rounding of a weight keeps fp32 copies of it until backward, unless a checkpoint makes them anew."""
    plain, rounded, again = (
        memory.peak_bytes(step_of("llama", layers=8, seq=16, **options))
        for options in ({}, {"qat": QAT}, {"qat": QAT, "checkpoint": "block"})
    )
    assert rounded - plain > 8 * step_of("llama", layers=8, seq=16).weight_bytes / 2
    assert again - plain < (rounded - plain) / 2


def test_liger_reads_the_heads_own_weight() -> None:
    """Its fused loss takes the weight and not the module, so nothing of the head is rounded."""

    def rounded(kernels: str) -> int:
        return sum(n for _, op, n in step_of("llama", seq=16, qat=QAT, kernels=kernels).ops() if op.name == "round")

    assert rounded("torch") - rounded("liger") == 3  # a zero point, its input, its weight


@pytest.mark.parametrize(
    ("model", "method", "options", "line"),
    [
        ("gpt2", "full", {}, "has Conv1D layers"),
        ("tinyllama-1.1b", "lora", {}, "use full"),
        ("tinyllama-1.1b", "full", {"compile": "default"}, "with compile default"),
        ("tinyllama-1.1b", "full", {"qat": "int8-int4:96"}, "groups of 96 do not divide the 2048 inputs"),
        ("tinyllama-1.1b", "full", {"qat": "int4"}, "use none or int8-int4:GROUP"),
        ("tinyllama-1.1b", "full", {"fp8": "rowwise"}, "leave one of them out"),
    ],
)
def test_what_is_not_modelled_is_refused(model: str, method: str, options: dict[str, Any], line: str) -> None:
    """One line that says what is."""
    with pytest.raises(UserError, match=line):
        predict(model, method, **{"device": "h100-sxm", "batch": 1, "seq": 512, "qat": "int8-int4:32", **options})
