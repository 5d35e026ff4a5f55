"""Which tool a config file belongs to, and what it says as model, method and setup."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..resources import mapping, parsed, read_json, read_text
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
    if path.suffix == ".json":
        return read_json(path)
    import yaml

    values = parsed(read_text(path), yaml.safe_load, "YAML", str(path), yaml.YAMLError)
    return {str(key): value for key, value in mapping(values, str(path)).items()}
