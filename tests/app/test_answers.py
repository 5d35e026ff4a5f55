"""What the page shows is what the questions answer, every text of it escaped."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")

import perfmodel
from perfmodel.app.answers import answer_html, doublings_around, map_of, plan_everywhere
from perfmodel.app.choices import Choices
from perfmodel.errors import UserError
from perfmodel.questions.plan.words import plan_answer
from perfmodel.report.charts.breakeven import BreakEven, breakeven, tone
from perfmodel.report.svg import typeset
from perfmodel.setup import Setup


def asked(**changes: Any) -> Choices:
    return Choices("llama-3.2-1b", setup=Setup(batch=2, seq=128), samples=1000, **changes)


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_page_says_what_the_questions_answer() -> None:
    """Sentence, figures, waterfall, memory and plan of the page are those of `compare` and `plan`."""
    c = asked(methods=("full", "lora:r=8", "top_k:k=2"), price=2.0)
    html, said = answer_html(c), perfmodel.compare(c.model, c.methods, c.setup, c.device)
    told = text_of(html)
    for speedup in said.speedups:
        assert typeset(speedup.answer) in told.replace("&amp;", "&")
        assert f"{speedup.ratio:.2f} {speedup.verdict}" in told
    plan = perfmodel.plan(c.model, c.methods, c.setup, c.device, samples=1000, epochs=3, price=["2"])
    assert f"${plan.cheapest()[0].dollars:,.2f}" in told
    assert html.count('aria-label="Waterfall') == 4  # two methods, for a desk and for a phone
    assert 'aria-label="Peak memory by method"' in html


def test_the_map_is_the_sweep() -> None:
    """Each cell is the speed-up of `sweep`, and the frame stands at the setup."""
    c = asked()
    rows = perfmodel.sweep(c.model, c.methods, device=c.device, batch=[4], seq=[256]).table()
    html = map_of(c)
    assert f"batch 4, 256 tokens: {rows['speedup'][1]:.2f}x" in html
    assert html.count('class="here"') == 2  # for a desk and for a phone


@pytest.mark.parametrize("seq", [128, 100_000])
def test_the_map_ends_where_the_positions_of_the_model_do(seq: int) -> None:
    """GPT-2 has learned 1024 of them: a map that asks for more would be none at all."""
    html = map_of(Choices("gpt2", setup=Setup(batch=2, seq=seq)))
    assert "1,024 tokens" in html
    assert "2,048 tokens" not in html


@pytest.mark.parametrize(("value", "first"), [(1, 1), (4, 1), (64, 1), (65, 2), (1000, 16)])
def test_the_map_holds_the_setup(value: int, first: int) -> None:
    values = doublings_around(value, 7, 1)
    assert values[0] == first
    assert values[0] <= value <= values[-1]
    assert len(values) == 7


def test_a_map_without_the_setup_has_no_frame() -> None:
    ratios = np.array([[1.0, 0.5], [2.5, 1.2]])
    plane = BreakEven([1, 2], [128, 256], ratios, np.ones((2, 2), bool), ("a", "b"), (1, 64))
    assert "here" not in breakeven(plane).svg()


def test_a_corner_marks_what_does_not_fit() -> None:
    """The one cell that does not fit has a filled corner, and says so to whoever points at it."""
    fits = np.array([[True, True], [True, False]])
    svg = breakeven(BreakEven([1, 2], [128, 256], np.ones((2, 2)), fits, ("a", "b"), (1, 64))).svg()
    assert (svg.count('class="f-muted"'), svg.count("does not fit")) == (1, 1)


@pytest.mark.parametrize(
    ("ratio", "found"),
    [(1.0, "f-grid"), (1.05, "f-grid"), (1.06, "f-saved tone-1"), (3.0, "f-saved tone-4"), (0.5, "f-added tone-4")],
)
def test_colours_say_what_words_say(ratio: float, found: str) -> None:
    assert tone(ratio) == found


def test_visitors_do_not_disturb_one_another() -> None:
    """Those who ask at once get what each alone would get, whatever they look at."""
    choices = [Choices("llama-3.2-1b", setup=Setup(batch=batch, seq=128)) for batch in range(1, 5)]
    asked = [(show, c) for c in choices for show in (answer_html, map_of, plan_everywhere)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            at_once = list(threads.map(lambda question: question[0](question[1]), asked))
        assert [show(c) for show, c in asked] == at_once
    finally:
        sys.setswitchinterval(before)


def test_every_gpu_is_planned() -> None:
    c = asked()
    plan = perfmodel.plan(c.model, c.methods, c.setup, samples=c.samples, epochs=c.epochs)
    assert text_of(plan_everywhere(c)).startswith(f" {typeset(plan_answer(plan))}")
    assert len(plan.runs) > 50


def test_several_gpus_are_answered() -> None:
    c = Choices("llama-3.2-1b", "h100-sxm", setup=Setup(batch=2, seq=128, gpus=8, parallel="fsdp2"))
    told = text_of(answer_html(c))
    assert "exposed communication" in told
    assert "8 x h100-sxm" in told


def test_what_is_refused_is_one_line() -> None:
    with pytest.raises(UserError, match="matches no linear layer") as told:
        answer_html(asked(methods=("full", "lora:targets=<b>x<b>")))
    assert "\n" not in str(told.value)


def test_names_are_escaped() -> None:
    """A name on the page is text, whoever chose it."""
    plane = BreakEven([1], [128], np.ones((1, 1)), np.ones((1, 1), bool), ("<i>", '"><script>'), (1, 128))
    svg = breakeven(plane).svg()
    assert "<script" not in svg
    assert "<i>" not in svg
