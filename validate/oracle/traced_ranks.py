"""Ranks whose program is a trace (`recording.replay`): models without a built-in form, beside the real program.

What is traced is the program of one GPU; what is compared, the real one under DDP or FSDP2. Not FSDP2's mixed
precision, which casts floats that a block is given, and the loss.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from perfmodel import methods
from perfmodel.architectures import Config
from perfmodel.methods import Method
from perfmodel.recording.program import Program, RecordedModel
from perfmodel.recording.record import build
from perfmodel.setup import Setup
from perfmodel.tracing.programs import models
from perfmodel.tracing.programs.adapt import layers_of
from perfmodel.tracing.traced import trace_model

from . import counts, parallel
from .cases import Case

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MODELS: tuple[dict[str, Any], ...] = (
    {**LLAMA_LIKE, "model_type": "lfm2", "architectures": ["Lfm2ForCausalLM"], "full_attn_idxs": [2, 4]},
    {**LLAMA_LIKE, "model_type": "apertus", "architectures": ["ApertusForCausalLM"], "num_hidden_layers": 3},
    {
        "model_type": "gptj", "architectures": ["GPTJForCausalLM"], "vocab_size": 256, "n_embd": 64, "n_layer": 5,
        "n_head": 4, "n_positions": 128, "rotary_dim": 8,
    },
    {
        **LLAMA_LIKE, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    },
)  # fmt: skip
METHODS = (
    "full", "lora:r=4,targets=q_proj+v_proj", "lora:r=2,targets=all-linear,dropout=0.1", "dora:r=4,targets=q_proj",
    "top_k:k=2", "qlora:r=4,targets=q_proj+v_proj",
)  # fmt: skip
WAYS: tuple[dict[str, Any], ...] = (
    {"parallel": "ddp"}, {"parallel": "ddp", "ddp": "find-unused"}, {"parallel": "ddp", "ddp": "static-graph"},
    {"parallel": "fsdp2"}, {"parallel": "fsdp2", "fsdp_units": "blocks"}, {"parallel": "fsdp2", "reshard": False},
    {"parallel": "fsdp2", "offload": "params"}, {"parallel": "fsdp2", "gpus": 4, "shard_group": 2},
    {"parallel": "fsdp2", "reduce_dtype": "fp32"},
)  # fmt: skip
CHECKPOINTS = ("none", "block", "block-reentrant")
PRECISIONS: tuple[dict[str, Any], ...] = ({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "bf16", "amp": "bf16"})
BASE = Setup(batch=2, seq=17)


def traced_grid(which: str) -> Iterator[Case]:
    """Every model and method in one way ("quick"), in a third of them ("standard"), or in all, options in turn."""
    for i, values in enumerate(MODELS):
        config = Config(values, values["model_type"], values["model_type"])
        for j, method in enumerate(METHODS):
            step = {"quick": len(WAYS), "standard": 3, "all": 1}[which]
            for k in range((2 * i + j) % step, len(WAYS), step):
                n = i + 2 * j + k
                several = {"gpus": (2, 3, 4, 5)[n % 4], **PRECISIONS[n % 3], **WAYS[k]}
                setup = replace(BASE, **several, checkpoint=CHECKPOINTS[n // 2 % 3], grad_accum=1 + n % 2)
                yield Case(config, method, runnable(setup, method))


def runnable(setup: Setup, method: str) -> Setup:
    """A setup that PyTorch runs, and that a trace follows."""
    if method.startswith("qlora"):
        setup = replace(setup, dtype="bf16", amp=None)
    if setup.parallel == "fsdp2":
        return replace(setup, amp=None)
    if setup.ddp == "find-unused" and setup.checkpoint == "block-reentrant":
        return replace(setup, checkpoint="block")
    return replace(setup, grad_accum=1) if setup.ddp == "static-graph" else setup


def compare_traced(case: Case) -> counts.Result:
    """Compare the calls that follow from a trace with those of the real program of a rank, as `parallel` does."""
    model = at_one_size(case.config, case.setup)
    step = build(model, methods.parse(case.method).bind(model), case.setup, "cpu")
    with parallel.process_group(case.setup.parallel, case.setup.gpus):
        return parallel.judge_rank(case, step, parallel.traced_rank(case, step.optimizer, model))


def at_one_size(config: Config, setup: Setup) -> RecordedModel:
    """A model whose programs are traced at the very size that is asked for."""
    facts = layers_of(models.build_model(config, setup), config.name)
    return replace(facts, recorder=partial(_program, config))


def _program(config: Config, method: Method, setup: Setup, kind: str, capability: str) -> Program:
    one = replace(setup, grad_accum=min(setup.grad_accum, 2))
    return trace_model(config, replace(method, architecture=None), one, kind, capability)[2]
