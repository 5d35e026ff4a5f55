"""What a fine-tuning method is: which parameters train, and how it rewrites a linear layer."""

import inspect
import re
from collections.abc import Callable, Hashable
from dataclasses import KW_ONLY, MISSING, dataclass, field, fields, replace
from functools import lru_cache
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from ...architectures.base import Architecture, Linear, Scope
from ...architectures.rewrites import Pair
from ...errors import UserError, nearest
from ...optimizers import Update
from ...program.dims import Dim
from ...program.part import Part
from ...program.software import SoftwareStack
from ...registry import Registry
from ...setup import ENGINES
from ...tape.linalg import linear
from ...tape.nn import embedding
from ...tape.tensor import Parameter, Tensor
from ...values import Compared
from .checks import choice
from .periodic import Periodic, Recorded

ITEMS = re.compile(r"(?:=/[^/]*/|[^,])+")  # of a method's options: a regex between slashes may hold commas
Seconds = Callable[[list[Part]], Any]  # of parts in a row, on the device and host that a step is for
_hints: Callable[[Any], dict[str, Any]] = lru_cache(maxsize=256)(get_type_hints)
_REGISTRY: Registry[type["Method"]] = Registry("perfmodel.methods", Path(__file__).parents[1])
M = TypeVar("M", bound="Method")


def method(
    name: str, *, source: str, title: str | None = None, trains: str = "", adds: str = ""
) -> Callable[[type[M]], type[M]]:
    """Register a method under a name.

    Args:
        source: the paper or code that defines it.
        title: how one writes it; its name by default.
        trains, adds: for lists, a few words each: what trains, and what it adds to the frozen model's step.
    """

    def register(cls: type[M]) -> type[M]:
        cls.name, cls.source, cls.title = name, source, title or name
        cls.what_trains, cls.what_it_adds = trains, adds
        _REGISTRY.add(name, cls)
        return cls

    return register


def registered() -> dict[str, type["Method"]]:
    """All methods by name."""
    return _REGISTRY.all()


def option(default: Any, help: str, check: Callable[[str, Any], Any] | None = None, among: str = "") -> Any:
    """A field of a method with its one-line description.

    Args:
        check: gets how an error names the option and a value that is not None; returns the value to keep, or raises
            `UserError` (`checks.py`).
        among: the attribute of the method that holds its choices: where there is one alone, nobody is offered it.
    """
    return field(default=default, metadata={"help": help, "check": check, "among": among})


