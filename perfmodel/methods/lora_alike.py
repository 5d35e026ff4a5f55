"""Variants of LoRA that compute something else at the cost of LoRA: a training step has the very same calls."""

from dataclasses import dataclass

from .base import method
from .lora import Lora


@method("rslora", title="rsLoRA", source="https://arxiv.org/abs/2312.03732; peft/tuners/lora/layer.py (use_rslora)")
@dataclass(frozen=True)
class RsLora(Lora):
    """LoRA scaled by α/√r instead of α/r: another number, the cost of LoRA."""


@method("pissa", title="PiSSA", source="https://arxiv.org/abs/2404.02948; peft/tuners/lora/layer.py (pissa_init)")
@dataclass(frozen=True)
class Pissa(Lora):
    """LoRA that starts from the principal singular vectors of W: another start, the cost of LoRA."""
