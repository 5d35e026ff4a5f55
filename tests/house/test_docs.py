"""Pages of prose that recompute what they say."""

import ast
import doctest
import importlib
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md") if ">>> " in p.read_text(encoding="utf-8")))
def test_every_number_of_a_page_is_what_its_code_prints(page: str) -> None:
    """Prose outlives the code that it describes unless it runs."""
    outcome = doctest.testfile(str(DOCS / page), module_relative=False)
    assert outcome.attempted > 10
    assert outcome.failed == 0


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.ipynb")))
def test_every_cell_of_a_notebook_runs_and_keeps_no_output(page: str) -> None:
    """An output that is stored is one of long ago, and an example that breaks is worse than none."""
    names: dict[str, object] = {}
    shown = 0
    for cell in json.loads((DOCS / page).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        *lines, last = ast.parse("".join(cell["source"])).body
        if not isinstance(last, ast.Expr):
            lines.append(last)
        exec(compile(ast.Module(lines, []), page, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), page, "eval"), names)
            shown += "<table>" in value._repr_html_() if value is not None else 0
    assert shown > 1


def with_examples() -> list[str]:
    root = DOCS.parent
    files = [p for p in (root / "perfmodel").rglob("*.py") if ">>> " in p.read_text(encoding="utf-8")]
    return sorted(".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in files)


@pytest.mark.parametrize("module", with_examples())
def test_every_example_of_a_docstring_is_what_its_code_prints(module: str) -> None:
    """An example that nobody runs shows a figure of long ago."""
    if module.startswith("perfmodel.tracing."):
        pytest.importorskip("torch")
    assert doctest.testmod(importlib.import_module(module)).failed == 0
