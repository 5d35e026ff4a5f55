"""The waterfall: from one step time to another, part by part."""

from dataclasses import dataclass

from ... import units
from ...questions.explanation import Bar, Explanation
from ..svg import Canvas, linear_scale, name_column, text_width, ticks
from . import WIDE

ROW, BAR = 28, 16  # px
SMALL = 0.004  # of the longer step: parts that change by less are summed up


@dataclass(frozen=True)
class _Row:
    name: str
    start: float
    end: float
    kind: str  # total, saved or added
    told: str


def main_bars(e: Explanation, small: float) -> tuple[list[Bar], list[Bar]]:
    """The bars worth a line of their own, and those that change by less than a share `small` of the longer step."""
    least = small * max(e.before.total, e.after.total)
    return (
        [bar for bar in e.waterfall if abs(bar.difference) >= least],
        [bar for bar in e.waterfall if abs(bar.difference) < least],
    )


def _rows(e: Explanation) -> list[_Row]:
    """Savings first, then what is added, so that the running sum goes down once and up once."""
    shown, rest = main_bars(e, SMALL)
    steps = [(bar.name, bar.difference) for bar in sorted(shown, key=lambda bar: bar.difference)]
    remainder = sum(bar.difference for bar in rest)
    if rest and abs(remainder) > 0.0005 * max(e.before.total, e.after.total):
        steps.append(("everything else", remainder))
    first, last = e.labels
    rows = [_Row(first, 0.0, e.before.total, "total", units.seconds(e.before.total))]
    at = e.before.total
    for name, change in steps:
        rows.append(_Row(name, at, at + change, "saved" if change < 0 else "added", units.signed(change)))
        at += change
    rows.append(_Row(last, 0.0, e.after.total, "total", units.seconds(e.after.total)))
    return rows


def waterfall(e: Explanation, width: int = WIDE) -> Canvas:
    """The picture; on a narrow page names stand above their bars."""
    rows = _rows(e)
    left = name_column([row.name for row in rows], width) if width >= WIDE else 0.0
    height = ROW if left else ROW + 16
    canvas = Canvas(width, f"Waterfall from {e.labels[0]} to {e.labels[1]}", len(rows) * height + 26)
    longest = max(max(row.start, row.end) for row in rows)
    x = linear_scale(0.0, longest, left, width - max(text_width(row.told) for row in rows) - 18)
    _axis(canvas, x, longest, len(rows) * height, 5 if width >= WIDE else 3)
    for i, row in enumerate(rows[:-1]):
        below = (i + 1) * height - ROW / 2 + BAR / 2
        canvas.line(x(row.end), below, x(row.end), below + height - BAR, "rule")
    for i, row in enumerate(rows):
        top = i * height
        middle = top + height - ROW / 2
        low, high = sorted((x(row.start), x(row.end)))
        canvas.rect(low, middle - BAR / 2, max(1.0, high - low), BAR, f"f-{row.kind}", f"{row.name}: {row.told}")
        canvas.text(high + 6, middle + 4.5, row.told, "strong" if row.kind == "total" else "", halo=True)
        strong = "strong" if row.kind == "total" else ""
        canvas.text(0, middle + 4.5 if left else top + 13, row.name, strong, halo=not left)
    return canvas


def _axis(canvas: Canvas, x: object, longest: float, bottom: float, most: int) -> None:
    assert callable(x)
    for value in ticks(0.0, longest, most):
        canvas.line(x(value), 0, x(value), bottom, "grid")
        anchor = "middle" if value else "start"
        canvas.text(x(value), bottom + 18, units.seconds(value), "muted", anchor)
