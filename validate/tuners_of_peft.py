"""Adapters of peft that need no more than their config: its class, and its options by the names they have here."""

from perfmodel.methods import Method
from perfmodel.methods.beft import Beft
from perfmodel.methods.boft import Boft
from perfmodel.methods.c3a import C3a
from perfmodel.methods.delora import Delora
from perfmodel.methods.fourierft import FourierFt
from perfmodel.methods.gralora import Gralora
from perfmodel.methods.hra import Hra
from perfmodel.methods.randlora import RandLora
from perfmodel.methods.road import Road
from perfmodel.methods.vblora import VbLora

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
