"""What `perfmodel validate counts` compares: small models of every architecture, methods, setups. Needs no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from perfmodel import methods
from perfmodel.architectures import Architecture, Config, from_config, load
from perfmodel.architectures.traits import Traits
from perfmodel.setup import Setup


def _kin(model_type: str, layers: int = 3, **more: Any) -> dict[str, Any]:
    """Small dims of an architecture of Llama's kind."""
    return {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, **more,
    }  # fmt: skip


def _latent(model_type: str, **more: Any) -> dict[str, Any]:
    """Small dims of an architecture with latent attention and a mixture of experts."""
    return {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 128, "moe_intermediate_size": 40,
        "first_k_dense_replace": 1, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16, "v_head_dim": 8, **more,
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
        "tie_word_embeddings": True,
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
    "gpt_neox": {
        "model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 128,
    },
    "phi": {
        "model_type": "phi", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 128,
    },
    "falcon": {
        "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 128, "n_positions": 64,
    },
    "mpt": {
        "model_type": "mpt", "d_model": 64, "n_layers": 3, "n_heads": 4, "vocab_size": 128, "max_seq_len": 64,
    },
    "roberta": {
        "model_type": "roberta", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 128, "max_position_embeddings": 64,
    },
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
    "deepseek_v2": _latent("deepseek_v2", topk_method="group_limited_greedy", q_lora_rank=None),
    "deepseek_v3": _latent("deepseek_v3"),
    "glm4_moe_lite": _latent("glm4_moe_lite", mlp_layer_types=["dense", "sparse", "sparse", "dense"]),
}  # fmt: skip
STACKS: dict[str, dict[str, Any]] = {  # an encoder and a decoder
    "t5": {
        "model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 4,
        "num_heads": 4, "vocab_size": 128, "decoder_start_token_id": 0,
    },
    "mt5": {
        "model_type": "mt5", "d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 4, "num_heads": 4, "vocab_size": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
NO_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_bigcode": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neo": {"embed_dropout": 0.1, "attention_dropout": 0.1, "resid_dropout": 0.1},
    "opt": {"dropout": 0.0},
    "mpt": {"attn_config": {"clip_qkv": 6.0}, "d_model": 96, "n_heads": 6},  # of no power of two
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"},
}
TIED = (*NO_DROPOUT, "falcon")  # whose embedding is the head's weight where nothing else is said
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
CLASSIFYING = ("full", "lora:r=4", "norm", "ia3", "top_k:k=2,inner=lora", "lora:r=4,targets=all-linear")
OF_TOKENS = (*CLASSIFYING[:-1], "dora:r=4")  # PEFT cannot adapt all linear layers of a classifier of tokens
FURTHER: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (  # what the model types above can be besides
    (
        "gpt_neox",
        {"use_parallel_residual": False, "hidden_act": "gelu_fast", "rotary_pct": 1.0, "attention_bias": False},
        ("full", "lora:r=4", "top_k:k=1"),
    ),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, ("full", "lora:r=4", "norm", "dora:r=4")),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, ("lora:r=4",)),
    ("gpt_bigcode", {"multi_query": False}, ("full", "lora:r=4", "ia3")),
    ("roberta", {"model_type": "xlm-roberta"}, ("full", "lora:r=4")),
    ("roberta", {"architectures": ["RobertaForSequenceClassification"]}, CLASSIFYING),
    ("roberta", {"architectures": ["RobertaForTokenClassification"], "num_labels": 5}, OF_TOKENS),
    ("bert", {"architectures": ["BertForSequenceClassification"], "classifier_dropout": 0.0}, CLASSIFYING),
    ("bert", {"architectures": ["BertForTokenClassification"], "num_labels": 5}, OF_TOKENS),
    ("llama", {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}, CLASSIFYING),
    ("llama", {"architectures": ["LlamaForTokenClassification"], "num_labels": 5}, OF_TOKENS),
    ("qwen2", {"architectures": ["Qwen2ForSequenceClassification"]}, CLASSIFYING),
    ("gpt2", {"architectures": ["GPT2ForSequenceClassification"], "pad_token_id": 0}, CLASSIFYING),
    ("gpt2", {"architectures": ["GPT2ForTokenClassification"]}, OF_TOKENS[:2]),
    ("gpt_neo", {"architectures": ["GPTNeoForTokenClassification"]}, OF_TOKENS[:2]),
    ("gpt_neox", {"architectures": ["GPTNeoXForTokenClassification"]}, OF_TOKENS[:2]),
    ("gpt_bigcode", {"architectures": ["GPTBigCodeForTokenClassification"]}, OF_TOKENS[:2]),
    ("gpt_neo", {"architectures": ["GPTNeoForSequenceClassification"], "pad_token_id": 0}, CLASSIFYING[:2]),
    ("opt", {"architectures": ["OPTForSequenceClassification"], "pad_token_id": 0}, CLASSIFYING[:2]),
    ("gpt_neox", {"architectures": ["GPTNeoXForSequenceClassification"], "pad_token_id": 0}, CLASSIFYING[:2]),
    ("mpt", {"architectures": ["MptForSequenceClassification"], "pad_token_id": 0}, CLASSIFYING[:2]),
    ("mpt", {"architectures": ["MptForTokenClassification"]}, OF_TOKENS[:2]),
    ("phi", {"architectures": ["PhiForTokenClassification"]}, OF_TOKENS[:2]),
    ("gemma2", {"architectures": ["Gemma2ForSequenceClassification"]}, CLASSIFYING[:2]),
    ("gemma", {"architectures": ["GemmaForTokenClassification"]}, OF_TOKENS[:2]),
    ("falcon", {"architectures": ["FalconForSequenceClassification"], "pad_token_id": 0}, CLASSIFYING[:2]),
    ("gpt_bigcode", {"architectures": ["GPTBigCodeForSequenceClassification"], "pad_token_id": 0}, CLASSIFYING[:2]),
    ("deepseek_v2", {"architectures": ["DeepseekV2ForSequenceClassification"]}, CLASSIFYING[:2]),
    ("deepseek_v3", {"architectures": ["DeepseekV3ForTokenClassification"]}, OF_TOKENS[:2]),
)
DISTILBERT = {  # PEFT has no default targets for it
    "model_type": "distilbert", "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "vocab_size": 128,
    "max_position_embeddings": 64,
}  # fmt: skip
Q_V = "targets=q_lin+v_lin"
DISTILBERTS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({}, ("full", f"lora:r=4,{Q_V}", "lora:r=4,targets=all-linear,dropout=0.1", "norm", "bitfit", f"dora:r=4,{Q_V}")),
    (
        {"tie_word_embeddings": False, "dropout": 0.0},
        ("full", f"top_k:k=1,inner=lora,{Q_V}", f"oft:block_size=8,{Q_V}"),
    ),
    ({"architectures": ["DistilBertForSequenceClassification"]}, ("full", f"lora:r=4,{Q_V}", "norm")),
    ({"architectures": ["DistilBertForTokenClassification"]}, ("full", f"lora:r=4,{Q_V}", "top_k:k=1")),
)
REFUSED = {
    "bitfit": (  # they have no biases
        "llama",
        "mistral",
        "qwen3",
        "gemma2",
        "gemma",
        "gemma3_text",
        "phi3",
        "olmo2",
        "granite",
        "smollm3",
        "cohere",
        "cohere2",
        "glm4",
        "olmo3",
        "exaone4",
        "ministral",
        "ministral3",
        "mixtral",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe_lite",
        "mpt",
        *STACKS,
    ),
    "lora:r=4,targets=all-linear,dropout=0.1": tuple(MIXTURES),  # no adapter of experts has dropout
    **dict.fromkeys(
        ("loha", "lokr", "miss", "oft", "delora", "road", "c3a", "hra", "boft", "beft"), ("gpt2",)
    ),  # peft has no form of them for its layers
    **dict.fromkeys(  # nor for masked language models; of those with two stacks they are not modelled
        ("prompt_tuning", "p_tuning", "prefix_tuning", "trainable_tokens"), ("bert", "roberta", *STACKS)
    ),
    "top_k:k=2,inner=lora": tuple(STACKS),  # PEFT cannot count their blocks
    # whose cache PEFT fills with heads that it has not
    "prefix_tuning": ("bert", "roberta", "falcon", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", *STACKS),
    "gralora": ("deepseek_v2",),
    "oft": ("gpt2", "deepseek_v2"),  # the layer that would be a target there has inputs of four dimensions
}
WHOLE = 9  # of the first so many model types the quick grid tries all methods; the others share most of their code
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
    for name, values in {**SMALL, **MIXTURES, **STACKS}.items():
        tied = values.get("tie_word_embeddings", name in TIED)
        yield Config(values, name, name)
        variant = {**values, "tie_word_embeddings": not tied, **NO_DROPOUT.get(name, {})}
        yield Config(variant, f"{name} variant", f"{name}-{'untied' if tied else 'tied'}")


def further() -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Small models with other heads or other blocks than `configs` has, and the methods to try them with."""
    for name, change, tried in FURTHER:
        yield Config({**SMALL, **MIXTURES}[name] | change, name, name), tried
    for change, tried in DISTILBERTS:
        yield Config({**DISTILBERT, **change}, "distilbert", "distilbert"), tried


def grid(which: str) -> Iterator[Case]:
    """Cases: "quick" (a representative part for every change), "standard", or "all" (every combination)."""
    base = Setup(batch=4, seq=17)
    optimizers = ("adamw-foreach", "adamw-loop", "adamw-fused")
    if which == "all":
        yield from _product(list(configs(small=True)), base, optimizers)
        for config in configs(small=False):
            yield from _cases(config, METHODS, replace(base, batch=1, seq=129))
        return
    rows = [(config, METHODS if i < 2 * WHOLE else _some(i)) for i, config in enumerate(configs(small=True))]
    for i, (config, names) in enumerate((*rows, *further())):
        for j, method in enumerate(names):
            yield from _cases(config, (method,), _varied(base, i + j, optimizers))
    if which == "standard":
        for config in configs(small=False):
            yield from _cases(config, ("full", "lora:r=16"), replace(base, batch=1, seq=65))


def _some(i: int) -> tuple[str, ...]:
    """Full fine-tuning, LoRA, and a third of the other methods in turn."""
    return (*METHODS[:2], *METHODS[2 + i % 3 :: 3])


def _varied(base: Setup, k: int, optimizers: tuple[str, ...]) -> Setup:
    """The k-th setup of those that go through all options in turn."""
    return replace(
        base, **PRECISIONS[k % 3], batch=(1, 4)[k % 2], seq=(17, 33)[(k // 2) % 2],
        attention=("sdpa", "eager")[(k // 3) % 2], optimizer=optimizers[k % 3],
        checkpoint=("none", "block", "none", "block-reentrant")[k % 4],
    )  # fmt: skip


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
        for optimizer in (*optimizers, "sgd", "sgd-momentum", "rmsprop", "rmsprop-loop"):
            yield from _cases(config, ("full", "lora:r=4"), replace(base, optimizer=optimizer))
        yield from _cases(config, ("full", "lora:r=4"), replace(base, grad_accum=3, clip_grad=False))


def fitting(setup: Setup, traits: Traits) -> Setup:
    """The setup with attention and checkpoints that a model type's program has, if it lacks those named."""
    if setup.attention not in traits.attention:
        setup = replace(setup, attention=traits.attention[0])
    if setup.checkpoint == "block-reentrant" and setup.attention not in traits.reentrant:
        setup = replace(setup, checkpoint="block")
    return setup


def _cases(config: Config, names: tuple[str, ...], setup: Setup) -> Iterator[Case]:
    architecture = from_config(config)
    setup = fitting(setup, architecture.traits)
    for text in names:
        name = text.partition(":")[0]
        if config.values["model_type"] not in (*REFUSED.get(name, ()), *REFUSED.get(text, ())):
            without = name == "prefix_tuning"  # it does not work with checkpoints
            asked = replace(setup, checkpoint="none") if without else setup
            yield Case(config, with_targets(text, architecture), asked)
