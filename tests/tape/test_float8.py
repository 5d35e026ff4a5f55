"""Linear layers in 8-bit floats: the calls of torchao's own modules, where they stand, and what they are priced at."""

from functools import partial
from typing import Any

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
from perfmodel.setup import FP8

NOT_CONVERTED = ("gpt2", "falcon", "bert", "roberta", "distilbert")  # `recording.float8` says why
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "full", {"fp8": "padded"}),
    ("llama", "full", {"fp8": "padded", "seq": 17}),
    ("llama", "full", {"fp8": "rowwise", "dtype": "fp32", "amp": "bf16"}),
    ("llama", "full", {"fp8": "tensorwise", "dtype": "fp32", "amp": "bf16", "grad_accum": 2}),
    ("llama", "lora:r=16,targets=all-linear", {"fp8": "tensorwise"}),
    ("llama", "lora:r=16", {"fp8": "rowwise", "checkpoint": "block"}),
    ("qwen2", "lora:r=4", {"fp8": "rowwise"}),
    ("opt", "top_k:k=1", {"fp8": "tensorwise", "checkpoint": "block-reentrant"}),
    ("gpt_neo", "full", {"fp8": "rowwise", "dtype": "fp16"}),
    *((name, "full", {"fp8": "tensorwise"}) for name in NAMES if name not in NOT_CONVERTED),
]


@pytest.mark.parametrize(("name", "spec", "options"), CASES)
def test_the_tape_is_torchaos_program(name: str, spec: str, options: dict[str, Any]) -> None:
    """Casts, scales, copies and products of a converted model, call by call, in the layers that accelerate converts."""
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    from accelerate.utils.ao import convert_model_to_fp8_ao
    from torchao.float8 import Float8LinearConfig

    from perfmodel.tracing.programs import models, updates
    from perfmodel.tracing.trace import trace_step
    from validate.oracle.cases import Case
    from validate.oracle.counts import judge_step

    setup = setup_of(name, **{"seq": 16, **options})
    config = config_of(name)
    architecture = from_config(config)
    method = methods.parse(spec).bind(architecture)
    model = models.apply_method(models.build_model(config, setup, device="meta"), method, architecture)
    padded = setup.fp8 == "padded"
    recipe = Float8LinearConfig(pad_inner_dim=True) if padded else Float8LinearConfig.from_recipe_name(setup.fp8)
    convert_model_to_fp8_ao(model, config=recipe)
    step = build(architecture, method, setup, "cpu", view_replay=True)
    trace = trace_step(model, setup, step.optimizer, make=partial(updates.make, method=method))
    differences = judge_step(Case(config, spec, setup), step, trace).differences
    if setup.tokens % 16:  # PyTorch's counter sees a product before it is padded
        differences = [line for line in differences if "FLOPs" not in line]
    assert not differences
    assert any(op.name == "_scaled_mm" for _, op, _ in step.ops())


def test_a_frozen_weight_gets_a_gradient_that_nobody_reads() -> None:
    """torchao's backward asks for none of its gradients by name: LoRA saves no product of the base layers in float8."""

    def products(method: str, fp8: str) -> int:
        step = step_of("llama", method, fp8=fp8, seq=16)
        names = ("mm", "addmm", "_scaled_mm")
        return sum(n for part, op, n in step.ops() if op.name in names and part.phase == "backward")

    assert products("lora:r=4,targets=all-linear", "tensorwise") > products("lora:r=4,targets=all-linear", "none")
    assert products("full", "tensorwise") == products("full", "none")


@pytest.mark.parametrize("device", [name for name in profile.names() if profile.load(name).hardware.fp8_flops])
def test_a_large_product_takes_about_half_the_time(device: str) -> None:
    """Tensor cores run 8-bit floats at twice the rate of 16-bit ones on every board whose peak is known."""
    on, n = profile.load(device), 8192

    def seconds(name: str, dtype: str) -> float:
        operand, out = Spec(dtype, (n, n)), Spec("bf16", (n, n))
        return float(durations([Op(name, (operand, operand), (out,), 2 * operand.nbytes, out.nbytes,
                                   attrs=Attrs("tn"))], on)[0])  # fmt: skip

    assert 0.4 < seconds("_scaled_mm", "e4m3") / seconds("mm", "bf16") < 0.65
    assert on.hardware.fp8_flops == pytest.approx(2 * on.hardware.peak("bf16"), rel=0.02)


def test_products_count_as_any() -> None:
    """2mnk FLOPs, in the dtype of the operands and not of the scales behind them."""
    scale = Spec("fp32", ())
    op = Op("_scaled_mm", (Spec("e4m3", (4, 16)), Spec("e5m2", (16, 32)), scale, scale), (Spec("bf16", (4, 32)),), 1, 1)
    assert (costs.flops(op), costs.operand_dtype(op), costs.kind(op)) == (2 * 4 * 16 * 32, "e4m3", "gemm")


@pytest.mark.parametrize("recipe", FP8[1:])
def test_eager_casts_cost_more_than_float8_saves(recipe: str) -> None:
    """torchao says so itself: without torch.compile the casts are a dozen kernels that each pass over memory."""
    plain, float8 = (predict("llama-3-8b", device="h100-sxm", batch=2, seq=4096, fp8=fp8) for fp8 in ("none", recipe))
    assert float8.time.phases["total"] > plain.time.phases["total"]
    assert float8.time.components["gemm16"] < plain.time.components["gemm16"]
    assert any("no float8 products were measured" in note for note in float8.notes)


@pytest.mark.parametrize(
    ("model", "method", "options", "line"),
    [
        ("tinyllama-1.1b", "full", {"seq": 500}, "use fp8 padded"),
        ("tinyllama-1.1b", "full", {"device": "a100"}, "a100-80gb-sxm has no float8 peak"),
        ("tinyllama-1.1b", "full", {"fp8": "e4m3"}, "fp8 'e4m3' is unknown"),
    ],
)
def test_what_is_not_modelled_is_refused(model: str, method: str, options: dict[str, Any], line: str) -> None:
    """A step that would be another program, or none, ends in one line that names what to leave out."""
    given = {"device": "h100-sxm", "batch": 1, "seq": 512, "fp8": "tensorwise", **options}
    with pytest.raises(UserError, match=line):
        predict(model, method, **given)
