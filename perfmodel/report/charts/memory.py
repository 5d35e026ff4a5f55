"""Peak memory of several methods against what the device has."""

from ... import units
from ...prediction.predict import Prediction
from ..svg import Canvas, linear_scale, name_column, text_width
from . import WIDE

PARTS = (("weights", "blue"), ("gradients", "sky"), ("optimizer", "purple"), ("activations", "orange"))
ROW, BAR, GAP = 30, 18, 6  # px


def memory(predictions: list[Prediction], labels: list[str], capacity: float, width: int = WIDE) -> Canvas:
    """Stacked bars, one a method; a line marks the device's memory."""
    left = name_column(labels, width) if width >= WIDE else 0.0
    height = ROW if left else ROW + 16
    canvas = Canvas(width, "Peak memory by method", len(predictions) * height + 30)
    most = max(capacity, *(p.memory.peak for p in predictions))
    x = linear_scale(0.0, most, left, width - 62)
    for i, (p, label) in enumerate(zip(predictions, labels, strict=True)):
        middle = i * height + height - ROW / 2
        canvas.text(0, middle + 4.5 if left else i * height + 13, label)
        at = 0.0
        for name, colour in PARTS:
            size = float(getattr(p.memory, name))
            tip = f"{label}, {name}: {units.nbytes(size)}"
            canvas.rect(x(at), middle - BAR / 2, x(at + size) - x(at), BAR, f"f-{colour}", tip)
            at += size
        told = units.nbytes(p.memory.peak)
        canvas.text(_beside(x(at), x(capacity), text_width(told)), middle + 4.5, told, "strong", halo=True)
    bottom = len(predictions) * height
    canvas.line(x(capacity), 0, x(capacity), bottom + 6, "line s-ink")
    anchor = "end" if x(capacity) > width - 90 else "middle"
    canvas.text(x(capacity), bottom + 22, f"device: {units.nbytes(capacity)}", "muted", anchor)
    return canvas


def _beside(bar: float, line: float, wide: float) -> float:
    """Where a text of a width begins: behind its bar, and not on the line."""
    start = bar + GAP
    return line + GAP if bar <= line < start + 1.2 * wide + GAP else start
