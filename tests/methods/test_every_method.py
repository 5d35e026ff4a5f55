"""What must hold for every registered method, whichever file it is in: a new one is covered as soon as it is there.

A method is taken with its defaults, or with smaller sizes where a small model cannot hold them.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any

import pytest
from helpers import architecture_of, calls_by_name
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perfmodel import explain, methods
from perfmodel.errors import UserError
from perfmodel.methods.lora import Lora
from perfmodel.prediction.predict import Prediction, predict
from perfmodel.recording.step import Step
from perfmodel.tape.tensor import Parameter

NAMES = tuple(methods.registered())
MODELS = ("llama", "gpt2")
BATCH, SEQ = 2, 17
T = BATCH * SEQ  # no dim of the small models is 34, so a product over 34 terms is a weight gradient
SMALLER = (32, 16, 8, 2, 1)  # values to try for a size whose default exceeds a small model
DENSE = {  # methods whose own mathematics has products of a weight gradient's shape
    "boft": "the layer multiplies with a rewritten weight, whose gradient leads to what trains",
    "hra": "the reflections get their gradient through that of the reflected weight",
    "randlora": "its factors have full rank",
}


def predicted(name: str, model: str, **options: Any) -> Prediction | None:
    """A prediction of the method's first spec that fits the model, or None where it is refused."""
    return next((p for p in (predicted_as(spec, model, **options) for spec in specs(name)) if p), None)


def asked(name: str, model: str) -> Prediction:
    """A prediction; the test is skipped, aloud, where the model does not have the method."""
    p = predicted(name, model)
    if p is None:
        pytest.skip(f"{model} has no {name}: {refusal(name, model)}")
    return p


def refusal(name: str, model: str) -> str:
    """The line in which a method is refused with its smallest sizes."""
    with pytest.raises(UserError) as caught:
        predict(architecture_of(model), list(specs(name))[-1], device="l40s", batch=BATCH, seq=SEQ)
    return str(caught.value)


def predicted_as(spec: str, model: str, **options: Any) -> Prediction | None:
    """A prediction, or None where it is refused."""
    with suppress(UserError):
        return predict(architecture_of(model), spec, **{"device": "l40s", "batch": BATCH, "seq": SEQ, **options})
    return None


def specs(name: str) -> Iterator[str]:
    """The method with its defaults, then with one of its sizes smaller."""
    yield name
    for f in fields(methods.registered()[name]):
        if "help" in f.metadata and isinstance(f.default, int) and not isinstance(f.default, bool):
            yield from (f"{name}:{f.name}={value}" for value in SMALLER)


def some_model(name: str) -> str:
    """A model that has the method."""
    return next(model for model in MODELS if predicted(name, model))


def step_of(p: Prediction) -> Step:
    assert p.step is not None
    return p.step


def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a JSON value with their places."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{path}[{i}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


@pytest.mark.parametrize("name", NAMES)
def test_a_method_predicts_a_llama_or_a_gpt2(name: str) -> None:
    """A method that fits neither of them is no use to anyone; what it refuses, it refuses in one line."""
    assert any(predicted(name, model) for model in MODELS)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_no_more_trains_than_the_model_and_its_adapters_have(name: str, model: str) -> None:
    """Optimizer and gradient memory follow from this count."""
    p = asked(name, model)
    full = predict(architecture_of(model), "full", device="l40s", seq=SEQ).total_params
    parameters = step_of(p).parameters
    adapters = sum(q.numel * q.count for q in parameters if q.kind == "adapter")
    assert 0 < p.trainable_params <= p.total_params
    assert p.total_params - adapters <= full
    assert sum(q.numel * q.count for q in parameters if q.kind != "adapter" and q.requires_grad) <= full


def dense_products(step: Step, phase: str) -> Counter[tuple[int, ...]]:
    """GEMMs by the shape of the weight they multiply with (forward) or form the gradient of (backward), sorted."""
    found: Counter[tuple[int, ...]] = Counter()
    for part, op, times in step.ops():
        if part.phase != phase or op.name not in ("mm", "addmm", "addmm_", "bmm"):
            continue
        a, b = op.inputs[-2:]
        inner, tokens = a.shape[-1], a.shape[-2]
        if phase == "forward" and tokens in (T, SEQ):
            found[tuple(sorted(b.shape[-2:]))] += times
        if phase == "backward" and inner in (T, SEQ):
            found[tuple(sorted(op.outputs[0].shape[-2:]))] += times
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_have_no_gradient(name: str, model: str) -> None:
    """A gradient of a weight's shape belongs to a weight that trains, or to a dense update that forward multiplied too
    (LoHa's ΔW): anything else is the GEMM that freezing is there to save."""
    if name in DENSE:
        pytest.skip(DENSE[name])
    assert unasked_gradients(step_of(asked(name, model))) == []


def test_gradients_of_frozen_weights_would_be_seen() -> None:
    """The check above on a step that has them: full fine-tuning whose weights are called frozen afterwards."""
    p = predicted("full", "llama")
    assert p is not None
    for q in step_of(p).parameters:
        q.requires_grad = False
    assert len(unasked_gradients(step_of(p))) == 4  # 64 x 64, 32 x 64, 64 x 96, and the head


