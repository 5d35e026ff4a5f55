"""The mutants: places of the code at random, and what cosmic-ray makes of each."""

import ast
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MUTATED = ("perfmodel", "validate")


@dataclass(frozen=True)
class Mutant:
    """The n-th place of a file that an operator changes; `line` counts from 1."""

    path: str
    operator: str
    occurrence: int
    line: int
    column: int

    def text(self) -> str:
        """Its file with the change."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        text = (ROOT / self.path).read_text(encoding="utf-8")
        return str(mutate_code(text, get_operator(self.operator)(), self.occurrence))


def sources() -> list[str]:
    """The files that are mutated."""
    return [p.relative_to(ROOT).as_posix() for top in MUTATED for p in sorted((ROOT / top).rglob("*.py"))]


def sampled(count: int, seed: int) -> list[Mutant]:
    """A random sample of places, with a random variant of each; what is no Python (`*,` as `/,`) is no mutant.

    A place is drawn by its file, its line's text and what changes it: while other lines change, it stays drawn.
    """
    drawn: dict[str, Mutant] = {}
    for path in sources():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        twins: Counter[str] = Counter()
        for variants in places(path):
            m = variants[0]
            named = f"{seed} {path} {lines[m.line - 1].strip()} {m.operator.split('_')[0]}"
            twins[named] += 1
            rank = hashlib.sha256(f"{named} {twins[named]}".encode()).hexdigest()
            drawn[rank] = variants[int(rank[-8:], 16) % len(variants)]
    return list(islice((m for _, m in sorted(drawn.items()) if compiles(m.text())), count))


def places(path: str) -> Iterator[list[Mutant]]:
    """The places of a file, each with its variants (`+` as `-`, as `*`, …)."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    nodes, skipped = list(ast_nodes(get_ast_from_path(ROOT / path))), annotations(ROOT / path)
    found: dict[tuple[str, Any], list[Mutant]] = defaultdict(list)
    for name in operator_names():
        cls = get_operator(name)
        if cls.arguments() or name.endswith(("_Is", "_IsNot")):  # identity of values is that of interned ones
            continue
        spots = (at for node in nodes for at in cls().mutation_positions(node))
        for occurrence, (start, _) in enumerate(spots):
            if start not in skipped:
                found[name.split("_")[0], start].append(Mutant(path, name, occurrence, *start))
    yield from found.values()


def annotations(path: Path) -> set[tuple[int, int]]:
    """(line, column) of every character of a type annotation."""
    lines = path.read_text(encoding="utf-8").splitlines()
    spots: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse("\n".join(lines))):
        for note in (getattr(node, name, None) for name in ("annotation", "returns")):
            if note is not None:
                for row in range(note.lineno, note.end_lineno + 1):
                    first = note.col_offset if row == note.lineno else 0
                    last = note.end_col_offset if row == note.end_lineno else len(lines[row - 1])
                    spots |= {(row, column) for column in range(first, last)}
    return spots


def compiles(text: str) -> bool:
    """Whether it is Python."""
    try:
        compile(text, "mutant", "exec", dont_inherit=True)
    except SyntaxError:
        return False
    return True
