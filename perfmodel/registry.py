"""Registries whose entries live one in a file: a file is imported when its name is asked for, all when listed."""

from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, registered by the files of a package when these are imported.

    Args:
        package: the package's name; a file that holds one entry is best named like it, and then loads alone.
        folder: where its files lie.
    """

    def __init__(self, package: str, folder: Path) -> None:
        self.package = package
        self.folder = folder
        self.entries: dict[str, T] = {}
        self._complete = False

    def add(self, name: str, entry: T) -> None:
        """Register an entry."""
        self.entries[name] = entry

    def get(self, name: str) -> T | None:
        """The entry of that name, or None."""
        if name not in self.entries and not self._complete:
            if name.isidentifier() and (self.folder / f"{name}.py").is_file():
                import_module(f"{self.package}.{name}")
            if name not in self.entries:
                return self.all().get(name)
        return self.entries.get(name)

    def all(self) -> dict[str, T]:
        """All entries, sorted by name."""
        if not self._complete:
            for path in sorted(self.folder.glob("[!_]*.py")):
                import_module(f"{self.package}.{path.stem}")
            self._complete = True
        return dict(sorted(self.entries.items()))
