"""What a fine-tuning method is: which parameters train, and how it rewrites a linear layer."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar, get_type_hints

from ..architectures.base import Architecture, Linear, Scope
from ..errors import UserError, nearest
from ..setup import positive
from ..tape.core import Parameter, Tensor
from ..tape.linalg import linear
from ..tape.nn import embedding

_REGISTRY: dict[str, type["Method"]] = {}
M = TypeVar("M", bound="Method")


def method(name: str, *, source: str) -> Callable[[type[M]], type[M]]:
    """Register a method under a name; `source` is the paper or code that defines it."""

    def register(cls: type[M]) -> type[M]:
        cls.name, cls.source = name, source
        _REGISTRY[name] = cls
        return cls

    return register


def registered() -> dict[str, type["Method"]]:
    """All methods by name."""
    return dict(sorted(_REGISTRY.items()))


def option(default: Any, help: str) -> Any:
    """A field of a method with its one-line description."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Method:
    """Base: nothing trains, nothing is rewritten.

    `architecture` is filled in by `bind`, which also checks the options against the model.
    """

    architecture: Architecture | None = field(default=None, repr=False, compare=False, kw_only=True)

    name: ClassVar[str]
    source: ClassVar[str]

    @property
    def layers(self) -> int:
        """Number of blocks of the bound architecture."""
        assert self.architecture is not None, "bind the method to an architecture first"
        return self.architecture.layers

    def bind(self: M, architecture: Architecture) -> M:
        """This method on an architecture.

        Raises:
            UserError: options that the model cannot satisfy (targets that match nothing, k above its layers, …).
        """
        bound = replace(self, architecture=architecture)
        bound.check()
        return bound

    def check(self) -> None:
        """Raise `UserError` if the options do not fit `self.architecture`."""

    def trains(self, name: str, kind: str, layer: int | None) -> bool:
        """Whether a base parameter trains; `name` is relative to its block if `layer` is given."""
        return False

    def copies(self, name: str, kind: str) -> bool:
        """Whether PEFT keeps the parameter's module frozen and trains a copy of it."""
        return False

    def layer_key(self, layer: int) -> Hashable:
        """Layers with equal keys are treated alike."""
        return 0

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """A linear layer's forward pass."""
        return layer(x)

    def sublayer(self, layer: Scope, name: str, x: Tensor, residual: Tensor, norm: str | None) -> Tensor:
        """What a block's "attention" or "mlp" adds to the residual; a post-norm model has the layer `norm` after it."""
        return x

    def words(self, model: Scope, weight: Parameter, ids: Tensor) -> Tensor:
        """The embedding of the words, (batch, seq) → (batch, seq, hidden)."""
        return embedding(weight, ids)

    def head(self, scope: Scope, hidden: Tensor, weight: Parameter) -> Tensor:
        """The output head where it shares the embedding's weight."""
        return linear(hidden, weight)

    def inputs(self, model: Scope, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Attention mask and labels, both (batch, seq), as the base model gets them."""
        return attention, labels

    def embedded(self, model: Scope, x: Tensor) -> Tensor:
        """The embedding's output, (batch, seq, hidden), as the first block gets it.

        With checkpointing transformers makes it a leaf that needs a gradient (`enable_input_require_grads`), so
        backward then reaches the first block whatever the method trains.
        """
        if model.build.setup.checkpoint != "none" and not x.requires_grad:
            x.requires_grad = True
        return x

    def spec(self) -> str:
        """The method as one writes it on the command line; its size (r, k) first, other defaults left out."""
        parts = []
        for f in sorted(_options(type(self)), key=lambda f: f.name not in self.sizes()):
            value = getattr(self, f.name)
            if value is None or (f.name not in self.sizes() and f.default is not MISSING and _equal(value, f.default)):
                continue
            parts.append(f"{f.name}={'+'.join(map(str, value)) if isinstance(value, tuple) else value}")
        return self.name + (":" + ",".join(parts) if parts else "")

    def sizes(self) -> tuple[str, ...]:
        """Options that say how much trains: always part of `spec`."""
        return ("r",)

    @classmethod
    def describe(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").splitlines()[0]


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b) if not hasattr(a, "shape") else False


def _options(cls: type[Method]) -> list[Any]:
    return [f for f in fields(cls) if f.name != "architecture"]


def options(cls: type[Method]) -> dict[str, str]:
    """Option name → description with its default."""
    shown = {f.name: "" if f.default in (None, ()) else f" (default {f.default})" for f in _options(cls)}
    ordered = sorted(_options(cls), key=lambda f: f.name not in ("r", "k"))  # what sizes the method first
    return {f.name: f.metadata.get("help", "") + shown[f.name] for f in ordered}


def parse(text: str) -> Method:
    """A method from `name[:key=value,…]`; lists are joined by `+`.

    >>> parse("lora:r=32,targets=q_proj+v_proj").spec()
    'lora:r=32,targets=q_proj+v_proj'

    Raises:
        UserError: unknown name or option, or a value of the wrong type.
    """
    name, _, tail = text.strip().partition(":")
    cls = _REGISTRY.get(name.lower())
    if cls is None:
        raise UserError(f"unknown method {name!r}: {nearest(name, _REGISTRY)}")
    hints = get_type_hints(cls)
    known = {f.name for f in _options(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, equals, value = item.partition("=")
        key = cls.aliases.get(key, key) if hasattr(cls, "aliases") else key
        if key not in known:
            hint = nearest(key, known) if known else "it takes none"
            raise UserError(f"method {name}: unknown option {key!r}: {hint}")
        if not equals or not value:
            raise UserError(f"method {name}: write {key}=VALUE, got {item!r}")
        values[key] = _convert(f"method {name}: {key}", value, hints[key])
    return cls(**values)


def _convert(where: str, text: str, hint: Any) -> Any:
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where} must be true or false, got {text!r}")
        return text.lower() == "true"
    if "int" in str(hint) and "tuple" in str(hint):
        return _indices(where, text)
    if "tuple" in str(hint):
        return tuple(filter(None, text.split("+")))
    try:
        if hint is float:
            return float(text)
        return text if "str" in str(hint) else int(text)
    except ValueError:
        raise UserError(f"{where} must be a number, got {text!r}") from None


def _indices(where: str, text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split("+"):
        low, dash, high = part.partition("-")
        try:
            first, last = int(low), int(high) if dash else int(low)
        except ValueError:
            raise UserError(f"{where} takes layer numbers such as 0-7+12, got {text!r}") from None
        if last - first > 10_000:
            raise UserError(f"{where}: the range {part} is too long")
        found.extend(range(first, last + 1))
    return tuple(sorted(set(found)))


__all__ = ["Linear", "Method", "Scope", "method", "option", "options", "parse", "positive", "registered"]
