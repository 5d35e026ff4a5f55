"""What `perfmodel validate counts` compares: small models of every architecture, methods, setups. Needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from perfmodel import methods
from perfmodel.architectures import Architecture, Config, from_config, load
from perfmodel.setup import Setup


def _kin(model_type: str, layers: int = 3, **more: Any) -> dict[str, Any]:
    """Small dims of an architecture of Llama's kind."""
    return {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, **more,
    }  # fmt: skip


SMALL: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": False,
    },
    "mistral": {
        "model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "sliding_window": 24,
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128, "tie_word_embeddings": True,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 64},
    "gpt_neo": {
        "model_type": "gpt_neo", "hidden_size": 64, "num_layers": 2, "attention_types": [[["global", "local"], 1]],
        "num_heads": 4, "vocab_size": 128, "max_position_embeddings": 64, "window_size": 8,
    },
    "opt": {
        "model_type": "opt", "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": 128, "word_embed_proj_dim": 64, "max_position_embeddings": 64,
    },
    "bert": {
        "model_type": "bert", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 64,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 24,
    },
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 24, "sliding_window": 24,
    },
    "gemma": _kin("gemma", num_key_value_heads=1, head_dim=32, tie_word_embeddings=True),
    "gemma3_text": _kin(
        "gemma3_text", 5, head_dim=24, sliding_window=24, sliding_window_pattern=3, tie_word_embeddings=True
    ),
    "phi3": _kin("phi3", resid_pdrop=0.1),
    "olmo2": _kin("olmo2"),
    "granite": _kin("granite", embedding_multiplier=12.0, logits_scaling=16.0, residual_multiplier=0.22),
    "smollm3": _kin("smollm3", 5, no_rope_layer_interval=2, tie_word_embeddings=True),
    "cohere": _kin("cohere", tie_word_embeddings=True),
    "cohere2": _kin("cohere2", 5, sliding_window=24, sliding_window_pattern=2, tie_word_embeddings=True),
    "glm": _kin("glm", head_dim=16),
    "glm4": _kin("glm4", head_dim=16, attention_bias=False),
    "olmo3": _kin("olmo3", 5, sliding_window=24),
    "exaone4": _kin("exaone4", 5, sliding_window=24, sliding_window_pattern=2),
    "ministral": _kin("ministral", head_dim=24, sliding_window=24),
    "ministral3": _kin("ministral3", head_dim=24),
    "seed_oss": _kin("seed_oss", head_dim=24),
    "stablelm": _kin("stablelm", num_key_value_heads=4, use_qkv_bias=True),
    "starcoder2": _kin("starcoder2", residual_dropout=0.1, embedding_dropout=0.1, tie_word_embeddings=True),
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {  # of experts
    "mixtral": {
        "model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 6,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "pad_token_id": 0, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 24,
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "gpt_oss": {
        "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 5, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 16, "sliding_window": 8,
        "num_local_experts": 6, "num_experts_per_tok": 3,
    },
}  # fmt: skip
NO_DROPOUT = {
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neo": {"embed_dropout": 0.1, "attention_dropout": 0.1, "resid_dropout": 0.1},
    "opt": {"dropout": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
REAL = ("llama-3.2-1b", "mistral-7b", "qwen2.5-0.5b", "gpt2", "opt-1.3b", "bert-large")
METHODS = (
    "full",
    "lora:r=4",
    "lora:r=4,targets=all-linear,dropout=0.1",
    "top_k:k=1",
    "top_k:k=2,inner=lora",
    "bitfit",
    "norm",
    "lora_fa:r=4",
    "dora:r=4,dropout=0.1",
    "ia3",
    "vera:r=8,dropout=0.1",
    "loha:r=4",
    "lokr:r=4",
    "miss:r=8",
    "oft:block_size=8",
    "gralora:r=4",
    "delora:r=4",
    "road:group_size=16",
    "c3a:block_size=16",
    "fourierft:n=10",
    "vblora:r=2,vectors=8,length=16,targets=all-linear",
    "randlora:r=6",
    "hra:r=3",
    "boft:block_size=16",
    "beft:targets=all-linear",
    "trainable_tokens:tokens=3",
    "prompt_tuning:tokens=6",
    "p_tuning:tokens=6,width=32",
    "prefix_tuning:tokens=6",
    "prefix_tuning:tokens=6,projection=true",
    "lora:r=4,targets=all-linear",
)
REFUSED = {
    "bitfit": (  # they have no biases
        "llama", "mistral", "qwen3", "gemma2", "gemma", "gemma3_text", "phi3", "olmo2", "granite", "smollm3", "cohere",
        "cohere2", "glm4", "olmo3", "exaone4", "ministral", "ministral3", "mixtral", "qwen3_moe",
    ),
    "lora:r=4,targets=all-linear,dropout=0.1": tuple(MIXTURES),  # no adapter of experts has dropout
    **dict.fromkeys(
        ("loha", "lokr", "miss", "oft", "delora", "road", "c3a", "hra", "boft", "beft"), ("gpt2",)
    ),  # peft has no form of them for its layers
    **dict.fromkeys(("prompt_tuning", "p_tuning", "prefix_tuning"), ("bert",)),  # nor for masked language models
    "trainable_tokens": ("bert",),
}  # fmt: skip
PRECISIONS: tuple[dict[str, Any], ...] = ({"dtype": "bf16"}, {"dtype": "fp32"}, {"dtype": "fp32", "amp": "bf16"})


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    config: Config
    method: str
    setup: Setup


def with_targets(method: str, architecture: Architecture) -> str:
    """A method's spec; targets are named in it where PEFT has no default for the model type."""
    parsed = methods.parse(method)
    takes = getattr(parsed, "targets", None) == () and getattr(parsed, "inner", "lora") == "lora"
    if not takes or getattr(architecture.traits.targets, getattr(parsed, "family", "lora")) is not None:
        return method
    names = [name.rpartition(".")[2] for name in architecture.linear_names()]
    return f"{method}{',' if ':' in method else ':'}targets={names[0]}+{names[2]}"


def configs(small: bool) -> Iterator[Config]:
    """The architectures: small dims with variations of head tying and dropout, or real dims."""
    if not small:
        for name in REAL:
            yield load(name)
        return
    for name, values in {**SMALL, **MIXTURES}.items():
        tied = values.get("tie_word_embeddings", name in NO_DROPOUT)
        yield Config(values, name, name)
        variant = {**values, "tie_word_embeddings": not tied, **NO_DROPOUT.get(name, {})}
        yield Config(variant, f"{name} variant", f"{name}-{'untied' if tied else 'tied'}")


def grid(which: str) -> Iterator[Case]:
    """Cases: "quick" (a representative part for every change), "standard", or "all" (every combination)."""
    base = Setup(batch=4, seq=17)
    optimizers = ("adamw-foreach", "adamw-loop", "adamw-fused")
    if which == "all":
        yield from _product(list(configs(small=True)), base, optimizers)
        for config in configs(small=False):
            yield from _cases(config, METHODS, replace(base, batch=1, seq=129))
        return
    for i, config in enumerate(configs(small=True)):
        for j, method in enumerate(METHODS):
            k = i + j
            precision = PRECISIONS[k % 3]
            yield from _cases(
                config,
                (method,),
                replace(
                    base, **precision, batch=(1, 4)[k % 2], seq=(17, 33)[(k // 2) % 2],
                    attention=("sdpa", "eager")[(k // 3) % 2], optimizer=optimizers[k % 3],
                    checkpoint=("none", "block", "none", "block-reentrant")[k % 4],
                ),
            )  # fmt: skip
    if which == "standard":
        for config in configs(small=False):
            yield from _cases(config, ("full", "lora:r=16"), replace(base, batch=1, seq=65))


def cuda_forward_grid() -> Iterator[Case]:
    """What fake CUDA tensors can run without a GPU: forward passes with eager attention and without autocast.

    Scaled-dot-product attention, autocast and products by expert ask for a real device before they choose a path.
    """
    for config in configs(small=True):
        if config.values["model_type"] in MIXTURES:
            continue
        for dtype in ("bf16", "fp32"):
            setup = Setup(batch=4, seq=17, dtype=dtype, attention="eager", optimizer="adamw-foreach")
            yield from _cases(config, ("full", "lora:r=4,dropout=0.1"), setup)


def _product(all_configs: list[Config], base: Setup, optimizers: tuple[str, ...]) -> Iterator[Case]:
    for config in all_configs:
        for precision in PRECISIONS:
            for attention in ("sdpa", "eager"):
                for checkpoint in ("none", "block", "block-reentrant"):
                    for batch, seq in ((1, 33), (4, 17)):
                        setup = replace(
                            base, **precision, attention=attention, checkpoint=checkpoint, batch=batch, seq=seq
                        )
                        yield from _cases(config, METHODS, setup)
        for optimizer in (*optimizers, "sgd", "sgd-momentum"):
            yield from _cases(config, ("full", "lora:r=4"), replace(base, optimizer=optimizer))
        yield from _cases(config, ("full", "lora:r=4"), replace(base, grad_accum=3, clip_grad=False))


def _cases(config: Config, names: tuple[str, ...], setup: Setup) -> Iterator[Case]:
    architecture = from_config(config)
    attention = architecture.traits.attention  # the forms that it has
    if setup.attention not in attention:
        setup = replace(setup, attention=attention[0])
    if config.values["model_type"] == "gpt_neo" and setup.checkpoint != "none":
        setup = replace(setup, checkpoint="block")
    for text in names:
        name = text.partition(":")[0]
        if config.values["model_type"] not in (*REFUSED.get(name, ()), *REFUSED.get(text, ())):
            without = name == "prefix_tuning"  # it does not work with checkpoints
            fitting = replace(setup, checkpoint="none") if without else setup
            yield Case(config, with_targets(text, architecture), fitting)