def unasked_gradients(step: Step) -> list[tuple[int, ...]]:
    """Shapes of frozen weights with more gradients than trained weights and dense updates ask for."""
    shapes = {sorted_shape(q) for q in step.parameters if q.kind == "weight" and len(q.shape) == 2}
    trained, frozen = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for q in step.parameters:
        if len(q.shape) == 2 and (q.requires_grad or q.kind == "weight"):
            (trained if q.requires_grad else frozen)[sorted_shape(q)] += q.count
    forward, backward = dense_products(step, "forward"), dense_products(step, "backward")
    updates = {s: max(0, forward[s] - frozen[s] - trained[s]) for s in shapes}
    return [s for s in shapes if backward[s] > trained[s] + updates[s]]


def sorted_shape(q: Parameter) -> tuple[int, ...]:
    return tuple(sorted(q.shape))


@pytest.mark.parametrize("name", NAMES)
def test_no_targets_are_refused_in_one_line(name: str) -> None:
    """A typing error in a target must not come out as a method that costs nothing."""
    cls, model = methods.registered()[name], some_model(name)
    known = {f.name for f in fields(cls)}
    if "targets" not in known:
        pytest.skip("trains no chosen layers")
    inner = ",inner=lora,k=1" if "inner" in known else ""
    with pytest.raises(UserError) as caught:
        predict(architecture_of(model), f"{name}:targets=no_such_layer{inner}", device="l40s")
    assert str(caught.value).startswith("method ")
    assert "'no_such_layer'" in str(caught.value)
    assert "\n" not in str(caught.value)
    if "layers_to_transform" in known:  # the head lies in no block, so there is nothing to adapt
        with pytest.raises(UserError) as caught:
            predict(
                architecture_of(model, tie_word_embeddings=False), f"{name}:targets=lm_head,layers=0", device="l40s"
            )
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_zero_are_refused(name: str) -> None:
    """Rank 0 or 0 blocks would train nothing."""
    cls, model = methods.registered()[name], some_model(name)
    sizes = [f.name for f in fields(cls) if f.name in cls().sizes() and not isinstance(f.default, str)]
    if not sizes:
        pytest.skip("has no sizes")
    for size in sizes:
        with pytest.raises(UserError) as caught:
            predict(architecture_of(model), f"{name}:{size}=0", device="l40s")
        assert str(caught.value).startswith(f"method {name}")
        assert "\n" not in str(caught.value)


OTHERWISE = ("lora_fa:projected=false",)  # methods that can do without what they bring


@pytest.mark.parametrize("name", [*NAMES, *OTHERWISE])
def test_a_method_says_whether_it_brings_its_own_optimizer(name: str) -> None:
    """Its step is the same with any optimizer of the setup then, and the answer says whose it is; else it is not."""
    model = some_model(name.partition(":")[0])
    kind = methods.registered()[name.partition(":")[0]]
    spec = next(s for s in ([name] if ":" in name else specs(name)) if predicted_as(s, model))
    one, other = (predicted_as(spec, model, optimizer=optimizer) for optimizer in ("adamw-loop", "sgd"))
    if one is None or other is None:
        pytest.skip(f"{kind.name} needs AdamW")
    assert (step_of(one).method.own_optimizer is not None) == (one.kernels == other.kernels)


def test_whoever_adapts_in_its_own_way_has_no_fused_kernels() -> None:
    """They would take the place of layers whose program is not LoRA's, and be answered for it."""
    kin = [cls for cls in methods.registered().values() if issubclass(cls, Lora)]
    assert {cls.implementations for cls in kin if cls.adapted is not Lora.adapted} == {("peft",)}


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_parses_back_to_itself(name: str) -> None:
    """The name in a result is what one types to get the same result."""
    p = predicted(name, some_model(name))
    assert p is not None
    assert methods.parse(p.method).spec() == p.method
    plain = methods.registered()[name]()
    assert methods.parse(plain.spec()) == plain


def test_what_prices_a_choice_is_no_option() -> None:
    """A method is what it was asked as: the device that its orders were chosen for makes no other of it."""
    asked_for = methods.parse("runlora:choose=time")
    assert asked_for.priced(lambda parts: parts) == asked_for  # type: ignore[arg-type,return-value]


def test_biases_are_trained_wherever_there_are_any() -> None:
    """Qwen2's only ones are those of q, k and v."""
    p = predict(architecture_of("qwen2", layers=5), "bitfit", device="l40s", batch=BATCH, seq=SEQ)
    assert p.trainable_params == 5 * 3 * 64


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("c_attn+c_proj+c_fc", " on all linear layers"),
        ("all-linear", " on all linear layers"),
        ("c_attn", " on c_attn"),
    ],
)
def test_targets_that_are_all_layers_are_told_as_that(targets: str, said: str) -> None:
    """A list of all names reads as a choice among them."""
    assert methods.parse(f"lora:r=4,targets={targets}").bind(architecture_of("gpt2")).in_words() == f"LoRA r=4{said}"


