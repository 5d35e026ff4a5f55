"""Fine-tuning methods, one file each; importing this package registers them."""

from . import bitfit, full, lora, norm, top_k
from .base import Method, method, option, options, parse, registered

__all__ = ["Method", "bitfit", "full", "lora", "method", "norm", "option", "options", "parse", "registered", "top_k"]
