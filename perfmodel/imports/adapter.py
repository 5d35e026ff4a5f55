"""PEFT's adapter_config.json."""

from collections.abc import Callable
from typing import Any

from ..errors import UserError, nearest
from .fields import flavour, spec
from .keys import Keys

MARKS = ("peft_type",)


def read(keys: Keys) -> tuple[str | None, str, dict[str, Any], list[str]]:
    """Model, method and notes; an adapter_config.json says nothing of the setup."""
    kind = str(keys.get("peft_type")).upper()
    if kind not in KINDS:
        raise UserError(
            f"{keys.origin}: peft_type {kind!r} has no built-in form: {nearest(kind, KINDS)} "
            "(predict --peft-config FILE traces any of them)"
        )
    for key in ("rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices"):
        keys.refuse(key, "not modelled from a config; predict --peft-config FILE traces it") if keys.get(key) else None
    bias = keys.text("bias", "none")
    if bias != "none":
        raise UserError(f"{keys.origin}: bias {bias!r}: trained biases are not modelled with adapters; use none")
    return keys.text("base_model_name_or_path"), KINDS[kind](keys), {}, []


def _targets(keys: Keys) -> tuple[str, ...]:
    value = keys.get("target_modules")
    if isinstance(value, str) and value != "all-linear":
        raise UserError(f"{keys.origin}: target_modules {value!r} is a pattern; give a list of names or all-linear")
    return ("all-linear",) if value == "all-linear" else keys.names("target_modules")


def _layers(keys: Keys) -> tuple[str, ...]:
    value = keys.get("layers_to_transform")
    return () if value is None else tuple(map(str, value if isinstance(value, list) else [value]))


def _lora(keys: Keys) -> str:
    pissa = str(keys.get("init_lora_weights") or "").startswith("pissa")
    name = flavour(
        keys, four_bit=False, dora=keys.flag("use_dora"), rslora=keys.flag("use_rslora"), pissa=pissa, plus=False
    )
    return spec(
        name, r=keys.count("r", 8), targets=_targets(keys), dropout=keys.number("lora_dropout"), layers=_layers(keys),
        modules_to_save=keys.names("modules_to_save"),
    )  # fmt: skip


def _ranked(name: str, rank: str = "r", dropout: str | None = None) -> Callable[[Keys], str]:
    def read(keys: Keys) -> str:
        p = keys.number(dropout) if dropout else None
        saved = keys.names("modules_to_save")
        return spec(
            name, r=keys.get(rank), targets=_targets(keys), dropout=p, layers=_layers(keys), modules_to_save=saved
        )

    return read


def _virtual(name: str) -> Callable[[Keys], str]:
    return lambda keys: spec(name, tokens=keys.count("num_virtual_tokens", 20))


def _oft(keys: Keys) -> str:
    size = keys.get("oft_block_size")
    return spec(
        "oft", block_size=size or None, r=None if size else keys.get("r"), targets=_targets(keys),
        modules_to_save=keys.names("modules_to_save"),
    )  # fmt: skip


def _ia3(keys: Keys) -> str:
    return spec(
        "ia3", targets=_targets(keys), feedforward=keys.names("feedforward_modules"),
        modules_to_save=keys.names("modules_to_save"),
    )  # fmt: skip


KINDS: dict[str, Callable[[Keys], str]] = {
    "LORA": _lora,
    "ADALORA": _ranked("adalora", "init_r", "lora_dropout"),
    "VERA": _ranked("vera", "r", "vera_dropout"),
    "LOHA": _ranked("loha", "r"),
    "LOKR": _ranked("lokr", "r"),
    "MISS": _ranked("miss", "r", "miss_dropout"),
    "OFT": _oft,
    "IA3": _ia3,
    "PROMPT_TUNING": _virtual("prompt_tuning"),
    "P_TUNING": _virtual("p_tuning"),
    "PREFIX_TUNING": _virtual("prefix_tuning"),
    "LN_TUNING": lambda keys: "norm",
}
