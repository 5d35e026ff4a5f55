"""Adapters of peft that need no more than their config: its class, and its options by the names they have here."""

from typing import Any

from ...methods import Method
from ...methods.beft import Beft
from ...methods.boft import Boft
from ...methods.c3a import C3a
from ...methods.delora import Delora
from ...methods.fourierft import FourierFt
from ...methods.gralora import Gralora
from ...methods.hra import Hra
from ...methods.randlora import RandLora
from ...methods.road import Road
from ...methods.vblora import VbLora

CONFIGS: dict[type[Method], tuple[str, dict[str, str]]] = {
    Beft: ("BeftConfig", {}),
    C3a: ("C3AConfig", {"block_size": "block_size"}),
    FourierFt: ("FourierFTConfig", {"n_frequency": "n"}),
    Gralora: ("GraloraConfig", {"r": "r", "gralora_k": "k", "hybrid_r": "hybrid", "gralora_dropout": "dropout"}),
    Delora: ("DeloraConfig", {"r": "r", "module_dropout": "dropout"}),
    Hra: ("HRAConfig", {"r": "r"}),
    VbLora: (
        "VBLoRAConfig",
        {"r": "r", "num_vectors": "vectors", "vector_length": "length", "topk": "k", "vblora_dropout": "dropout"},
    ),
    Boft: ("BOFTConfig", {"boft_block_size": "block_size"}),
    RandLora: ("RandLoraConfig", {"r": "r", "randlora_dropout": "dropout"}),
    Road: ("RoadConfig", {"variant": "variant", "group_size": "group_size"}),
}

_Q_V = {"target_modules": ["q_proj", "v_proj"]}
_VIRTUAL = {"num_virtual_tokens": 4}

# What peft's configs need besides their defaults to fit a small Llama (hidden size 64), by `peft_type`.
EXAMPLES: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "ADAMSS": {**_Q_V, "r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 16},
    "CARTRIDGE": _VIRTUAL,
    "CPT": {**_VIRTUAL, "cpt_token_ids": [0, 1, 2, 3], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3, 4]},
    "FOURIERFT": {"n_frequency": 16},
    "FROD": _Q_V,
    "GRALORA": {"r": 8},
    "LILY": {**_Q_V, "r": 8},
    "MISS": {"r": 8},
    "MULTITASK_PROMPT_TUNING": _VIRTUAL,
    "OSF": _Q_V,
    "POLY": {"n_tasks": 2},
    "PROMPT_TUNING": _VIRTUAL,
    "PREFIX_TUNING": _VIRTUAL,
    "P_TUNING": {**_VIRTUAL, "encoder_hidden_size": 32},
    "PSOFT": {**_Q_V, "r": 8, "ab_svd_init": "pissa_init"},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [0, 1, 2]},
    "VBLORA": {"num_vectors": 8, "vector_length": 16},
    "WAVEFT": {"n_frequency": 16},
    "XLORA": {"hidden_size": 64},
}
