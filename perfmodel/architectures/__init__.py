"""Transformer architectures: dims from a Hugging Face config.json, and the forward pass of each."""

from .base import Architecture, Build, Linear, Scope, architecture, from_config, supported
from .config import Config, model_names, load

__all__ = [
    "Architecture", "Build", "Config", "Linear", "Scope", "architecture", "model_names", "from_config", "load", "supported",
]  # fmt: skip
