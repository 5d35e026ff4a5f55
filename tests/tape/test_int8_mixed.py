"""Linear layers whose products run in 8-bit integers: the calls of torchao's own modules, and what is refused."""

import re
import sys
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest
from helpers import NAMES, config_of, setup_of, step_of

from perfmodel import methods, predict
from perfmodel.architectures import from_config
from perfmodel.calls import costs
from perfmodel.devices import profile
from perfmodel.devices.price import durations
from perfmodel.errors import UserError
from perfmodel.program.op import Attrs, Op, Spec
from perfmodel.recording.record import build
from perfmodel.setup import Setup

NOT_CONVERTED = ("gpt2", "falcon", "bert", "roberta", "distilbert", "gpt_neo")  # `recording.converted` says why
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "full", {"dtype": "fp32", "grad_accum": 2}),
    ("llama", "full", {"seq": 17, "checkpoint": "block"}),
    ("llama", "lora:r=16,targets=all-linear", {}),
    ("qwen2", "lora:r=4", {"checkpoint": "block"}),
    ("opt", "top_k:k=1", {"checkpoint": "block-reentrant"}),
    ("qwen2", "full", {"dtype": "fp16"}),
    *((name, "full", {}) for name in NAMES if name not in NOT_CONVERTED),
]


@pytest.fixture
def torchao_on_cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torchao's int8 training with the product that it runs on a GPU; Triton itself is not needed on fake tensors."""
    training = pytest.importorskip("torchao.prototype.quantized_training.int8_mixed_precision")
    import torch
    from torch.utils.flop_counter import flop_registry, mm_flop, register_flop_formula

    try:
        import triton  # noqa: F401
    except ImportError:
        for name in ("triton", "triton.language"):
            monkeypatch.setitem(sys.modules, name, MagicMock())
    from torchao.prototype.quantized_training import int8_mm

    monkeypatch.setattr(training, "scaled_int8_mm", int8_mm.scaled_int8_mm)
    if torch.ops.torchao.scaled_int8_mm not in flop_registry:
        register_flop_formula(torch.ops.torchao.scaled_int8_mm)(lambda a, b, *_, **__: mm_flop(a, b))
    return training


