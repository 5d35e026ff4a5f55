"""What the tests share: small models, recorded steps, and totals over the ops of a step."""

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from perfmodel import methods
from perfmodel.architectures import Architecture, Config, from_config
from perfmodel.calls import costs
from perfmodel.devices import host
from perfmodel.devices.host import Host
from perfmodel.methods import Method
from perfmodel.program.op import Op
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.setup import Setup
from validate.oracle.cases import SMALL, fitting, with_targets

NAMES = tuple(SMALL)
METHODS = ("full", "lora:r=4", "lora:r=4,targets=all-linear,dropout=0.1", "top_k:k=1", "top_k:k=1,inner=lora", "norm")
QWEN = {  # no program of transformers', so not among those that are traced
    "model_type": "qwen", "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "kv_channels": 16, "vocab_size": 128,
}  # fmt: skip
MPT = {  # of llm-foundry, likewise
    "model_type": "mpt_causal_lm", "d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 128, "max_seq_len": 64,
}  # fmt: skip
OWN_DEVICE = """
name = "My GPU"
kind = "cuda"
architecture = "ampere"
compute_capability = "8.6"

[datasheet]
sm_count = 28
clock_hz = 1.78e9
memory_bytes = 12884901888
memory_bandwidth = 360e9
l2_bytes = 2359296
fp32_flops = 12.7e12
tf32_flops = 12.7e12
fp16_flops = 25.5e12
bf16_flops = 25.5e12
"""
LAYERS_KEY = {"gpt2": "n_layer", "gpt_bigcode": "n_layer", "gpt_neo": "num_layers", "mpt": "n_layers"}


def config_of(name: str, layers: int | None = None, **changes: Any) -> Config:
    """The config of a small model, with some keys changed."""
    values = {**SMALL[name], **changes}
    if layers is not None:
        values[LAYERS_KEY.get(name, "num_hidden_layers")] = layers
        if "attention_types" in values:
            values["attention_types"] = [[["global"], layers]]
    return Config(values, name, name)


def architecture_of(name: str, layers: int | None = None, **changes: Any) -> Architecture:
    """A small model."""
    return from_config(config_of(name, layers, **changes))


def period_of(name: str) -> int:
    """After how many layers a small model's layers come again alike."""
    architecture = architecture_of(name, layers=24)
    kinds = [architecture.layer_kind(i) for i in range(24)]
    return next(p for p in range(1, 24) if kinds[p:] == kinds[:-p])


def setup_of(name: str, **options: Any) -> Setup:
    """A setup that a small model has: Gemma 2 and GPT-Neo know no SDPA, GPT-Neo no reentrant checkpoints."""
    setup = Setup(**{"batch": 2, "seq": 17, **options})
    return fitting(setup, architecture_of(name).traits) if name in SMALL else setup


def step_of(
    model: str | Architecture, method: str | Method = "full", *, device: str = "cuda", layers: int | None = None,
    **setup: Any,
) -> Step:  # fmt: skip
    """A recorded step of a small model; `setup` holds fields of `Setup`."""
    architecture = architecture_of(model, layers) if isinstance(model, str) else model
    parsed = methods.parse(with_targets(method, architecture)) if isinstance(method, str) else method
    return build(architecture, parsed.bind(architecture), setup_of(architecture.name, **setup), device)


def op_bytes(op: Op) -> Any:
    """Bytes that an op reads and writes."""
    return op.bytes_read + op.bytes_written


def op_dispatches(op: Op) -> int:
    """1, or 0 for a view."""
    return int(not op.view)


FIGURES: dict[str, Callable[[Op], Any]] = {
    "flops": costs.flops, "bytes": op_bytes, "kernels": costs.kernels, "dispatches": op_dispatches,
}  # fmt: skip


def by_phase(step: Step, of_op: Callable[[Op], Any] = costs.flops) -> dict[str, Any]:
    """Totals of a figure by phase."""
    totals: dict[str, Any] = dict.fromkeys(PHASES, 0)
    for part, op, times in step.ops():
        totals[part.phase] = totals[part.phase] + times * of_op(op)
    return totals


def total(step: Step, of_op: Callable[[Op], Any] = costs.flops) -> Any:
    """A figure of the whole step."""
    return sum(by_phase(step, of_op).values())


def calls_by_name(step: Step, phase: str) -> Counter[str]:
    """Non-view calls of a phase by op name."""
    calls: Counter[str] = Counter()
    for part, op, times in step.ops():
        if part.phase == phase and not op.view:
            calls[op.name] += times
    return calls


def free_host() -> Host:
    """A host that takes no time."""
    default = host.load("default")
    return replace(default, **{f.name: 0.0 for f in fields(default) if isinstance(getattr(default, f.name), float)})
