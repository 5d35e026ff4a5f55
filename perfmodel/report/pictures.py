"""`perfmodel explain --plot FILE.svg`: waterfall and rooflines in one picture."""

from pathlib import Path

from .. import units
from ..errors import UserError
from ..questions.explanation import Explanation
from ..questions.roofline import roof
from ..resources import write_text
from .charts import WIDE
from .charts.roofline import legend, roofline
from .charts.waterfall import waterfall
from .figures import headline
from .svg import Canvas, text_width, wrapped
from .theme import charts_on_light_ground

MARGIN, GAP, LINE = 28.0, 26.0, 20.0  # px


def draw_picture(e: Explanation, path: Path) -> None:
    """Write the picture.

    Raises:
        UserError: the file is no SVG, or cannot be written.
    """
    if path.suffix.lower() != ".svg":
        raise UserError(f"{path}: pictures are SVG; name the file {path.with_suffix('.svg').name}")
    write_text(path, draw_explanation(e))


def draw_explanation(e: Explanation) -> str:
    """The answer, the waterfall, and the roofline of either step."""
    page = Canvas(WIDE + 2 * MARGIN, e.answer)
    at = MARGIN + 4
    for line in wrapped(e.answer, WIDE):
        page.text(MARGIN, at, line, "strong")
        at += LINE
    page.text(MARGIN, at, headline(e.a), "muted")
    fall = waterfall(e)
    page.place(fall, MARGIN, at + GAP)
    at += GAP + fall.height + GAP
    for of, label in zip("ab", e.labels, strict=True):
        at = _roofline(page, e, of, label + e.of_longest, at + LINE) + GAP
    page.height = at
    page.shapes.insert(0, f'<rect width="{page.width:g}" height="{page.height:g}" class="f-ground"/>')
    return page.file(charts_on_light_ground())


def _roofline(page: Canvas, e: Explanation, of: str, label: str, at: float) -> float:
    """One step's roofline below its legend; returns where it ends."""
    kernels = e.kernels(of)
    page.text(MARGIN, at, f"Kernels of {label} by time", "strong")
    at += LINE
    x = MARGIN
    for name, colour, seconds in legend(kernels):
        told = f"{name} {units.seconds(seconds)}"
        if x + 18 + text_width(told) > MARGIN + WIDE:
            x, at = MARGIN, at + LINE
        page.circle(x + 6, at - 4.5, 5, f"bubble f-{colour} s-{colour}")
        page.text(x + 16, at, told)
        x += 34 + text_width(told)
    chart = roofline(kernels, roof(e.on, kernels), f"Roofline of {label}")
    page.place(chart, MARGIN, at + 10)
    return at + 10 + chart.height
