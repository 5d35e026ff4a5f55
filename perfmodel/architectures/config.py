"""A Hugging Face config.json, read with checks, from a bundled name, a file, a folder or the hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError, nearest
from ..program.sizes import LARGEST
from ..resources import read_json
from . import names
from .names import MODELS, model_names

HUB = "https://huggingface.co/"
CLASS = "_class_name"  # what a config of diffusers has in the place of a model_type
# transformers/quantizers/quantizer_mxfp4.py, `is_trainable`: Trainer refuses such a model, with adapters too
KEPT_IN_MXFP4 = "transformers trains no model whose experts stay in MXFP4, only a dequantised one"
MEGATRON = "megatron"  # `megatron:` before a model's name: its program in Megatron-Core; in a config its model_type
NAMED = 5  # names in a message, at most
MOST_LAYERS = 4096  # each may be recorded by itself; those of the deepest models are below 200
T = TypeVar("T")


class Config:
    """A config.json with typed access; every complaint, a `UserError`, names the file and the key.

    `note` is what an answer has to say of it: that a repository's name was taken for a bundled config, or its `_note`.
    """

    def __init__(self, values: dict[str, Any], origin: str, name: str, note: str = "") -> None:
        self.values = values
        self.origin = origin
        self.name = name
        self.note = note

    @property
    def of_diffusers(self) -> bool:
        """Whether it is a config of diffusers."""
        return CLASS in self.values and "model_type" not in self.values

    @property
    def kind(self) -> str:
        """The `model_type`; of a config of diffusers the class that it names."""
        return self.text(CLASS if self.of_diffusers else "model_type")

    def check_unpacked(self) -> None:
        """Raise `UserError` if the base weights are quantised, and say what can be trained of them."""
        packed = self.values.get("quantization_config")
        if packed is None:
            return
        if isinstance(packed, dict) and packed.get("quant_method") == "mxfp4":
            instead = "remove quantization_config, as Mxfp4Config(dequantize=True) does"
            raise UserError(f"{self.origin}: {KEPT_IN_MXFP4}; {instead}")
        raise UserError(f"{self.origin}: quantization_config is not supported; quantised base weights are not modelled")

    def count(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """An int from `least` to `LARGEST` (of layers `MOST_LAYERS`) under the first of `keys` that is present."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                kind = "a positive integer" if least == 1 else f"an integer from {least}"
                raise UserError(f"{self.origin}: {key} must be {kind}, got {value!r}")
            most = MOST_LAYERS if "layer" in key else LARGEST
            if value > most:
                raise UserError(f"{self.origin}: {key} must be from {least} to {most}, got {value}")
            return value
        if default is None:
            raise UserError(f"{self.origin}: key {keys[0]!r} is missing; a Hugging Face config.json has it")
        return default

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.origin}: {key} must be true or false, got {value!r}")
        return value

    def fraction(self, key: str, default: float) -> float:
        """A number in [0, 1): a dropout probability."""
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise UserError(f"{self.origin}: {key} must be a number from 0 to below 1, got {value!r}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.origin}: key {key!r} is missing; a Hugging Face config.json has it")
        if not isinstance(value, str):
            raise UserError(f"{self.origin}: {key} must be a string, got {value!r}")
        return value

    def table(self, *keys: str) -> dict[str, Any]:
        """An object under the first of `keys` that is present and not null, else an empty one."""
        value: Any = next((self.values[key] for key in keys if self.values.get(key) is not None), {})
        if not isinstance(value, dict):
            raise UserError(f"{self.origin}: {' or '.join(keys)} must be an object, got {value!r}")
        return value

    def number(self, key: str, default: float | None) -> float | None:
        """A number above 0, or null."""
        value = self.values.get(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise UserError(f"{self.origin}: {key} must be a number above 0 or null, got {value!r}")
        return value

    def each_of(self, key: str, default: Sequence[T], choices: tuple[T, ...]) -> tuple[T, ...]:
        """As many values as the default has, each out of those that the tape knows."""
        values = self.values.get(key)
        if values is None:
            return tuple(default)
        if not isinstance(values, list) or len(values) != len(default) or any(v not in choices for v in values):
            known = ", ".join(map(str, choices))
            raise UserError(f"{self.origin}: {key} must list {len(default)} of {known}, got {values!r}")
        return tuple(values)

    def one_of(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """A string out of those that the tape knows."""
        value = self.text(key, default)
        if value not in choices:
            raise UserError(f"{self.origin}: {key} {value!r} is not supported; supported: {', '.join(choices)}")
        return value

    def refuse(self, **usual: Any) -> None:
        """Raise `UserError` where a key asks for a program that the tape does not mirror, unlike the `usual` value."""
        for key, value in usual.items():
            if self.values.get(key, value) != value:
                raise UserError(f"{self.origin}: {key} {self.values[key]!r} is not supported, only {value!r}")

    def divide(self, whole: str, by: str, a: int, b: int) -> int:
        """a / b, refused where it leaves a remainder."""
        if a % b:
            raise UserError(f"{self.origin}: {whole} {a} is not divisible by {by} {b}")
        return a // b

    def check_rotary(self, key: str, dims: int) -> None:
        """Refuse a width of heads with rotary positions that is odd."""
        if dims % 2:
            raise UserError(f"{self.origin}: {key} {dims} must be even for rotary positions")


def load(name_or_path: str) -> Config:
    """Read a config by bundled name, path to a config.json or its folder, or hub id (`org/name`).

    A hub id whose name says the family and size of a bundled model needs no network (`names.bundled_for`). `megatron:`
    before any of them is the model in Megatron-Core's program.

    Raises:
        UserError: nothing found, or the file is not a JSON object.
    """
    if not name_or_path.strip():
        raise UserError("model: no name is given; perfmodel models lists those that are known")
    if name_or_path.startswith(f"{MEGATRON}:"):
        if not (name := name_or_path.removeprefix(f"{MEGATRON}:")):
            raise UserError(f"model {name_or_path!r} names none: give one behind it, such as megatron:llama-3.1-8b")
        return _in_megatron(load(name))
    if name_or_path.lower() in model_names():
        return _read(MODELS / f"{name_or_path.lower()}.json", name_or_path.lower())
    path = Path(name_or_path)
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"model {name_or_path[:40]!r}: not a path that can be read ({reason})") from None
    if is_dir:
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {name_or_path} has no config.json")
        return _read(path / "config.json", path.resolve().name)
    if is_file:
        return _read(path, path.stem if path.name != "config.json" else path.resolve().parent.name)
    if name_or_path.count("/") <= 1 and not name_or_path.startswith((".", "/")) and path.suffix != ".json":
        if found := names.bundled_for(name_or_path):
            return _named(name_or_path, found)
        if names.is_own_code(name_or_path):
            raise UserError(
                f"model {name_or_path!r}: its program is code of its own repository (trust_remote_code), which is "
                "never run here; give one like it that transformers has (perfmodel models lists them)"
            )
        if "/" in name_or_path:
            return _read_hub(name_or_path)
    raise UserError(f"unknown model {name_or_path!r}: {_hint(name_or_path)} (or give a path or a hub id)")


def _read(path: Path, name: str) -> Config:
    values = read_json(path)
    return Config(values, str(path.name if path.parent == MODELS else path), name, str(values.get("_note", "")))


def _named(repository: str, meant: names.BundledMatch) -> Config:
    """The bundled config that a repository's name stands for, and what to say of it."""
    config = _read(MODELS / f"{meant.name}.json", meant.name)
    if str(config.values.get("_source", "")).lower().startswith(f"{HUB}{repository}/".lower()):
        return config
    said = [f"{repository} is taken for {meant.name}, by its name; if its config.json differs, give its path"]
    if meant.packed:
        packed = "-".join(meant.packed)
        way = "as GPTQ packs it with --method lora_gptq" if "gptq" in packed else "in 4 bit with --method qlora"
        said.append(f"its {packed} weights are not: the base is in --dtype, or {way}")
    config.note = "; ".join([*said, config.note] if config.note else said)
    return config


def _in_megatron(config: Config) -> Config:
    values = {**config.values, "model_type": f"{MEGATRON}_gpt", MEGATRON: config.kind}
    return Config(values, config.origin, f"{MEGATRON}:{config.name}", config.note)


def _hint(name: str) -> str:
    """The bundled models whose names go on from this one, else the nearest of its family and size, else its family."""
    from difflib import SequenceMatcher  # for a mistake alone

    alike = names.family(name)
    if not alike:
        meant = names.misspelt(name)
        return f"did you mean {meant!r}?" if meant else "perfmodel models lists those that are bundled"
    if begun := [known for known in alike if known.startswith(name.lower())]:
        return f"bundled: {', '.join(begun[:NAMED])}{_more(begun)}"
    sized = [known for known in alike if names.size(known) == names.size(name)]
    if sized:
        return nearest(name, sized)

    def alike_in(known: str) -> tuple[bool, float]:
        same = known.partition("-")[0] == name.lower().partition("-")[0]  # generation of a family
        return same, SequenceMatcher(None, name.lower(), known).ratio()

    near = sorted(alike, key=alike_in, reverse=True)
    return f"bundled of its family: {', '.join(near[:NAMED])}{_more(near)}"


def _more(known: list[str]) -> str:
    """How many names go unsaid; `perfmodel models` lists them."""
    return f" and {len(known) - NAMED} more" if len(known) > NAMED else ""


def _read_hub(hub_id: str) -> Config:
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.utils import logging
    except ImportError:
        raise UserError(
            f"model {hub_id!r} is not bundled ({_hint(hub_id)}), and reading the hub needs huggingface_hub: "
            "pip install 'perfmodel[hub]', or give the path of a config.json"
        ) from None
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings about retries would bury the one line that counts
    try:
        path = try_to_load_from_cache(hub_id, "config.json")
        if not isinstance(path, str):
            _reach_hub()
            path = hf_hub_download(hub_id, "config.json")
    except Exception as error:  # the hub client raises many types: offline, gated, unknown repository
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"model {hub_id!r} could not be fetched from the hub ({reason}); give the path of its config.json"
        ) from None
    finally:
        logging.set_verbosity(told)
    return _read(Path(path), hub_id.split("/")[1])


def _reach_hub() -> None:
    """Find out at once that there is no network; the hub's client would retry for half a minute.

    Raises:
        OSError: nothing answers. Behind a proxy, or with the client's own offline switch, it is left to the client.
    """
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if getproxies() or constants.HF_HUB_OFFLINE:
        return
    hub = urlsplit(constants.ENDPOINT)
    socket.create_connection((hub.hostname or "", hub.port or 443), timeout=5).close()
