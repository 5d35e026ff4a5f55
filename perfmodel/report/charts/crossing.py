"""Speed-up over the baseline along batch, sequence length or rank, one line a method."""

from itertools import groupby

from ...questions.crossover import Crossover
from ...questions.speedup import SAME
from ..svg import Canvas, Scale, doublings, linear_scale, log
from . import WIDE

COLOURS = ("blue", "red", "green", "purple", "orange", "sky", "grey")
AXES = {
    "batch": "Batch, samples", "seq": "Sequence, tokens per sample", "r": "Rank", "targets": "Number of target layers",
    "k": "Blocks that train", "gamma": "Blocks that train at a time", "block_size": "Block size",
}  # fmt: skip
FEW = 12  # values that are all marked, evenly spaced
TICKS = (0.1, 0.2, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)


def crossing(lines: list[Crossover], labels: list[str], width: int = WIDE) -> Canvas:
    """The picture of one axis; a line is dotted where the method does not fit."""
    narrow = width < WIDE
    height = 0.62 * width if narrow else 0.36 * width
    axis = lines[0].axis
    canvas = Canvas(width, f"Speed-up over the baseline along {axis}", height)
    values = [v for line in lines for v in line.values]
    ratios = [r for line in lines for r in line.ratio]
    xs = (min(values), max(values) if max(values) > min(values) else min(values) + 1)
    ys = (min(*ratios, 1.0) / 1.12, max(*ratios, 1.0) * 1.12)
    x = linear_scale(*xs, 44, width - 14) if len(set(values)) <= FEW and axis == "targets" else log(*xs, 44, width - 14)
    y = log(*ys, height - 40, 8)
    marks = sorted(set(values)) if len(set(values)) <= FEW else doublings(*xs, 6 if narrow else 10)
    _ground(canvas, x, y, xs, ys, AXES.get(axis, axis), marks)
    for i, (line, label) in enumerate(zip(lines, labels, strict=True)):
        _line(canvas, line, label, COLOURS[i % len(COLOURS)], x, y)
    return canvas


def _ground(
    canvas: Canvas, x: Scale, y: Scale, xs: tuple[float, float], ys: tuple[float, float], name: str, marks: list[int]
) -> None:
    """Grid, axis and the band in which two step times count as the same."""
    top, bottom, left, right = y(ys[1]), y(ys[0]), x(xs[0]), x(xs[1])
    upper, lower = y(min(1 + SAME, ys[1])), y(max(1 / (1 + SAME), ys[0]))
    canvas.rect(left, upper, right - left, lower - upper, "f-grid")
    for value in marks:
        canvas.line(x(value), top, x(value), bottom, "grid")
        canvas.text(x(value), bottom + 17, f"{value:,}", "muted", "middle")
    for ratio in (t for t in TICKS if ys[0] <= t <= ys[1]):
        canvas.line(left, y(ratio), right, y(ratio), "rule" if ratio == 1 else "grid")
        canvas.text(left - 6, y(ratio) + 4, f"{ratio:g}x", "muted", "end")
    canvas.text((left + right) / 2, bottom + 34, name, "muted", "middle")


def _line(canvas: Canvas, c: Crossover, label: str, colour: str, x: Scale, y: Scale) -> None:
    points = [(x(v), y(r)) for v, r in zip(c.values, c.ratio, strict=True)]
    start = 0
    for fits, group in groupby(c.fits_b):
        length = len(list(group))
        stretch = points[max(0, start - 1) : start + length]  # joined to the stretch before
        canvas.path(stretch, f"line s-{colour}{'' if fits else ' dashed'}")
        start += length
    i = c.values.index(c.here) if c.here in c.values else None
    if i is not None:
        canvas.circle(*points[i], 4.5, f"f-{colour}", f"{label}: {c.ratio[i]:.2f}x at {c.axis} {c.here:,}")
