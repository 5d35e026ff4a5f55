"""PEFT's adapter_config.json, for the tuners that have a built-in form; a trace takes the file as it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from .fields import flavour, power_iterations, spec
from .keys import Keys
from .meanings import Meanings
from .targets import as_targets

MARKS = ("peft_type",)


class NoBuiltIn(UserError):
    """The file asks for what only a trace can answer; the message ends before "no built-in form"."""

    def but(self, how: str) -> str:
        """The whole complaint, and how a trace answers."""
        return f"{self} no built-in form: {how}"


@dataclass(frozen=True)
class Tuner:
    """A tuner as a built-in method.

    Attributes:
        options: option of the method -> key of the file; an absent key leaves the method's default.
        targeted: whether it has targets, layers and modules_to_save.
    """

    method: str
    options: Mapping[str, str] = field(default_factory=dict)
    targeted: bool = True


KINDS = {
    "LORA": Tuner("lora", {"r": "r", "dropout": "lora_dropout"}),
    "ADALORA": Tuner("adalora", {"r": "init_r", "dropout": "lora_dropout"}),
    "BEFT": Tuner("beft"),
    "BOFT": Tuner("boft", {"block_size": "boft_block_size"}),
    "C3A": Tuner("c3a", {"block_size": "block_size"}),
    "DELORA": Tuner("delora", {"r": "r", "dropout": "module_dropout"}),
    "FOURIERFT": Tuner("fourierft", {"n": "n_frequency"}),
    "GRALORA": Tuner("gralora", {"r": "r", "k": "gralora_k", "hybrid": "hybrid_r", "dropout": "gralora_dropout"}),
    "HRA": Tuner("hra", {"r": "r"}),
    "IA3": Tuner("ia3", {"feedforward": "feedforward_modules"}),
    "LN_TUNING": Tuner("norm", targeted=False),
    "LOHA": Tuner("loha", {"r": "r"}),
    "LOKR": Tuner("lokr", {"r": "r", "factor": "decompose_factor", "decompose_both": "decompose_both"}),
    "MISS": Tuner("miss", {"r": "r", "dropout": "miss_dropout"}),
    "OFT": Tuner("oft", {"block_size": "oft_block_size"}),
    "PREFIX_TUNING": Tuner(
        "prefix_tuning",
        {"tokens": "num_virtual_tokens", "projection": "prefix_projection", "width": "encoder_hidden_size"},
        targeted=False,
    ),
    "PROMPT_TUNING": Tuner("prompt_tuning", {"tokens": "num_virtual_tokens"}, targeted=False),
    "P_TUNING": Tuner("p_tuning", {"tokens": "num_virtual_tokens", "width": "encoder_hidden_size"}, targeted=False),
    "RANDLORA": Tuner("randlora", {"r": "r", "dropout": "randlora_dropout"}),
    "ROAD": Tuner("road", {"variant": "variant", "group_size": "group_size"}),
    "TRAINABLE_TOKENS": Tuner("trainable_tokens", targeted=False),
    "VBLORA": Tuner(
        "vblora",
        {"r": "r", "vectors": "num_vectors", "length": "vector_length", "k": "topk", "dropout": "vblora_dropout"},
    ),
    "VERA": Tuner("vera", {"r": "r", "dropout": "vera_dropout"}),
}
FACTORED = ("OSF", "PSOFT")  # keep factors of the weights as buffers, which the memory of a trace leaves out
NOT_FACTORED = "memory without the frozen factors of weights that the tuner keeps"
PLAIN_STARTS = (True, False, "gaussian", "loftq", "eva", "olora", "corda", "orthogonal", "lora_ga")  # of LoRA's weights


def read(keys: Keys) -> tuple[str | None, str, dict[str, Any], list[str]]:
    """Model, method and notes; an adapter_config.json says nothing of the setup.

    Raises:
        NoBuiltIn: a tuner, or an option of one, that only a trace knows.
        UserError: a value of the wrong type.
    """
    name = str(keys.get("peft_type")).upper()
    if name not in KINDS:
        raise NoBuiltIn(f"{keys.origin}: peft_type {name!r} has")
    bias = keys.text("bias", "none")
    if bias != "none":
        raise NoBuiltIn(f"{keys.origin}: bias {bias!r} has")
    return keys.text("base_model_name_or_path"), _method(keys, name, KINDS[name]), {}, []


def read_whole(keys: Keys, table: Meanings) -> tuple[str | None, str, dict[str, Any], list[str], list[str]]:
    """As `read`, with the keys that change neither speed nor memory.

    Raises:
        NoBuiltIn: no built-in form, or a key beyond it.
        UserError: a value of the wrong type.
    """
    model, method, setup, notes = read(keys)
    rest = [key for key in keys.unread() if table.has_effect(key, keys.values[key])]
    beyond = [key for key in rest if not table.without_weight(key)]
    if beyond:
        raise NoBuiltIn(f"{keys.origin}: {', '.join(beyond)} {'has' if len(beyond) == 1 else 'have'}")
    return model, method, setup, notes, rest


def differ_without_data(keys: Keys) -> None:
    """Say what a trace of the real tuner does not follow."""
    name = str(keys.get("peft_type")).upper()
    if name == "ADAMSS":
        keys.differ("rows in clusters of equal size, not by their values", "peft_type")
    if name == "BOFT" and keys.count("boft_n_butterfly_factor", 1) > 1:
        keys.differ("a butterfly factor of 1, as PEFT has it without its CUDA extension", "boft_n_butterfly_factor")
    if name in FACTORED:
        keys.differ(NOT_FACTORED, "peft_type")
    if name == "FROD" and keys.flag("runtime_offload_base_weight"):
        keys.differ("base weights in GPU memory, not offloaded", "runtime_offload_base_weight")


def _method(keys: Keys, name: str, kind: Tuner) -> str:
    method, options = kind.method, {option: _value(keys, key) for option, key in kind.options.items()}
    if kind.targeted:
        options |= {"targets": as_targets(keys, "target_modules"), "layers": _layers(keys)}
        options["modules_to_save"] = keys.names("modules_to_save")
    if name == "LORA":
        method = _lora(keys)
        options["niter"] = power_iterations(method, keys.get("init_lora_weights"))
    elif name == "OFT" and not (options["block_size"] and keys.flag("use_cayley_neumann", True)):
        raise NoBuiltIn(f"{keys.origin}: {'use_cayley_neumann' if options['block_size'] else 'r'} has")
    elif name == "MISS" and keys.get("init_weights") not in (None, True, False):
        raise NoBuiltIn(f"{keys.origin}: init_weights {keys.get('init_weights')!r} has")
    elif name == "ADALORA":
        keys.used.add("r")  # PEFT writes what it inherits, and takes `init_r` (tuners/adalora/config.py)
    elif name == "TRAINABLE_TOKENS":
        options["tokens"] = _tokens(keys)
        if keys.get("target_modules") not in (None, "embed_tokens", ["embed_tokens"]):
            raise NoBuiltIn(f"{keys.origin}: target_modules has")
    return spec(method, **options)


def _value(keys: Keys, key: str) -> Any:
    value = keys.get(key)
    return keys.names(key) if isinstance(value, list) else value


def _layers(keys: Keys) -> tuple[str, ...]:
    value = keys.get("layers_to_transform")
    return () if value is None else tuple(map(str, value if isinstance(value, list) else [value]))


def _tokens(keys: Keys) -> int:
    value = keys.get("token_indices")
    if not isinstance(value, list) or not value:
        raise keys.wrong("token_indices", "a list of tokens")
    return len(value)


def _lora(keys: Keys) -> str:
    start = keys.get("init_lora_weights")
    pissa = str(start).startswith("pissa")
    if not pissa and start is not None and start not in PLAIN_STARTS:
        raise NoBuiltIn(f"{keys.origin}: init_lora_weights {start!r} has")
    return flavour(keys, bits=None, dora=keys.flag("use_dora"), rslora=keys.flag("use_rslora"), pissa=pissa, plus=False)
