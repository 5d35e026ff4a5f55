"""Fine-tuning methods, one file each; a file is imported when its method is asked for."""

from .parts.base import Method, method, option, options, parse, registered

__all__ = ["Method", "method", "option", "options", "parse", "registered"]
