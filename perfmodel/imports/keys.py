"""A config file's keys with typed access, and what is to be said of the answer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..resources import is_file, read_json

NO_TRAINING = "no training config"  # of files that lie beside training configs
WORDS = {word: on for on, words in ((True, "true t yes y 1"), (False, "false f no n 0")) for word in words.split()}
OF_METHOD = ("lora_", "peft_")  # how keys of tools begin that are of adapters alone
NOTHING: tuple[Any, ...] = (None, "", False, [], {})


class Keys:
    """The keys of one file.

    Every complaint names the file and the key. A key that is empty or null counts as absent, as these tools treat it.

    Attributes:
        place: the parts of the file's path.
        alone: whether the file is only a text, beside which no other file is read.
        differences: how the step that is answered differs from the file's, each with the keys that ask for it.
        of_method: those that are said of the file's method, and not of another in its place.
    """

    def __init__(
        self, values: Mapping[str, Any], origin: str, place: tuple[str, ...] = (), *, alone: bool = False
    ) -> None:
        self.values = values
        self.origin = origin
        self.place = place
        self.alone = alone
        self.used: set[str] = set()
        self.differences: dict[str, list[str]] = {}
        self.of_method: set[str] = set()

    def __contains__(self, key: str) -> bool:
        self.used.add(key)
        return self.values.get(key) not in (None, "")

    def get(self, key: str) -> Any:
        """The raw value, None if absent."""
        self.used.add(key)
        value = self.values.get(key)
        return None if value == "" else value

    def but(self, **values: Any) -> "Keys":
        """The same file with other values of some keys."""
        return Keys({**self.values, **values}, self.origin, self.place, alone=self.alone)

    def take(self, key: str, *names: str) -> dict[str, Any]:
        """Let entries of a mapping count in the place of the file's own keys; returns the other entries.

        Raises:
            UserError: no mapping.
        """
        section = self.get(key) or {}
        if not isinstance(section, dict):
            raise self.wrong(key, "a mapping")
        self.values = {**self.values, **{name: section[name] for name in names if name in section}}
        return {name: value for name, value in section.items() if name not in names}

    def object_in(self, name: str) -> dict[str, Any] | None:
        """The object of a JSON file that a value names, from here, from beside this file or from a folder above it, as
        in examples of a repository; None if it is nowhere, or not to be read."""
        if self.alone:
            return None
        beside = (str(folder / name) for folder in Path(*self.place).resolve().parents)
        found = next(filter(is_file, (name, *beside)), None)
        return None if found is None else read_json(Path(found))

    def flag(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, str) and value.lower() in WORDS:
            return WORDS[value.lower()]
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def count(self, key: str, default: int) -> int:
        """A positive integer."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def number(self, key: str, default: float = 0.0) -> float:
        """A number."""
        value = self.get(key)
        if value is None:
            return default
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.wrong(key, "a number") from None

    def text(self, key: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """Names: a list, or a string with commas."""
        value = self.get(key)
        if value is None:
            return ()
        found = value.split(",") if isinstance(value, str) else value
        if not isinstance(found, (list, tuple)) or not all(isinstance(x, str) for x in found):
            raise self.wrong(key, "a list of names")
        return tuple(name.strip() for name in found if name.strip())

    def one_of(self, key: str, choices: Mapping[str, Any], default: Any) -> Any:
        """What a word stands for."""
        word = self.text(key)
        if word is None:
            return default
        if word not in choices:
            raise UserError(f"{self.origin}: {key} {word!r} is unknown: {nearest(word, choices)}")
        return choices[word]

    def refuse(self, key: str, why: str) -> None:
        """Raise `UserError` if a key is set to something that is not modelled."""
        if self.get(key) not in NOTHING:
            raise UserError(f"{self.origin}: {key} {self.values[key]!r}: {why}")

    def exclude(self, a: str, b: str) -> None:
        """Raise `UserError` if two keys that contradict each other are both on."""
        off = (*NOTHING, *(word for word, on in WORDS.items() if not on))
        if self.get(a) not in off and self.get(b) not in off:
            raise UserError(f"{self.origin}: {a} and {b} exclude each other: leave one of them out")

    def differ(self, answered: str, *keys: str) -> None:
        """Say what is answered instead of what keys ask for; it stands in the first line."""
        self.used.update(keys)
        self.differences.setdefault(answered, []).extend(keys)

    @contextmanager
    def said_of_method(self) -> Iterator[None]:
        """What differs from here to the end is said of the method alone."""
        before = set(self.differences)
        yield
        self.of_method |= self.differences.keys() - before

    def told_differences(self) -> list[str]:
        """What is answered instead, with the keys that ask for something else."""
        return [_told(*said) for said in self.differences.items()]

    def told_of_method(self) -> list[str]:
        """The same of the method, whose keys tell themselves too."""
        own = (keys and all(key.startswith(OF_METHOD) for key in keys) for keys in self.differences.values())
        of_keys = {said for said, is_own in zip(self.differences, own, strict=True) if is_own}
        return [_told(said, keys) for said, keys in self.differences.items() if said in self.of_method | of_keys]

    def unread(self) -> list[str]:
        """Keys that are set and that no one asked for."""
        return sorted(str(k) for k, v in self.values.items() if k not in self.used and v not in NOTHING)

    def wrong(self, key: str, expected: str) -> UserError:
        """The complaint about a value of the wrong type."""
        return UserError(f"{self.origin}: {key} must be {expected}, got {self.values.get(key)!r}")


def _told(answered: str, keys: Sequence[str]) -> str:
    return f"{answered} ({', '.join(keys)})" if keys else answered
