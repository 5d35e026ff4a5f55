"""A step taken apart: every op on the account of what asked for it, and parts that sum to the step.

A waterfall explains a difference only if its bars add up to it, and if a bar holds what its name says.
"""

from dataclasses import replace
from functools import cache
from itertools import permutations

import pytest
from helpers import architecture_of, op_bytes, setup_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from perfmodel import Setup, UserError, methods
from perfmodel.architectures import load
from perfmodel.calls import costs
from perfmodel.devices import host as hosts
from perfmodel.devices import profile
from perfmodel.methods.parts.virtual import SoftPrompt
from perfmodel.prediction.predict import Prediction, predict
from perfmodel.program.op import Op
from perfmodel.program.part import PHASES
from perfmodel.questions.anatomy import PARTS, WAITING, Anatomy, dissect, part_of
from perfmodel.recording.step import Step

SIZES = {  # that small models have room for
    "c3a": "block_size=8", "road": "group_size=32", "vblora": "length=16", "top_k": "k=2", "galore": "r=8",
    "fedgalore": "r=8",
}  # fmt: skip
METHODS = tuple(f"{name}:{SIZES[name]}" if name in SIZES else name for name in methods.registered())
ARCHITECTURES = ("llama", "gpt2", "opt")
DEVICES = ("l40s", "h100-sxm", "cpu-epyc-genoa-2c")
SETUPS = (
    {}, {"batch": 1, "seq": 1}, {"checkpoint": "block"}, {"checkpoint": "block-reentrant"},
    {"grad_accum": 3}, {"attention": "eager", "clip_grad": False}, {"dtype": "fp32", "amp": "bf16"},
    {"cuda_graphs": True, "optimizer": "sgd"},
)  # fmt: skip
HOST = hosts.load()


@cache
def predicted(method: str, model: str = "llama", device: str = "l40s", setup: int = 0) -> Prediction | None:
    """A prediction of a small model, or None where the method refuses it."""
    try:
        return predict(architecture_of(model), method, setup_of(model, **SETUPS[setup]), device)
    except UserError:
        return None


def made(method: str, model: str = "llama", setup: int = 0) -> Step:
    p = predicted(method, model, setup=setup)
    assert p is not None
    assert p.step is not None
    return p.step


def anatomy(p: Prediction) -> Anatomy:
    return dissect(p, profile.load(p.device), HOST)


def flops_of(step: Step, *parts: str) -> int:
    """FLOPs of some parts of a step."""
    return sum(count * costs.flops(op) for part, op, count in step.ops() if part_of(op, part) in parts)


def ops_on_the_device(p: Prediction, phase: str) -> list[tuple[Op, int]]:
    """Ops of a phase but for those on host tensors (step counters)."""
    assert p.step is not None
    return [(op, n) for part, op, n in p.step.ops() if part.phase == phase and not op.attrs.host]


def owners(step: Step) -> set[str]:
    return {op.owner for _, op, _ in step.ops()}


def assert_bars_sum_to_the_difference(a: Prediction, b: Prediction, one: Anatomy, two: Anatomy) -> None:
    difference = b.mean_step - a.mean_step
    total = max(a.mean_step, b.mean_step)
    assert abs(sum(two.parts[name] - one.parts[name] for name in PARTS) - difference) <= 1e-14 * total


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_bars_sum_to_the_difference_for_every_pair(model: str) -> None:
    """The promise of the waterfall, for every two methods that are registered today, and those to come."""
    made = [(p, anatomy(p)) for name in METHODS if (p := predicted(name, model)) is not None]
    for (a, one), (b, two) in permutations(made, 2):
        assert_bars_sum_to_the_difference(a, b, one, two)


