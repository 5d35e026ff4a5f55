"""Architectures by the `model_type` of their config.json."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from ..errors import UserError, nearest
from ..registry import Registry
from .base import Architecture
from .config import Config
from .tasks import classifier_of

_REGISTRY: Registry[type[Architecture]] = Registry(__package__, Path(__file__).parent)
A = TypeVar("A", bound=Architecture)


def architecture(*model_types: str) -> Callable[[type[A]], type[A]]:
    """Register an architecture under the `model_type` of its config.json."""

    def register(cls: type[A]) -> type[A]:
        if missing := [trait for trait in ("traits", "layer_path") if not hasattr(cls, trait)]:
            raise TypeError(f"architecture {cls.__name__} must define {missing[0]}")
        for model_type in model_types:
            _REGISTRY.add(model_type, cls)
        return cls

    return register


def supported() -> list[str]:
    """The model types that the tape knows."""
    return list(_REGISTRY.all())


def has_form(model_type: str) -> bool:
    """Whether the tape knows a model type."""
    return _REGISTRY.get(model_type) is not None


def from_config(config: Config) -> Architecture:
    """The architecture of a config.json.

    Raises:
        UserError: unknown model_type, missing or mistyped keys, dims that do not fit together.
    """
    model_type = config.kind
    found = _REGISTRY.get(model_type)
    if found is None:
        close = nearest(model_type, supported())
        did_you_mean = f" ({close})" if close.startswith("did") else ""
        raise UserError(
            f"{config.origin}: model_type {model_type!r} has no built-in form{did_you_mean}: add --traced, or use "
            f"one of {', '.join(supported())}"
        )
    config.check_unpacked()
    made = found.from_config(config)
    return replace(made, classifier=classifier_of(config, made.traits))