@pytest.mark.parametrize(("frozen", "below"), [("true", True), ("false", False)])
def test_checkpoints_cover_the_frozen_blocks_below_or_not(frozen: str, below: bool) -> None:
    """LLaMA-Factory leaves out the blocks that do not train, the Trainer does not ask."""
    method = methods.parse(f"top_k:k=2,checkpoint_frozen={frozen}").bind(architecture_of("llama", layers=5))
    assert [method.checkpoints(layer) for layer in range(5)] == [below] * 3 + [True] * 2


@pytest.mark.parametrize("name", NAMES)
def test_options_and_source_are_documented(name: str) -> None:
    """`perfmodel methods` is the manual."""
    cls = methods.registered()[name]
    assert cls.source
    assert cls.describe()[-1] in ".:"
    for option, text in methods.options(cls).items():
        assert text, option


@settings(max_examples=120, derandomize=True)
@given(
    name=st.sampled_from(NAMES), model=st.sampled_from(MODELS), batch=st.integers(1, 4), seq=st.integers(1, 64),
    dtype=st.sampled_from(("bf16", "fp32")), checkpoint=st.sampled_from(("none", "block", "block-reentrant")),
    optimizer=st.sampled_from(("adamw", "adamw-fused", "sgd")), grad_accum=st.integers(1, 2),
    device=st.sampled_from(("a100-80gb-sxm", "l40s", "t4")),
)  # fmt: skip
def test_no_figure_is_negative_and_json_holds_them_all(name: str, model: str, **options: Any) -> None:
    """Counts, times and bytes are sizes of real things; a script reads the same from JSON as Python has."""
    p = predicted(name, model, **options)
    assume(p is not None)
    assert p is not None
    value = p.as_dict()
    assert json.loads(json.dumps(value)) == json.loads(json.dumps(value, default=str))
    found = list(numbers(value))
    assert len(found) > 30
    for path, number in found:
        assert math.isfinite(number), path
        assert number >= 0, path
    assert {"model", "method", "time_s", "memory_bytes", "periodic", "choices", "notes"} <= set(value)
    assert value["time_s"]["low"] <= value["time_s"]["total"] <= value["time_s"]["high"]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_explained_along_its_size(name: str) -> None:
    """Where the verdict turns is asked of a number: ranks of single blocks are no axis, and no reason to fail."""
    model = some_model(name)
    spec = next(s for s in specs(name) if predicted_as(s, model))
    found = explain(architecture_of(model), "full", spec, device="l40s", batch=BATCH, seq=SEQ, axes=("size",))
    assert len(found.crossovers) <= 1


@pytest.mark.parametrize("objective", ["reward", "prm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_new_head_goes_with_it_or_is_refused(name: str, objective: str) -> None:
    """A head is a matrix, with or without a bias, among the parameters of an optimizer that may know pairs alone."""
    p = predicted(name, "llama", objective=objective)
    assert p is None or any(q.name.startswith("score.") for q in step_of(p).parameters)


@pytest.mark.parametrize("name", ["galore:r=4", "fedgalore:r=4", "apollo:r=4"])
def test_stacked_experts_are_no_linear_layers_to_project(name: str) -> None:
    """`_get_galore_optimizer` of transformers passes over what is no `nn.Linear`."""
    p = predict("qwen3-30b-a3b", name, device="h200", batch=1, seq=16)
    assert p.trainable_params == p.total_params


def test_lora_fa_updates_a_head_by_adamw() -> None:
    """`LoraFAOptimizer` projects the gradients of pairs of `lora` parameters alone."""
    calls = calls_by_name(step_of(asked("lora_fa", "llama")), "optimizer")
    head = predicted("lora_fa", "llama", objective="reward")
    assert head is not None
    beside = calls_by_name(step_of(head), "optimizer")
    assert beside["addcdiv_"] == calls["addcdiv_"] + 1
    assert beside["linalg_pinv.atol_rtol_tensor"] == calls["linalg_pinv.atol_rtol_tensor"]


@pytest.mark.parametrize(
    ("method", "device", "options", "dtype"),
    [
        ("lora_8bit", "cpu-xeon-2.5ghz-1t", {}, "bf16"),
        ("full", "h100-sxm", {"fp8": "rowwise"}, "e4m3"),
        ("lora", "h100-sxm", {}, "bf16"),  # its adapters are fp32
        ("full", "h100-sxm", {"dtype": "fp32", "amp": "bf16"}, "bf16"),
    ],
)
def test_mfu_is_a_share_of_the_fastest_peak_that_is_used(
    method: str, device: str, options: dict[str, str], dtype: str
) -> None:
    """On a CPU without bf16 the 8-bit products were 143 % of what the setup's dtype reaches."""
    p = predict("llama-3.2-1b", method, device=device, batch=8, seq=512, **options)  # type: ignore[arg-type]
    assert p.peak_dtype == dtype
    assert 0 < p.mfu < 1
