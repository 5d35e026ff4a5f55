"""What the keys of a tool's files mean that its reader does not read: tables in data/configs/."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from ..errors import UserError
from ..resources import DATA, read_toml
from .keys import NOTHING, Keys

OF_SAVES = ("save_strategy", "saves_per_epoch")  # which say how often, beside a job's own options


@dataclass(frozen=True)
class Meanings:
    """One table.

    Attributes:
        no_weight: keys that change neither speed nor memory; a name may end in `*`.
        refused: keys that ask for a step of another kind, and the complaint.
        differs: keys that ask for what is not modelled, and what is answered instead.
        off: values that leave a key without effect, beside nothing, false and the like.
        job: keys of the whole job, of which a step knows nothing, and the options of `perfmodel plan` that they are.
        job_defaults: values of such keys where a file has none.
    """

    no_weight: tuple[str, ...]
    refused: dict[str, str]
    differs: dict[str, str]
    off: dict[str, list[Any]]
    job: dict[str, str]
    job_defaults: dict[str, Any]

    def has_effect(self, key: str, value: Any) -> bool:
        """Whether a key is set to something."""
        off = [other for other in self.off.get(key, ()) if isinstance(other, bool) == isinstance(value, bool)]
        return value not in NOTHING and value not in off

    def of_job(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the whole job that a file's values are, or its tool's defaults; what is no number of that kind is
        left out."""
        found = {option: _number(values.get(key, self.job_defaults.get(key))) for key, option in self.job.items()}
        found["save_every"] = self._save_every(values, found)
        parts = ("epochs", "save_every")  # which may be fractions
        return {
            option: value
            for option, value in found.items()
            if isinstance(value, (int, float) if option in parts else int) and value > 0
        }

    def _save_every(self, values: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
        """Steps between checkpoints, or their share of all steps; None where a strategy saves by neither."""
        strategy = values.get("save_strategy")
        if strategy is None and values.get("save_steps") is None:
            strategy = self.job_defaults.get("save_strategy")
        times = _number(values.get("saves_per_epoch", 1 if strategy == "epoch" else None))  # Axolotl's
        if times is not None:
            epochs, steps = 1 if found["epochs"] is None else found["epochs"], found["max_steps"]
            known = all(isinstance(number, (int, float)) for number in (times, epochs))
            endless = steps is None or (isinstance(steps, int) and steps < 0)
            return 1 / (times * epochs) if known and endless and times * epochs > 1 else None
        return found.get("save_every") if strategy in (None, "steps") else None

    def without_weight(self, key: str) -> bool:
        """Whether a key is known to change neither speed nor memory."""
        return any(fnmatchcase(key, pattern) for pattern in self.no_weight)


def _number(value: Any) -> Any:
    """A value, or the number that it is in quotes."""
    if not isinstance(value, str):
        return value
    with suppress(ValueError, OverflowError):
        return int(value) if value.isdecimal() else float(value)
    return value


@cache
def meanings_of(*names: str) -> Meanings:
    """The tables of these names as one; where two speak of a key, the first one counts."""
    tables = [read_toml(DATA / "configs" / f"{name}.toml") for name in reversed(names)]
    merged: dict[str, dict[str, Any]] = {"refused": {}, "differs": {}, "off": {}, "job": {}, "job_defaults": {}}
    for table in tables:
        for part, entries in merged.items():
            entries.update(table.get(part, {}))
    return Meanings(tuple(name for table in tables for name in table["no_weight"]), **merged)


def judge(keys: Keys, table: Meanings) -> list[str]:
    """Say what the keys that nobody read change; returns those without weight, here and to the whole job."""
    rest = [key for key in keys.unread() if table.has_effect(key, keys.values[key])]
    for key in rest:
        if key in table.differs:
            keys.differ(table.differs[key], key)
    rest = [key for key in rest if key not in table.differs]
    unknown = [key for key in rest if not table.without_weight(key)]
    if unknown:
        keys.differ("keys that are unknown here", *unknown)
    return [key for key in rest if key not in unknown and key not in (*table.job, *OF_SAVES)]


def refuse(keys: Keys, table: Meanings) -> None:
    """Raise `UserError` for a key that asks for a step of another kind."""
    for key, why in table.refused.items():
        if table.has_effect(key, keys.values.get(key)):
            raise UserError(f"{keys.origin}: {key}: {why}")
