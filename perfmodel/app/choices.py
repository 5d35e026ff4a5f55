"""What a visitor has chosen, as a value: to and from the query of an address.

Everything here may come from a stranger's link, so nothing of it is ever a path, a hub id or a regular expression:
models, devices and nodes are the bundled ones, and what is large is refused.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any
from urllib.parse import parse_qsl, urlencode

from ..architectures import from_config, load, model_names
from ..architectures.names import bundled_for
from ..devices import profile
from ..errors import UserError, nearest
from ..network import files as nodes
from ..prediction.given import usual_attention
from ..setup import Setup
from ..values import immutable

MOST_METHODS = 6  # each is a column and a waterfall
LONGEST = 300  # characters of a method or a value
LONGEST_QUERY = 4000
NOT_HERE = ("stack", "images", "image_size")  # fields of a setup that are more than a word, or need a trace
KINDS: dict[str, type] = {
    "amp": str,
    "nodes": int,
    "shard_group": int,
    "reduce_dtype": str,
    "node": str,
    "prompt": int,
    "lengths": str,
}  # of fields that are None at first
MEAN_AND_P95 = re.compile(r"\d{1,7}:\d{1,7}")
DEFAULTS = Setup(batch=4, seq=512)


@immutable
class Choices:
    """A question to the page.

    Attributes:
        methods: as `predict` takes them, the baseline first.
        samples, epochs: the job that is planned.
        price: dollars an hour and GPU; None: the bundled prices.

    Raises:
        UserError: what cannot be chosen here.
    """

    model: str = "llama-3.2-3b"
    device: str = "l40s"
    methods: tuple[str, ...] = ("full", "lora:r=16,targets=all-linear")  # which every model has
    setup: Setup = DEFAULTS
    samples: int = 10_000
    epochs: float = 3.0
    price: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", bundled_model(self.model))
        object.__setattr__(self, "device", bundled_device(self.device))
        if not 2 <= len(self.methods) <= MOST_METHODS:
            raise UserError(f"choose 2 to {MOST_METHODS} methods, the baseline first: {len(self.methods)} are chosen")
        for method in self.methods:
            _check_text("method", method)
            if "/" in method:
                raise UserError(
                    f"method {method.partition(':')[0]}: regular expressions and paths are not taken on this page; "
                    "name the modules, or use the command line"
                )


def bundled_model(name: str) -> str:
    """The bundled model of a name, or of a repository's name.

    Raises:
        UserError: it is none, or one that can only be traced.
    """
    _check_text("model", name)
    found = name.lower() if name.lower() in model_names() else (bundled_for(name) or ("",))[0]
    if not found:
        raise UserError(f"unknown model {name!r}: {_near(name, model_names(), 'models')}")
    from_config(load(found))
    return found


def bundled_device(name: str) -> str:
    """The slug of a bundled device.

    Raises:
        UserError: there is none of that name.
    """
    return _bundled("device", name, profile.bundled, profile.names())


def bundled_node(name: str) -> str:
    """The name of a bundled node.

    Raises:
        UserError: there is none of that name.
    """
    return _bundled("node", name, nodes.bundled, nodes.names())


def _bundled(what: str, name: str, find: Callable[[str], str | None], known: Sequence[str]) -> str:
    _check_text(what, name)
    found = find(name)
    if not found:
        raise UserError(f"unknown {what} {name!r}: {_near(name, known, f'{what}s')}")
    return found


def _near(name: str, known: Sequence[str], what: str) -> str:
    return nearest(name, known, otherwise=f"this page has the bundled {what}, no paths and nothing from the hub")


def _check_text(what: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
        raise UserError(f"{what}: 1 to {LONGEST} characters are expected")


def setup_fields() -> dict[str, Any]:
    """The fields of a setup that can be chosen here, with their usual values."""
    usual = Setup()
    return {f.name: getattr(usual, f.name) for f in fields(Setup) if f.name not in NOT_HERE}


def chosen_fields(setup: Setup) -> dict[str, str]:
    """The fields that are not as usual, and the size of a batch, as they are typed."""
    told = {}
    for name, usual in setup_fields().items():
        value = getattr(setup, name)
        if value != usual or name in ("batch", "seq"):
            told[name] = value.spec if name == "lengths" else str(value).lower() if value is not None else "none"
    return told


def with_fields(setup: Setup, given: Mapping[str, Any]) -> Setup:
    """The setup with some fields as they were typed, or as a training config has them.

    Raises:
        UserError: no such field, or a value that it does not take.
    """
    usual = setup_fields()
    changes = {}
    for name, value in given.items():
        if name not in usual:
            raise UserError(f"{name!r} cannot be set on this page: {nearest(name, usual)}")
        kind = KINDS.get(name, type(usual[name]))
        changes[name] = _converted(name, value, kind, usual[name] is None) if isinstance(value, str) else value
    if changes.get("node") is not None:
        changes["node"] = bundled_node(changes["node"])
    if isinstance(changes.get("lengths"), str) and not MEAN_AND_P95.fullmatch(changes["lengths"]):
        raise UserError("lengths are MEAN:P95 in tokens on this page, such as 400:1200")
    return replace(setup, **changes)


def _converted(name: str, text: str, kind: type, optional: bool) -> Any:
    text = text.strip()
    _check_text(name, text)
    if optional and text == "none":
        return None
    if kind is bool and text in ("true", "false"):
        return text == "true"
    if kind is int and re.fullmatch(r"\d{1,9}", text):
        return int(text)
    if kind is str:
        return text
    raise UserError(f"{name} must be {'true or false' if kind is bool else 'a whole number'}, got {text[:40]!r}")


def further_fields(text: str) -> dict[str, str]:
    """`kernels=liger compile=default` as fields of a setup.

    Raises:
        UserError: a word that is no NAME=VALUE.
    """
    found = {}
    for word in text.replace(",", " ").split():
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"further settings are NAME=VALUE, such as kernels=liger, not {word[:40]!r}")
        found[name.lstrip("-").replace("-", "_")] = value
    return found


def to_query(c: Choices) -> str:
    """The query of the address that leads back to the choices."""
    pairs: list[tuple[str, Any]] = [("model", c.model), ("device", c.device), *(("method", m) for m in c.methods)]
    pairs += [*chosen_fields(c.setup).items(), ("samples", c.samples), ("epochs", f"{c.epochs:g}")]
    pairs += [("price", f"{c.price:g}")] if c.price is not None else []
    return urlencode(pairs, safe=":,=+/")


def of_query(query: str) -> Choices:
    """The choices of an address; keys that are none of the page's (of who sent the link) are passed over.

    Raises:
        UserError: a value that cannot be chosen, or a query that is too long.
    """
    if len(query) > LONGEST_QUERY:
        raise UserError(f"the address is longer than {LONGEST_QUERY} characters")
    pairs = parse_qsl(query.replace("+", "%2B"))
    given = dict(pairs)
    changes: dict[str, Any] = {name: given[name] for name in ("model", "device") if name in given}
    methods = tuple(value for name, value in pairs if name == "method")
    changes |= {"methods": methods} if methods else {}
    for name in ("samples", "epochs", "price"):
        if name in given:
            changes[name] = positive_number(name, given[name], whole=name == "samples")
    known = setup_fields()
    usual = Setup() if any(name in given for name in known) else DEFAULTS
    named = {k: v for k, v in given.items() if k in known}
    return Choices(setup=with_fields(usual, _own(given.get("model")) | named), **changes)


def _own(model: str | None) -> dict[str, str]:
    return {} if model is None else usual_attention(from_config(load(bundled_model(model))))


def positive_number(name: str, text: Any, *, whole: bool = False) -> Any:
    """A positive number that was typed.

    Raises:
        UserError: it is none.
    """
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a number, got {str(text)[:40]!r}") from None
    if not 0 < value < 1e12:
        raise UserError(f"{name} must be more than 0 and below 1e12, got {value:g}")
    return round(value) if whole else value


def of_form(
    model: str, device: str, methods: Sequence[str], typed: Mapping[str, Any], further: str, samples: Any, epochs: Any,
    price: Any,
) -> Choices:  # fmt: skip
    """The choices of the form's fields.

    Args:
        typed: fields of the setup that have a place of their own in the form.
        further: the others, as NAME=VALUE.
        price: dollars an hour and GPU, or nothing.

    Raises:
        UserError: what cannot be chosen.
    """
    in_fields = {name: str(value).lower() for name, value in typed.items()}
    given = _own(model) | in_fields | further_fields(further)
    return Choices(
        model, device, tuple(methods), with_fields(Setup(), given), positive_number("samples", samples, whole=True),
        positive_number("epochs", epochs), positive_number("price", price) if price not in (None, "", 0) else None,
    )  # fmt: skip
