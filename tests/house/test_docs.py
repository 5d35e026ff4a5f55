"""Pages of prose that recompute what they say."""

import doctest
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_every_number_of_a_page_is_what_its_code_prints(page: str) -> None:
    """Prose outlives the code that it describes unless it runs."""
    outcome = doctest.testfile(str(DOCS / page), module_relative=False)
    assert outcome.attempted > 10
    assert outcome.failed == 0
