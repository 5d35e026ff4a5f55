"""Fine-tuning methods, one file each; importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

from .base import Method, method, option, options, parse, registered

for _module in iter_modules(__path__):
    import_module(f".{_module.name}", __package__)

__all__ = ["Method", "method", "option", "options", "parse", "registered"]