@settings(derandomize=True, max_examples=120)
@given(
    pair=st.tuples(st.sampled_from(METHODS), st.sampled_from(METHODS)),
    model=st.sampled_from(ARCHITECTURES),
    device=st.sampled_from(DEVICES),
    setup=st.integers(0, len(SETUPS) - 1),
)
def test_bars_sum_to_the_difference_in_every_setup(pair: tuple[str, str], model: str, device: str, setup: int) -> None:
    """The same with checkpointing, autocast, micro-batches, CUDA graphs, and on a CPU."""
    a, b = (predicted(name, model, device, setup) for name in pair)
    assume(a is not None and b is not None)
    assert_bars_sum_to_the_difference(a, b, anatomy(a), anatomy(b))


@pytest.mark.parametrize("method", METHODS)
def test_parts_are_the_time_of_the_prediction(method: str) -> None:
    """The parts are priced op by op, the prediction part by part: kernels and waiting must come out alike."""
    asked = (predicted(method, "opt", DEVICES[setup % len(DEVICES)], setup) for setup in range(len(SETUPS)))
    answered = [p for p in asked if p is not None]
    assert answered
    for p in answered:
        apart = anatomy(p)
        total, busy = p.time.phases["total"], p.time.device_busy
        assert sum(apart.parts.values()) == pytest.approx(p.mean_step, rel=1e-13)
        assert apart.parts[WAITING] == pytest.approx(total - busy, abs=1e-13 * total)
        assert sum(ph.busy for ph in apart.phases.values()) == pytest.approx(busy, rel=1e-13)
        assert all(seconds >= -1e-13 * total for seconds in apart.parts.values())
        for name in PHASES:
            phase = apart.phases[name]
            assert phase.seconds == p.time.phases[name]
            assert phase.flops == p.flops[name]
            assert phase.bytes == sum(n * op_bytes(op) for op, n in ops_on_the_device(p, name))
            assert sum(phase.limited.values()) == pytest.approx(phase.busy, rel=1e-13)


@pytest.mark.parametrize("model", ARCHITECTURES)
@pytest.mark.parametrize("setup", [0, 2, 6])
def test_the_base_model_runs_the_same_forward_products_under_every_method(model: str, setup: int) -> None:
    """Whatever a method adds is on its own account: else its cost would hide in the base model's bar."""
    full = made("full", model, setup)
    base = flops_of(full, "gemm_forward")
    assert base == flops_of(full, "gemm_weight_grad")
    for name in (*METHODS, "lora:targets=all-linear,implementation=unsloth"):
        p = predicted(name, model, setup=setup)
        if p is None:
            continue
        assert p.step is not None
        seq = p.setup.seq
        longer = p.step.method.tokens if isinstance(p.step.method, SoftPrompt) else 0  # virtual tokens run through all
        assert flops_of(p.step, "gemm_forward") * seq == base * (seq + longer), name


@pytest.mark.parametrize("method", ["full", "top_k:k=1", "norm", "bitfit", "lisa", "badam"])
def test_methods_without_adapters_have_no_adapter_ops(method: str) -> None:
    """An adapter's bar under full fine-tuning would be nonsense."""
    assert owners(made(method, "opt")) == {"base", "attention"}


@pytest.mark.parametrize("checkpoint", [2, 3])
@pytest.mark.parametrize("method", ["full", "lora:targets=all-linear", "dora", "paca"])
def test_without_the_recompute_a_checkpointed_step_is_the_plain_one(method: str, checkpoint: int) -> None:
    """Model FLOPs, and so the MFU, must not count what a checkpoint runs again."""
    step = made(method, "llama", checkpoint)
    again = sum(count * costs.flops(op) for _, op, count in step.ops() if op.recompute)
    everything = sum(count * costs.flops(op) for _, op, count in step.ops())
    plain = made("full")  # whose first block needs its input's gradient, as a checkpoint makes every method's do
    assert again > 0
    if method == "full":
        assert everything - again == sum(count * costs.flops(op) for _, op, count in plain.ops())
    assert flops_of(step, "gemm_forward") == flops_of(plain, "gemm_forward")
    assert {op.recompute for part, op, _ in step.ops() if part.phase != "backward"} == {False}


