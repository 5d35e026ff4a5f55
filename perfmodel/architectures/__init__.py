"""Transformer architectures: dims from a Hugging Face config.json, and the forward pass of each."""

from . import bert, gpt2, gpt_neo, llama, opt
from .base import Architecture, Build, Linear, Scope, architecture, from_config, supported
from .config import Config, bundled, load

__all__ = [
    "Architecture", "Build", "Config", "Linear", "Scope", "architecture", "bert", "bundled", "from_config", "gpt2",
    "gpt_neo", "llama", "load", "opt", "supported",
]  # fmt: skip
