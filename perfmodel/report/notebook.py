"""What a notebook shows of a result: small tables in HTML, without a style sheet of their own."""

from collections.abc import Iterable, Sequence
from functools import singledispatch
from html import escape
from typing import Any

import numpy as np

from .. import units
from ..prediction.predict import Prediction
from ..program.part import PHASES
from ..questions.advice import Advice
from ..questions.comparison import Comparison
from ..questions.explanation import Explanation
from ..questions.plan.planning import Plan
from ..questions.plan.words import plan_answer, plan_notes
from ..questions.sentences import notes_by_method
from ..questions.sweeps import Sweep
from .advice import COLUMNS, advice_answer, change_cells
from .figures import any_best, figures
from .plan import plan_table, shares_in_words
from .svg import typeset

CELL = "text-align:right;padding:.15em .9em .15em 0;font-variant-numeric:tabular-nums;white-space:nowrap"
NAME = "text-align:left;padding:.15em .9em .15em 0;white-space:nowrap"
SAVED, ADDED = "#0072b2", "#d55e00"
WIDEST = 9.0  # em, the longest bar


@singledispatch
def html(result: Any) -> str:
    """The HTML of any result.

    Raises:
        TypeError: it is none.
    """
    raise TypeError(f"{type(result).__name__} is no result that a notebook shows")


@html.register
def _prediction(p: Prediction) -> str:
    """One method: its phases, memory and parameters; of a grid the range of each."""
    columns = (*PHASES, "total")
    rows = [
        ["time", *(_range(p.time.phases[c], units.seconds) for c in columns)],
        ["FLOPs", *(_range(p.flops[c], units.count) for c in columns)],
        ["memory traffic", *(_range(p.bytes[c], units.nbytes) for c in columns)],
        ["kernels", *(_range(p.kernels[c], lambda v: f"{v:,}") for c in columns)],
    ]
    fits = "fits" if np.all(p.fits) else "does not fit" if not np.any(p.fits) else "fits in part of the grid"
    below = (
        f"peak memory {_range(p.memory.peak, units.nbytes)}, {fits}; "
        f"{_range(p.trainable_params, units.count)} of {_range(p.total_params, units.count)} parameters train"
    )
    return _block(f"{p.method} on {p.model}, {p.device}", _table(["", *columns], rows), [below, *p.notes])


@html.register
def _comparison(c: Comparison) -> str:
    """The answers in words, and one column a method."""
    answers = [s.answer or f"{s.method}: speed-up {_range(s.ratio, lambda v: f'{v:.2f}')}" for s in c.speedups]
    answers += c.unanswered
    if c.predictions[0].step is None:  # a grid
        rows = [[p.method, _range(p.time.phases["total"], units.seconds)] for p in c.predictions]
        return _block("<br/>".join(map(_text, answers)), _table(["", "step"], rows), [], escaped=True)
    found = figures(c)
    rows = [[r.name.strip(), *(_bold(x.text) if x.best else x.text for x in r.cells)] for r in found]
    heads = ["", *(p.method for p in c.predictions)]
    told = [*["Bold: best of those that fit"] * any_best(found), *notes_by_method(c.predictions)]
    return _block("<br/>".join(map(_text, answers)), _table(heads, rows), told, escaped=True)


@html.register
def _explanation(e: Explanation) -> str:
    """The answer and the waterfall, its bars to scale."""
    longest = max((abs(bar.difference) for bar in e.waterfall), default=0.0) or 1.0
    rows = [
        [bar.name, *map(units.seconds, (bar.before, bar.after)), units.signed(bar.difference),
         _bar(bar.difference / longest)]
        for bar in e.waterfall
    ]  # fmt: skip
    total = e.after.total - e.before.total
    rows.append(["step", *map(units.seconds, (e.before.total, e.after.total)), units.signed(total), ""])
    return _block(e.answer, _table(["", *e.labels, "change", ""], rows), notes_by_method((e.a, e.b)))


@html.register
def _advice(a: Advice) -> str:
    """The way to the best setup, one change after another."""
    start = a.start.prediction
    told = f"{start.method} on {start.model}, {start.device}: {advice_answer(a)}"
    begin = ["as you are", "", units.seconds(a.start.seconds), units.nbytes(a.start.peak) + "*" * (not a.start.fits)]
    rows = [begin, *map(change_cells, a.path)]
    below = ["* does not fit"] * any(row[-1].endswith("*") for row in rows)
    return _block(told, _table(["one change after another", *COLUMNS], rows), [*below, *start.notes])


@html.register
def _plan(p: Plan) -> str:
    """The answer, the first runs, and what is behind the figures."""
    table = _table(*plan_table(p)) if p.runs else ""
    said = shares_in_words(p) if p.runs else ""
    return _block(f"{p.model}: {plan_answer(p)}", table, [*([said] if said else []), *plan_notes(p)])


@html.register
def _sweep(s: Sweep) -> str:
    """What a sweep spans; nothing is predicted for it."""
    axes = {"batch": s.batch, "seq": s.seq, "rank": s.rank}
    rows = [["methods", ", ".join(m.spec() for m in s.methods)], ["devices", ", ".join(d.slug for d in s.devices)]]
    rows += [[name, f"{_range(axis, str)} ({len(axis)})"] for name, axis in axes.items() if len(axis)]
    below = [f"{len(s):,} setups; to_frame() predicts them, the speed-up over {s.methods[0].spec()} beside each"]
    return _block(f"sweep over {s.model}", _table(["", ""], rows), below)


def _range(value: Any, text: Any) -> str:
    """A figure, or the least and the largest of an array."""
    if not isinstance(value, np.ndarray):
        return str(text(value))
    low, high = (text(x) for x in (value.min().item(), value.max().item()))
    return low if low == high else f"{low} to {high}"


class _Markup(str):
    """Text that is HTML already."""


class _Bar(_Markup):
    """A bar, which starts at the left of its cell."""


def _bold(text: str) -> _Markup:
    return _Markup(f"<strong>{_text(text)}</strong>")


def _bar(share: float) -> _Bar:
    style = f"display:inline-block;height:.7em;width:{abs(share) * WIDEST:.2f}em"
    return _Bar(f'<span style="{style};background:{ADDED if share > 0 else SAVED}"></span>')


def _text(text: str) -> str:
    return text if isinstance(text, _Markup) else escape(typeset(text))


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        told = (f'<{tag} style="{NAME if not i or isinstance(x, _Bar) else CELL}">{_text(x)}</{tag}>'
                for i, x in enumerate(cells))  # fmt: skip
        return f"<tr>{''.join(told)}</tr>"

    return f"<table><thead>{line('th', heads)}</thead><tbody>{''.join(line('td', row) for row in rows)}</tbody></table>"


def _block(title: str, table: str, below: Iterable[str], *, escaped: bool = False) -> str:
    head = title if escaped else _text(title)
    told = "".join(f'<div style="opacity:.7">{_text(line)}</div>' for line in below)
    return f"<div><div><strong>{head}</strong></div>{table}{told}</div>"
