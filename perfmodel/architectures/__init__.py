"""Transformer architectures: dims from a Hugging Face config.json, and the forward pass of each."""

from .base import Architecture, Build, Linear, Scope
from .config import Config, load
from .names import model_names
from .registered import architecture, from_config, has_form, supported

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