@dataclass(frozen=True, eq=False, repr=False)
class Method(Compared):
    """Base: nothing trains, nothing is rewritten.

    `architecture` is filled in by `bind`, which also checks the options against the model.
    """

    _: KW_ONLY
    architecture: Architecture | None = field(default=None, repr=False, compare=False)
    engine: str | None = option(None, "torch or deepspeed-zero3, for this method; default the setup's", choice(ENGINES))

    name: ClassVar[str]
    source: ClassVar[str]
    what_trains: ClassVar[str]
    what_it_adds: ClassVar[str]
    title: ClassVar[str]
    in_few_bits: ClassVar[bool] = False  # whether its base weights are integers, whose dtype no adapter takes
    breaks_graphs: ClassVar[bool] = False  # whether torch.compile leaves its layers, for what their Python code does
    told_by_where: ClassVar[tuple[str, ...]] = ()  # options that `where` puts into words

    def __post_init__(self) -> None:
        for f in _options(type(self)):
            value, check = getattr(self, f.name), f.metadata["check"]
            if check is not None and value is not None:
                object.__setattr__(self, f.name, check(f"method {self.name}: {f.name}", value))

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

    def base_dtype(self, dtype: str) -> str:
        """The dtype of base weights where the setup asks for `dtype`."""
        return dtype

    def dtype_of_trained(self, dtype: str) -> str:
        """The dtype of base weights that train where the setup asks for `dtype`."""
        return self.base_dtype(dtype)

    def checkpoints(self, layer: int) -> bool:
        """Whether a block is checkpointed where the setup asks for checkpointing."""
        return True

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """A linear layer's forward pass."""
        return layer(x)

    def qkv(self, layers: tuple[Linear, ...], x: Tensor) -> list[Tensor] | None:
        """The query, key and value projections in one, where an implementation fuses them."""
        return None

    def mlp(self, layers: tuple[Linear, ...], x: Tensor, gate: str) -> Tensor | None:
        """A gated MLP (gate, up and down projection; swiglu or geglu) in one, where an implementation fuses it."""
        return None

    def pair(self, layer: Linear) -> Pair | None:
        """A and B of a LoRA on a layer of Megatron-Core's, None where it has none."""
        return None

    def sublayer(self, layer: Scope, name: str, x: Tensor, residual: Tensor, norm: str | None) -> Tensor:
        """What a block's "attention" or "mlp" adds to the residual; a post-norm model has the layer `norm` after it."""
        return x

    def stacked_weight(self, layer: Scope, name: str, shape: tuple[Any, ...], kept: str | None) -> Tensor:
        """The weights of all experts of a block, or of its router (always in `kept`), as they come out of memory."""
        return layer.parameter(name, shape, "weight", kept=kept)

    def stacked(self, layer: Scope, name: str, weight: Tensor, *, flipped: bool) -> Tensor:
        """The weights of all experts of a block, or of its router: (…, out, in), or (…, in, out) if `flipped`."""
        return weight

    def words(self, model: Scope, weight: Parameter, ids: Tensor) -> Tensor:
        """The embedding of the words, (batch, seq) → (batch, seq, hidden)."""
        return embedding(weight, ids)

    def head(self, scope: Scope, hidden: Tensor, weight: Parameter, bias: Parameter | None) -> Tensor:
        """The output head where it shares the embedding's weight."""
        return linear(hidden, weight, bias)

    def loss(self, loss: Tensor, parameters: list[Parameter]) -> Tensor:
        """The loss with what the method adds to the model's: a regulariser on parameters, in order of appearance."""
        return loss

    def inputs(self, model: Scope, attention: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Attention mask and labels, both (batch, seq), as the base model gets them."""
        return attention, labels

    def embedded(self, model: Scope, x: Tensor) -> Tensor:
        """The embedding's output, (batch, seq, hidden), as the first block gets it."""
        return x

    @property
    def own_optimizer(self) -> str | None:
        """The optimizer that the method brings, in the place of the setup's; None if it runs the setup's."""
        return None

    def update(self, update: Update) -> None:
        """Record the optimizer step: by default the setup's optimizer, all that trains in one parameter group.

        A method may call `update.group` for several groups, write the update of some parameters itself
        (`update.runs`), name what it keeps between steps (`update.state`), and do something after the step.
        """
        update.group(update.parameters)

    def priced(self: M, seconds: Seconds) -> M:
        """This method with a way to ask what parts of a step take, for one that chooses its program by time."""
        return self

    def choices(self, step: Recorded) -> list[Any]:
        """What it chose for each kind of layer and why: a row of plain fields each, for tables and JSON."""
        return []

    def periodic(self) -> tuple[Periodic, ...]:
        """What it does besides its steps: once per run, or every so many steps."""
        return ()

    def held_bytes(self, step: Recorded) -> Dim:
        """Bytes that it keeps from step to step beside parameters and optimizer state."""
        return 0

    def under(self: M, stack: SoftwareStack, dtype: str) -> M:
        """This method as the versions of a stack run it beside a base of `dtype`: where PEFT has adapters in that."""
        if stack.upcasts_adapters or self.in_few_bits or getattr(self, "implementation", "peft") != "peft":
            return self
        return self.in_one_dtype(dtype) if hasattr(self, "adapter_dtype") else self

    def in_one_dtype(self: M, dtype: str) -> M:
        """This method where an engine casts all parameters to `dtype`, but for adapters that were given another."""
        if getattr(self, "adapter_dtype", dtype) is not None:
            return self
        changed: dict[str, Any] = {"adapter_dtype": dtype}
        return replace(self, **changed)

    def plain(self: M, dtype: str) -> M:
        """This method without options that change nothing beside a base of `dtype`: it records the same ops."""
        return self

    def spec(self) -> str:
        """The method as one writes it on the command line; its size (r, k) first, other defaults left out."""
        parts = [f"{name}={value}" for name, value in self._given().items()]
        return self.name + (":" + ",".join(parts) if parts else "")

    def in_words(self) -> str:
        """The method in words: LoRA r=32 on q,v (dropout=0.1)."""
        given = self._given()
        sizes = [f"{name}={given.pop(name)}" for name in self.sizes() if name in given]
        for name in self.told_by_where:
            given.pop(name, None)
        rest = ", ".join(f"{name}={value}" for name, value in given.items())
        return " ".join([self.title, *sizes]) + self.where() + (f" ({rest})" if rest else "")

    def where(self) -> str:
        """The place of what trains, as a part of `in_words`."""
        return ""

    def _given(self) -> dict[str, str]:
        """Options that say something: the size (r, k) first, then what differs from its default."""
        found = {}
        for f in sorted(_options(type(self)), key=lambda f: f.name not in self.sizes()):
            value = getattr(self, f.name)
            if value is None or (f.name not in self.sizes() and f.default is not MISSING and _equal(value, f.default)):
                continue
            found[f.name] = _text(value)
        return found

    def sizes(self) -> tuple[str, ...]:
        """Options that say how much trains: always part of `spec`."""
        return ("r",)

    @classmethod
    def describe(cls) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(cls) or "").splitlines()[0]


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b) if not hasattr(a, "shape") else False


