"""Transformer architectures: dims from a Hugging Face config.json, and the forward pass of each."""

from .base import Architecture, Build, Linear, Scope, architecture
from .config import Config, load
from .found import from_config, has_form, supported
from .names import model_names

__all__ = [
    "Architecture",
    "Build",
    "Config",
    "Linear",
    "Scope",
    "architecture",
    "from_config",
    "has_form",
    "load",
    "model_names",
    "supported",
]  # fmt: skip
