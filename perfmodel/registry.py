"""Registries whose entries live one in a file: a file is imported when its name is asked for, all when listed."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


def add_once(table: dict[str, T], name: str, entry: T) -> None:
    """Put an entry into a table by name.

    Raises:
        ValueError: another entry has that name; one that a module defines anew when it is loaded again may.
    """
    before = table.get(name)
    if before is not None and (_home(before) != _home(entry)):
        raise ValueError(f"duplicate registrations for {name!r}: {_home(before)} and {_home(entry)}")
    table[name] = entry


def _home(entry: object) -> str:
    return f"{getattr(entry, '__module__', '')}.{getattr(entry, '__qualname__', repr(entry))}"


def _beginnings(name: str) -> Iterator[str]:
    """A name without none, one, two, … of its last words."""
    while name:
        yield name
        name = name.rpartition("_")[0]


class Registry(Generic[T]):
    """Entries by name, registered by the files of a package when these are imported.

    Args:
        package: the package's name; a file loads alone if it is named like an entry or its first words: `adamw.py` for
            adamw-fused.
        folder: where its files lie.
    """

    def __init__(self, package: str, folder: Path) -> None:
        self.package = package
        self.folder = folder
        self.entries: dict[str, T] = {}
        self._whole: set[str] = set()  # entries whose files are loaded to the end
        self._complete = False

    def add(self, name: str, entry: T) -> None:
        """Register an entry.

        Raises:
            ValueError: another one has that name.
        """
        add_once(self.entries, name, entry)

    def get(self, name: str) -> T | None:
        """The entry of that name, or None; while another thread loads its file, this one waits."""
        if name in self._whole:
            return self.entries[name]
        if name not in self.entries and not self._complete:
            for stem in _beginnings(name.replace("-", "_")):
                if stem.isidentifier() and (self.folder / f"{stem}.py").is_file():
                    import_module(f"{self.package}.{stem}")
                    break
            if name not in self.entries:
                return self.all().get(name)
        entry = self.entries.get(name)
        if entry is not None:
            if entry.__module__.startswith(f"{self.package}."):
                import_module(entry.__module__)
            self._whole.add(name)
        return entry

    def all(self) -> dict[str, T]:
        """All entries, sorted by name."""
        if not self._complete:
            for path in sorted(self.folder.glob("[!_]*.py")):
                import_module(f"{self.package}.{path.stem}")
            self._complete = True
        return dict(sorted(self.entries.items()))