def _options(cls: type[Method]) -> list[Any]:
    return [f for f in fields(cls) if "help" in f.metadata]


def options(cls: type[Method]) -> dict[str, str]:
    """Option name → description with its default, of all that have a choice; what sizes the method first."""
    open_ = [f for f in _options(cls) if not f.metadata["among"] or len(getattr(cls, f.metadata["among"])) > 1]
    shown = {f.name: "" if f.default in (None, ()) else f" (default {_text(f.default)})" for f in open_}
    sizes = cls().sizes()
    ordered = sorted(open_, key=lambda f: f.name not in sizes)
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
        raise UserError(f"unknown method {name!r}: {nearest(name, registered())}")
    hints = _hints(cls)
    known = {f.name for f in _options(cls)}
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in ITEMS.findall(tail))):
        key, equals, value = item.partition("=")
        key = cls.aliases.get(key, key) if hasattr(cls, "aliases") else key
        if key not in known:
            hint = nearest(key, known)
            raise UserError(f"method {name}: unknown option {key!r}: {hint}")
        if not equals or not value:
            raise UserError(f"method {name}: write {key}=VALUE, got {item!r}")
        if key in values:
            raise UserError(f"method {name}: {key} is given twice")
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
        return (text,) if text.startswith("/") else tuple(filter(None, text.split("+")))
    try:
        if hint is float:
            if not isfinite(number := float(text)):
                raise ValueError
            return number
        return text if "str" in str(hint) else int(text)
    except ValueError:
        kind = "number" if hint is float else "whole number"
        raise UserError(f"{where} must be a {kind}, got {text!r}") from None


def _indices(where: str, text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split("+"):
        low, dash, high = part.partition("-")
        try:
            first, last = int(low), int(high) if dash else int(low)
        except ValueError:
            raise UserError(f"{where} takes layer numbers such as 0-7+12, got {text!r}") from None
        if not first <= last <= first + 10_000:
            raise UserError(f"{where}: the range {part} {'is too long' if last > first else 'ends before it begins'}")
        found.extend(range(first, last + 1))
    return tuple(sorted(set(found)))


__all__ = [
    "Architecture", "Linear", "Method", "Periodic", "Scope", "Seconds", "method", "option", "options", "parse",
    "registered",
]  # fmt: skip
