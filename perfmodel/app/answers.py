"""The answer to the choices: the sentence, the table, the pictures and the plan, as plain values and as HTML."""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import Any

from ..architectures import from_config, load
from ..devices import host as hosts
from ..devices.device import profile_of
from ..devices.profile import DeviceProfile
from ..errors import UserError
from ..program.dims import Dim
from ..questions.comparison import compare
from ..questions.explanation import Explanation, of_predictions
from ..questions.plan.job import Job
from ..questions.plan.planning import Plan, planner_of
from ..questions.plan.words import job_in_words, plan_answer, plan_notes
from ..questions.sentences import notes_by_method
from ..questions.sweeps import sweep
from ..report.charts.breakeven import BreakEven, breakeven
from ..report.exhibits import both_forms, memories, waterfalls
from ..report.figures import headline, mfu_of
from ..report.page import fastest, fragment, rows_of_page
from ..report.plan import plan_table, shares_in_words
from ..report.sweeps import plane
from .choices import Choices

TEMPLATES = Path(__file__).parent
BATCHES, LENGTHS = 7, 7  # cells of the map each way, every one twice the one before
KEPT = 64  # maps of the last questions


def answer_html(c: Choices) -> str:
    """Sentence, table, waterfalls, memory and the plan, as HTML.

    Raises:
        UserError: what `compare` refuses.
    """
    on = profile_of(c.device)
    by = hosts.host_of("default", on)
    found = compare(c.model, c.methods, c.setup, on, host=by)
    base, *others = found.predictions
    explained = [of_predictions(base, p, on, by, ()) for p in others]
    labels = [explained[0].labels[0], *(e.labels[1] for e in explained)]
    context = {
        "headline": headline(base),
        "answers": [*(e.answer for e in explained), *found.unanswered],
        "labels": labels,
        "figures": rows_of_page(found),
        "mfu": mfu_of(*found.predictions),
        "notes": notes_by_method(found.predictions),
        "plan": _plan_or_why(c, (c.device,)),
        **waterfalls(_fastest_first(explained)),
        **memories(found.predictions, labels, on),
    }
    return fragment(context, TEMPLATES / "answer.html.j2")


def _fastest_first(explained: list[Explanation]) -> list[Explanation]:
    """The waterfall of the fastest that fits is the one that is looked at."""
    first = fastest(explained)
    return [first, *(e for e in explained if e is not first)]


def planned(c: Choices, devices: Iterable[str] | None) -> Plan:
    """The job on some devices, or on every GPU of the catalogue.

    Raises:
        UserError: what `plan` refuses.
    """
    job = Job(samples=c.samples, epochs=c.epochs)
    price = () if c.price is None else (f"{c.price:g}",)
    asked = None if devices is None else list(devices)
    return planner_of(c.model, c.methods, c.setup, asked, job=job, price=price).plan()


def plan_everywhere(c: Choices) -> str:
    """The plan on every GPU, each in its usual node, as HTML.

    Raises:
        UserError: what `plan` refuses.
    """
    usual = replace(c, setup=replace(c.setup, node=None))
    return fragment({"plan": _told(planned(usual, None))}, TEMPLATES / "plan.html.j2")


def _plan_or_why(c: Choices, devices: Iterable[str]) -> dict[str, Any]:
    """The plan, or why there is none: a step may have an answer where a job has not."""
    try:
        return _told(planned(c, devices))
    except UserError as error:
        return {"answer": str(error), "job": "", "shares": "", "table": None, "notes": []}


def _told(plan: Plan) -> dict[str, Any]:
    heads, rows = plan_table(plan)
    filled = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    heads, rows = tuple(heads[i] for i in filled), [[row[i] for i in filled] for row in rows]
    return {
        "answer": plan_answer(plan),
        "job": job_in_words(plan, plan.runs[0]) if plan.runs else "",
        "shares": shares_in_words(plan),
        "table": {"heads": heads, "rows": rows, "style": "plan left2"} if plan.runs else None,
        "notes": plan_notes(plan),
    }


def map_of(c: Choices) -> str:
    """The break-even map of the second method against the first, as HTML.

    Raises:
        UserError: what `sweep` refuses.
    """
    setup = replace(c.setup, batch=1, seq=1 << 14, prompt=None)  # the same for all places of the map
    seq = int(c.setup.seq)
    most = from_config(load(c.model)).max_positions or inf
    batches = doublings_around(c.setup.batch, BATCHES, 1)
    lengths = tuple(n for n in doublings_around(seq if seq <= most else 1, LENGTHS, 128) if n <= most)
    labels, speedup, fits = _plane(replace(c, setup=setup), batches, lengths)
    found = BreakEven(list(batches), list(lengths), speedup, fits, labels, (int(c.setup.batch), seq))
    context = {"picture_of": both_forms(lambda width: breakeven(found, width)), "labels": labels}
    return fragment(context, TEMPLATES / "map.html.j2")


@lru_cache(KEPT)
def _plane(c: Choices, batches: tuple[int, ...], lengths: tuple[int, ...]) -> Any:
    on: DeviceProfile = profile_of(c.device)
    asked = sweep(c.model, c.methods[:2], c.setup, on, batch=batches, seq=lengths)
    first, second = asked.methods
    blocks = [b for b in asked.blocks() if b["method"][0] == second.spec()]
    return (first.in_words(), second.in_words()), plane(asked, blocks, "speedup"), plane(asked, blocks, "fits")


def doublings_around(value: Dim, cells: int, low: int) -> tuple[int, ...]:
    """So many doublings from `low` on, or later ones where the value lies beyond them."""
    start = low
    while start << (cells - 1) < int(value):
        start *= 2
    return tuple(start << i for i in range(cells))
