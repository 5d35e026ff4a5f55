"""Predicted against measured, as inline SVG: step times and speed-ups."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, log10

from perfmodel.report.charts import WIDE
from perfmodel.report.svg import Canvas, Scale, log

LEFT, BOTTOM, TOP, RIGHT = 64.0, 44.0, 10.0, 16.0  # px around the plot
ROUND = ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,))  # ticks of a decade, ever fewer


@dataclass(frozen=True)
class ParityPoint:
    """A figure as measured and as predicted; `tip` is shown on hovering."""

    measured: float
    predicted: float
    colour: str
    tip: str


def parity_svg(
    points: Sequence[ParityPoint], title: str, what: str, told: Callable[[float], str], band: float, width: int = WIDE
) -> Canvas:
    """A log-log plot with the diagonal and a band of `band` relative error around it.

    Args:
        what: the name of the figure, for the axes.
        told: how a value is written at a tick.
    """
    height = 0.62 * width if width >= WIDE else 0.9 * width
    canvas = Canvas(width, title, height)
    figures = [f for p in points for f in (p.measured, p.predicted)]
    low, high = min(figures) / 1.2, max(figures) * 1.2
    x, y = log(low, high, LEFT, width - RIGHT), log(low, high, height - BOTTOM, TOP)
    _ground(canvas, x, y, (low, high), what, told)
    for factor, style in ((1 + band, "rule"), (1 / (1 + band), "rule"), (1.0, "line s-grey")):
        start, end = max(low, low / factor), min(high, high / factor)
        canvas.path([(x(start), y(start * factor)), (x(end), y(end * factor))], style)
    for p in points:
        canvas.circle(x(p.measured), y(p.predicted), 5, f"bubble f-{p.colour} s-{p.colour}", p.tip)
    return canvas


def _ground(
    canvas: Canvas, x: Scale, y: Scale, span: tuple[float, float], what: str, told: Callable[[float], str]
) -> None:
    left, right, bottom, top = x(span[0]), x(span[1]), y(span[0]), y(span[1])
    for value in marks(*span, most=7 if canvas.width >= WIDE else 5):
        canvas.line(x(value), top, x(value), bottom, "grid")
        canvas.line(left, y(value), right, y(value), "grid")
        canvas.text(x(value), bottom + 17, told(value), "muted", "middle")
        canvas.text(left - 6, y(value) + 4, told(value), "muted", "end")
    canvas.text((left + right) / 2, bottom + 36, f"measured {what}", "muted", "middle")
    canvas.text(left + 8, top + 14, f"predicted {what}", "muted", halo=True)


def marks(low: float, high: float, most: int) -> list[float]:
    """Round values between two bounds for a logarithmic axis, as many as there is room for."""
    decades = range(floor(log10(low)), floor(log10(high)) + 1)
    for steps in ROUND:
        found = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(found) <= most:
            break
    return found
