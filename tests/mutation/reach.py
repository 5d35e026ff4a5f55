"""Which tests reach a mutant: one run of the suite over a copy whose functions note when they are entered."""

import ast
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .sample import ROOT, sources

PROBE = Path(__file__).with_name("probe.py")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: str, node: ast.AST, within: str = "") -> Iterator[tuple[str, Function]]:
    """The functions of a file, each with the names of what it stands in: they outlast an edit, where lines do not."""
    for child in ast.iter_child_nodes(node):
        name = f"{within}.{child.name}" if isinstance(child, Function | ast.ClassDef) else within
        if isinstance(child, Function):
            yield path + name, child
        yield from functions(path, child, name)


def parsed(path: str) -> ast.Module:
    """A source file."""
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def probed(copy: Path) -> None:
    """Lay probes into a copy of the checkout."""
    for path in sources():
        tree = parsed(path)
        for name, function in list(functions(path, tree)):
            at = 1 if ast.get_docstring(function) is not None and len(function.body) > 1 else 0
            function.body[at:at] = ast.parse(f"_reached({name!r})").body
        start = 1 if ast.get_docstring(tree) is not None else 0
        tree.body[start:start] = ast.parse("from probe import reached as _reached").body
        (copy / path).write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
    shutil.copy(PROBE, copy / "probe.py")


class Reach:
    """Tests by the functions that they enter, with their seconds."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: dict[str, set[str]] = defaultdict(set)
        self.entered: Counter[str] = Counter()  # functions, by test
        failed: set[str] = set()
        for line in map(json.loads, lines):
            if "reached" in line:
                self.tests[line["reached"]].add(line["test"])
                self.entered[line["test"]] += 1
            else:
                self.seconds[line["test"]] += line["seconds"]
                failed |= set() if line["passed"] else {line["test"]}
        for test in failed:
            del self.seconds[test]

    def direct(self, path: str, line: int) -> list[str]:
        """Tests that enter the function of a line; where none has it, those that enter or import its file."""
        around = [(f.end_lineno or 0) - f.lineno for _, f in self._around(path, line)]
        inner = [name for name, f in self._around(path, line) if (f.end_lineno or 0) - f.lineno == min(around)]
        names = inner or [name for name, _ in functions(path, parsed(path))]
        found = set().union(*(self.tests[name] for name in names)) if names else set()
        return self._ordered(found if inner else found | self._importing(path))

    def _importing(self, path: str) -> set[str]:
        """Tests of files that import a module: they may read its constants and enter nothing."""
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").glob("*/test_*.py")}
        asking = {file for file in files if module in imported(parsed(file))}
        return {test for test in self.seconds if test.split("::")[0] in asking}

    def readers(self, path: str) -> list[str]:
        """Tests that enter a function of a module that imports this one."""
        module = path.removesuffix("/__init__.py").removesuffix(".py").split("/")[-1]
        found: set[str] = set()
        for reader in sources():
            tree = parsed(reader)
            if reader != path and module in {name.split(".")[-1] for name in imported(tree)}:
                found = found.union(*(self.tests[name] for name, _ in functions(reader, tree)))
        return self._ordered(found)

    def within(self, tests: list[str], budget: float) -> tuple[list[str], float]:
        """As many tests as take `budget` seconds together, at least one, and their seconds."""
        spent, chosen = 0.0, []
        for test in tests:
            if not chosen or spent + self.seconds[test] <= budget:
                chosen.append(test)
                spent += self.seconds[test]
        return chosen, spent

    def _around(self, path: str, line: int) -> list[tuple[str, Function]]:
        """Functions whose body holds a line; decorators and defaults run on import, outside of it."""
        return [
            (name, f) for name, f in functions(path, parsed(path)) if f.body[0].lineno <= line <= (f.end_lineno or 0)
        ]

    def _ordered(self, tests: set[str]) -> list[str]:
        """Tests that enter few functions first, as they look most closely; one case of each before all others."""
        first: dict[str, str] = {}
        narrow = sorted(tests & set(self.seconds), key=lambda t: (self.entered[t], self.seconds[t], t))
        for test in narrow:
            first.setdefault(test.split("[")[0], test)
        leading = set(first.values())
        return [t for t in narrow if t in leading] + [t for t in narrow if t not in leading]


def imported(tree: ast.Module) -> set[str]:
    """Names of the modules that a file imports, as it writes them, and of what it takes from them."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module or ''}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def measured(folder: Path, copy: Path, run: Callable[[list[str]], None], told: Callable[[str], None]) -> Reach:
    """Run the suite over probes, one file of tests after another; what ran before, and is as it was, stays."""
    probed(copy)
    folder.mkdir(exist_ok=True)
    lines: list[str] = []
    for tests in sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").glob("*/test_*.py")):
        digest = hashlib.sha256((ROOT / tests).read_bytes()).hexdigest()[:12]
        file = folder / f"{tests.replace('/', '.').removesuffix('.py')}-{digest}.jsonl"
        if not file.exists():
            told(f"which functions does {tests} reach?")
            begun = file.with_suffix(".begun")
            begun.write_text("")
            os.environ["REACH_FILE"] = str(begun)
            run([tests, "-p", "probe"])
            begun.rename(file)
        lines += file.read_text().splitlines()
    return Reach(lines)
