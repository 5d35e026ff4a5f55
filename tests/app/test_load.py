"""Many at once, and strangers, at a real server of the page: `python -m tests.load` for a few seconds."""

import asyncio

import pytest

pytest.importorskip("gradio")

from tests.load.__main__ import Findings, tried
from tests.load.server import served
from tests.load.visitors import questions_of


def test_many_at_once_get_their_own_answers_and_strangers_none() -> None:
    """Nothing of one visitor is shown to another, nothing is left on the disk, and what no page asks is refused."""
    with served() as server:
        found: Findings = asyncio.run(tried(server, clients=3, minutes=0.05, at_once=100, lines=0))
    assert found.wrong == []
    assert found.counts["answers"] > 0


def test_an_answer_to_somebody_else_is_told() -> None:
    """A check that cannot fail would let everything pass."""
    for mine, other in zip(questions_of(1), questions_of(5), strict=True):
        assert not mine.wrong([""] * mine.first + mine.answer)
        assert mine.wrong([""] * mine.first + other.answer)