@pytest.mark.parametrize("model", ["llama", "opt"])
def test_the_products_of_lora_are_the_adapters_and_nothing_else(model: str) -> None:
    """2·T·r·(n+m) per layer and pass; the lowest block's inputs need no gradient."""
    r, architecture = 4, architecture_of(model)
    step = made(f"lora:r={r},targets=all-linear", model)
    tokens = step.setup.tokens
    adapters = [p for p in step.parameters if p.kind == "adapter"]
    once = sum(2 * tokens * p.numel * p.count for p in adapters)
    found = flops_of(step, "adapter_gemm")
    assert 2 * once < found <= 3 * once  # forward, weight gradients, and the input gradients that are needed
    lowest = {p.name.rsplit(".", 3)[-3]: p for p in adapters if ".0." in p.name and "lora_A" in p.name}
    assert 3 * once - found == sum(
        2 * tokens * p.numel for name, p in lowest.items() if name in ("q_proj", "k_proj", "v_proj")
    )
    assert flops_of(step, "gemm_weight_grad") == 0
    assert architecture.layers > 1


@pytest.mark.parametrize("name", METHODS)
def test_adapters_leave_frozen_weights_without_a_gradient(name: str) -> None:
    """Frozen weights have no weight-gradient GEMM: the first thing that every adapter saves."""
    p = predicted(name)
    if p is None or p.step is None:
        pytest.skip("not for a Llama")
    if name == "hra" or any(q.kind == "weight" and q.requires_grad for q in p.step.parameters):
        pytest.skip("forms the gradients of weights")
    assert flops_of(p.step, "gemm_weight_grad") == 0


def test_dequantisation_has_a_part_of_its_own() -> None:
    """Forward, backward and recompute unpack the weights; nothing else may stand there, and no other method has it."""
    step = made("qlora", "llama", 2)
    names = {op.name for part, op, _ in step.ops() if part_of(op, part) == "dequantisation" and not op.view}
    assert names == {"bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise", "add_.Tensor"}
    unpacked = sum(n for _, op, n in step.ops() if op.name == "bitsandbytes::dequantize_4bit")
    layers = architecture_of("llama").layers * len(architecture_of("llama").linear_names())
    assert 2 * layers < unpacked <= 3 * layers  # a checkpoint stops before what backward does not ask for again
    assert not any(op.owner == "dequantisation" for _, op, _ in made("lora", "llama", 2).ops())


def test_gradients_of_further_micro_batches_are_accumulation() -> None:
    """One sum a parameter and further micro-batch; under LoRA the adapters' own."""
    setup = next(i for i, s in enumerate(SETUPS) if "grad_accum" in s)
    step = made("full", "llama", setup)
    sums = [(op, n) for part, op, n in step.ops() if part_of(op, part) == "accumulation"]
    assert sum(n for _, n in sums) == (step.setup.grad_accum - 1) * sum(p.count for p in step.parameters)
    lora = made("lora", "llama", setup)
    assert not any(part_of(op, part) == "accumulation" for part, op, _ in lora.ops())


def test_a_grid_has_no_anatomy() -> None:
    """A grid has no single step; that must be said in one line."""
    import numpy as np

    p = predict(architecture_of("llama"), "lora", device="l40s", batch=2, seq=np.array([16, 32]))
    with pytest.raises(UserError, match="single setup"):
        dissect(p, profile.load("l40s"), HOST)


@pytest.mark.parametrize("form", ["fsdp2", "fsdp1", "zero1", "zero2", "zero3"])
def test_copies_of_what_travels_are_none_of_the_models_own_calls(form: str) -> None:
    """FSDP's copies into and out of its buffers stood under "norms, activations": LoRA's second largest gain."""
    on = profile.load("h100-sxm")
    setup = Setup(gpus=8, checkpoint="block", seq=512, parallel=form)
    alone, several = (
        dissect(predict(load("llama-3.2-1b"), methods.parse("full"), s, on, host=HOST), on, HOST)
        for s in (replace(setup, parallel="ddp"), setup)
    )
    assert several.parts["pointwise"] == pytest.approx(alone.parts["pointwise"], rel=0.01)
    assert several.parts["exchange"] > 0
