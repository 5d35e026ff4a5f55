"""Which tool a config file belongs to, and what it says as model, method and setup."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from . import adapter, axolotl, llama_factory, trainer
from .keys import Keys


@dataclass(frozen=True)
class Imported:
    """What a training config says.

    Attributes:
        tool: PEFT, Axolotl, LLaMA-Factory or Transformers/TRL.
        model: hub id or path, None if the file names none.
        method: as `predict` takes it, None if the file names none.
        setup: fields of `Setup`.
        ignored: keys that matter neither for time nor for memory here.
        notes: what a reader should know.
    """

    tool: str
    model: str | None
    method: str | None
    setup: dict[str, Any]
    ignored: list[str]
    notes: list[str]


Reader = Callable[[Keys], tuple[str | None, str | None, dict[str, Any], list[str]]]
TOOLS: tuple[tuple[str, Sequence[str], Reader], ...] = (
    ("PEFT", adapter.MARKS, adapter.read),
    ("Axolotl", axolotl.MARKS, axolotl.read),
    ("LLaMA-Factory", llama_factory.MARKS, llama_factory.read),
    ("Transformers/TRL", trainer.MARKS, trainer.read),
)


def read(path: str | Path) -> Imported:
    """Read a PEFT, Axolotl, LLaMA-Factory, TRL or Transformers config.

    Raises:
        UserError: a file that is none of these, a value of the wrong type, contradictory keys, what is not modelled.
    """
    path = Path(path)
    values = _load(path)
    for tool, marks, reader in TOOLS:
        if any(mark in values for mark in marks):
            keys = Keys(values, path.name)
            model, method, setup, notes = reader(keys)
            return Imported(tool, model, method, setup, keys.ignored(), notes)
    raise UserError(
        f"{path}: not a config of PEFT, Axolotl, LLaMA-Factory, TRL or Transformers: it has none of the keys they need"
    )


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else _yaml(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a training config holds keys and values, this holds {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _yaml(path: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