def converted_model(name: str, spec: str, setup: Setup, training: Any) -> Any:
    """A model on fake tensors with torchao's layers in its blocks; adapters and head stay (torchtune's filter)."""
    from torch import nn
    from torchao.quantization import quantize_

    from perfmodel.tracing.programs import models

    def is_converted(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and "lora_" not in path and bool(re.search(r"\.(layers|h)\.", path))

    config = config_of(name)
    architecture = from_config(config)
    method = methods.parse(spec).bind(architecture)
    model = models.apply_method(models.build_model(config, setup, device="meta"), method, architecture)
    quantize_(model, training.Int8MixedPrecisionTrainingConfig(module_swap=True), filter_fn=is_converted)
    return model


@pytest.mark.parametrize(("name", "spec", "options"), CASES)
def test_the_tape_is_torchaos_program(name: str, spec: str, options: dict[str, Any], torchao_on_cuda: Any) -> None:
    """Casts, scales, copies and products of a converted model, call by call, in the layers that torchtune converts."""
    pytest.importorskip("peft")
    from perfmodel.tracing.programs import updates
    from perfmodel.tracing.trace import trace_step
    from validate.oracle.cases import Case
    from validate.oracle.counts import judge_step

    setup = setup_of(name, int8="mixed", **{"seq": 16, **options})
    config = config_of(name)
    architecture = from_config(config)
    method = methods.parse(spec).bind(architecture)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    model = converted_model(name, spec, setup, torchao_on_cuda)
    trace = trace_step(model, setup, step.optimizer, make=partial(updates.make, method=method))
    assert not judge_step(Case(config, spec, setup), step, trace).differences
    assert any(op.name == "torchao::scaled_int8_mm" for _, op, _ in step.ops())


def test_rows_out_of_order_end_both_programs(torchao_on_cuda: Any) -> None:
    """GPT-Neo's attention hands down gradients that torchao's layer cannot view as rows: no answer for no program."""
    pytest.importorskip("peft")
    from perfmodel.tracing.programs import updates
    from perfmodel.tracing.trace import trace_step

    setup = setup_of("gpt_neo", int8="mixed", seq=16)
    method = methods.parse("full").bind(from_config(config_of("gpt_neo")))
    with pytest.raises((RuntimeError, ValueError), match="view"):
        trace_step(converted_model("gpt_neo", "full", setup, torchao_on_cuda), setup, "adamw",
                   make=partial(updates.make, method=method))  # fmt: skip
    with pytest.raises(UserError, match="whose rows lie out of order"):
        step_of("gpt_neo", int8="mixed", seq=16)


def test_a_frozen_weight_gets_no_gradient() -> None:
    """Unlike float8's, this layer asks which gradients are wanted; the head's product stays an ordinary one."""

    def products(method: str) -> int:
        step = step_of("llama", method, int8="mixed", seq=16)
        return sum(n for _, op, n in step.ops() if op.name == "torchao::scaled_int8_mm")

    linears = 7 * int(config_of("llama").values["num_hidden_layers"])
    assert products("full") == 3 * linears
    assert products("lora:r=4,targets=all-linear") <= 2 * linears


SHEETS = {name: profile.load(name).hardware for name in profile.names()}
FASTER = [name for name, sheet in SHEETS.items() if (sheet.int8_flops or 0) > sheet.peak(sheet.half)]


@pytest.mark.parametrize("device", FASTER)
def test_a_large_product_takes_half_the_time_and_a_quarter_on_geforce(device: str) -> None:
    """Tensor cores take integers at twice the rate of 16 bits, and at four times where those with fp32 sums run at half
    of theirs."""
    on, n = profile.load(device), 8192
    half, faster = on.hardware.half, 4 if on.hardware.half_rate else 2

    def seconds(name: str, dtype: str) -> float:
        operand, out = Spec(dtype, (n, n)), Spec(half, (n, n))
        return float(durations([Op(name, (operand, operand), (out,), 2 * operand.nbytes, out.nbytes,
                                   attrs=Attrs("tn"))], on)[0])  # fmt: skip

    assert 0.8 < faster * seconds("torchao::scaled_int8_mm", "i8") / seconds("mm", half) < 1.3
    assert on.hardware.int8_flops == pytest.approx(faster * on.hardware.peak(half), rel=0.02)


def test_products_count_as_any() -> None:
    """2mnk FLOPs, in the dtype of the operands and not of the scales behind them."""
    scales = Spec("bf16", (4,)), Spec("bf16", (32,))
    op = Op("torchao::scaled_int8_mm", (Spec("i8", (4, 16)), Spec("i8", (16, 32)), *scales), (Spec("bf16", (4, 32)),),
            1, 1)  # fmt: skip
    assert (costs.flops(op), costs.operand_dtype(op), costs.kind(op)) == (2 * 4 * 16 * 32, "i8", "gemm")


def test_eager_rounding_costs_more_than_int8_saves() -> None:
    """Without torch.compile each operand is rounded by a dozen kernels; torchao means the layer to be compiled."""
    plain, int8 = (predict("llama-3-8b", device="h100-sxm", batch=2, seq=4096, int8=int8) for int8 in ("none", "mixed"))
    assert int8.time.phases["total"] > plain.time.phases["total"]
    assert int8.time.components["gemm16"] < plain.time.components["gemm16"]
    assert any("scaled_int8_mm" in note for note in int8.notes)
    assert not any("scaled_int8_mm" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("model", "method", "options", "line"),
    [
        ("opt-125m", "bitfit", {}, "use one of full"),
        ("tinyllama-1.1b", "full", {"amp": "bf16", "dtype": "fp32"}, "leave amp out"),
        ("tinyllama-1.1b", "full", {"fp8": "rowwise"}, "leave one of them out"),
        ("tinyllama-1.1b", "full", {"device": "v100"}, "file of v100 has no int8 peak"),
        ("tinyllama-1.1b", "full", {"device": "b300"}, "file of b300 has no int8 peak beyond bf16's"),
        ("tinyllama-1.1b", "full", {"device": "cpu-epyc-genoa-1t"}, "has no int8 peak"),
        ("tinyllama-1.1b", "full", {"int8": "weight"}, "int8 'weight' is unknown"),
    ],
)
def test_what_is_not_modelled_is_refused(model: str, method: str, options: dict[str, Any], line: str) -> None:
    """A step that would be another program, or none, ends in one line that names what to leave out."""
    given = {"device": "h100-sxm", "batch": 1, "seq": 512, "int8": "mixed", **options}
    with pytest.raises(UserError, match=line):
        predict(model, method, **given)
