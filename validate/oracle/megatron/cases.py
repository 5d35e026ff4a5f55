"""What is compared of Megatron-Core's program: small models of its forms, what trains, and ways to share the work."""

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from typing import Any

from perfmodel.architectures import Config
from perfmodel.setup import Setup

from ..cases import Case

SMALL_GPT: dict[str, Any] = {
    "model_type": "megatron_gpt", "hidden_size": 128, "intermediate_size": 160, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 252, "num_hidden_layers": 2,
}  # fmt: skip
GPTS: dict[str, dict[str, Any]] = {  # what differs between models that become one
    "llama": {"megatron": "llama"},
    "tied": {"megatron": "llama", "tie_word_embeddings": True, "num_hidden_layers": 3},
    "qwen2": {"megatron": "qwen2", "num_hidden_layers": 3},
    "qwen3": {"megatron": "qwen3", "head_dim": 24},
    "one-head": {"megatron": "qwen3", "head_dim": 32, "num_attention_heads": 4},  # of keys and values, with tp 4
}
TRAINED = ("full", "lora:r=4", "lora:r=4,targets=linear_qkv")
SHARES: tuple[dict[str, Any], ...] = (
    {"tp": 1, "gpus": 1},
    {"tp": 2, "gpus": 2},
    {"tp": 2, "gpus": 2, "sequence_parallel": True},
    {"tp": 2, "gpus": 4, "overlap": True},
    {"tp": 4, "gpus": 8, "sequence_parallel": True, "parallel": "zero1", "overlap": True},
    {"tp": 2, "gpus": 4, "parallel": "zero1"},
    {"tp": 4, "gpus": 4, "checkpoint": "block"},
    {"tp": 2, "gpus": 2, "sequence_parallel": True, "checkpoint": "block", "grad_accum": 2},
    {"tp": 1, "gpus": 2, "overlap": True, "grad_accum": 2},
    {"tp": 2, "gpus": 8, "parallel": "zero1", "overlap": True, "grad_accum": 3},
    {"tp": 1, "gpus": 4, "parallel": "zero1"},
    {"tp": 2, "gpus": 8, "sequence_parallel": True, "grad_accum": 2},
    {"tp": 4, "gpus": 4, "sequence_parallel": True, "overlap": True},
    {"tp": 1, "gpus": 4, "parallel": "zero1", "overlap": True, "checkpoint": "block"},
    {"tp": 4, "gpus": 16, "overlap": True, "grad_accum": 3},
    {"tp": 4, "gpus": 8, "sequence_parallel": True, "parallel": "zero1", "checkpoint": "block"},
    {"tp": 2, "gpus": 4, "sequence_parallel": True, "overlap": True, "checkpoint": "block", "grad_accum": 2},
    {"tp": 4, "gpus": 8},
    {"tp": 2, "gpus": 8, "sequence_parallel": True, "parallel": "zero1", "grad_accum": 2},
    {"tp": 4, "gpus": 16, "sequence_parallel": True, "parallel": "zero1", "overlap": True, "grad_accum": 3},
)  # fmt: skip


def has_megatron(part: str) -> bool:
    """Whether megatron-core ("core") or megatron-bridge ("bridge") is installed; neither is imported."""
    return find_spec("megatron") is not None and find_spec(f"megatron.{part}") is not None


def megatron_grid(which: str = "all") -> Iterator[Case]:
    """Every way for all that trains, models in turn: one in seven ("quick"), a half ("standard"), or all 60."""
    return islice(_all(), 0, None, {"quick": 7, "standard": 2, "all": 1}[which])


def _all() -> Iterator[Case]:
    for i, share in enumerate(SHARES):
        for j, method in enumerate(TRAINED):
            name = list(GPTS)[(i + 2 * j) % len(GPTS)]
            config = Config({**SMALL_GPT, **GPTS[name]}, name, f"megatron:{name}")
            yield Case(config, method, Setup(batch=2, seq=16, **{"parallel": "ddp", **share}))
