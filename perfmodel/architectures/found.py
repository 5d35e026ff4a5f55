"""The architecture of a config.json, found by its model type."""

from dataclasses import replace

from ..errors import UserError, nearest
from .base import REGISTRY, Architecture
from .config import Config
from .tasks import classifier_of


def supported() -> list[str]:
    """The model types that the tape knows."""
    return list(REGISTRY.all())


def has_form(model_type: str) -> bool:
    """Whether the tape knows a model type."""
    return REGISTRY.get(model_type) is not None


def from_config(config: Config) -> Architecture:
    """The architecture of a config.json.

    Raises:
        UserError: unknown model_type, missing or mistyped keys, dims that do not fit together.
    """
    model_type = config.kind
    found = REGISTRY.get(model_type)
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
