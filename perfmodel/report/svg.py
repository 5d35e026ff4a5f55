"""Small building blocks of inline SVG: a canvas, scales, ticks."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10
from textwrap import wrap

Scale = Callable[[float], float]

GLYPH = 0.56  # mean width of a letter of a sans-serif face, in units of its size
TEXT = 13.0  # px, as in `theme.CHARTS`


@dataclass
class Canvas:
    """Shapes in a coordinate system of px; `title` is what a screen reader says."""

    width: float
    title: str
    height: float = 0.0
    shapes: list[str] = field(default_factory=list)

    def add(self, tag: str, content: str = "", **attributes: object) -> None:
        """One element; trailing underscores of attribute names are dropped, others become hyphens."""
        told = "".join(
            f' {name.rstrip("_").replace("_", "-")}="{_text(value)}"'
            for name, value in attributes.items()
            if value is not None
        )
        self.shapes.append(f"<{tag}{told}>{content}</{tag}>" if content else f"<{tag}{told}/>")

    def text(self, x: float, y: float, text: str, class_: str = "", anchor: str = "start", halo: bool = False) -> None:
        """Text whose baseline starts (or ends, or is centred) at a point; a halo keeps it off what lies below."""
        classes = " ".join(filter(None, (class_, "halo" if halo else "")))
        end = None if anchor == "start" else anchor
        self.add("text", escape(typeset(text)), x=x, y=y, class_=classes or None, text_anchor=end)

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        """A straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)

    def rect(self, x: float, y: float, width: float, height: float, class_: str, title: str = "") -> None:
        """A rectangle; `title` is shown on hovering."""
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.add("rect", tip, x=x, y=y, width=max(0.0, width), height=height, class_=class_)

    def path(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """A polyline."""
        told = " ".join(f"{'L' if i else 'M'}{_text(x)} {_text(y)}" for i, (x, y) in enumerate(points))
        self.add("path", d=told, class_=class_)

    def circle(self, x: float, y: float, r: float, class_: str, title: str = "") -> None:
        """A circle; `title` is shown on hovering."""
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.add("circle", tip, cx=x, cy=y, r=r, class_=class_)

    def place(self, other: "Canvas", x: float, y: float) -> None:
        """Another picture inside this one."""
        self.add("svg", "".join(other.shapes), x=x, y=y, width=other.width, height=other.height)

    def svg(self) -> str:
        """The picture as an element of a page; it fills the width of what holds it."""
        box = f"0 0 {_text(float(self.width))} {_text(float(self.height))}"
        label = escape(self.title, quote=True)
        return f'<svg class="chart" viewBox="{box}" role="img" aria-label="{label}">{"".join(self.shapes)}</svg>'

    def file(self, style: str) -> str:
        """The picture as a file of its own."""
        size = f'width="{_text(float(self.width))}" height="{_text(float(self.height))}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} '
        return self.svg().replace("<svg ", head, 1).replace(">", f"><style>{escape(style)}</style>", 1) + "\n"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return escape(str(value), quote=True)


def typeset(text: str) -> str:
    """Typographic signs for those of the terminal: micro, minus, times, dashes of ranges."""
    text = re.sub(r"(?<=\d) us\b", " µs", text)
    text = re.sub(r"(?<=\d)x(?=\d|\b)", "×", text)
    text = re.sub(r"(?<=\d) x (?=\d)", " × ", text)
    text = re.sub(r"(?<=\d) - (?=\d)", "\u2060–\u2060", text)  # word joiners: no line break inside a range
    return re.sub(r"(?<![\w,.-])-(?=\d)", "−", text)


def text_width(text: str) -> float:
    """About how wide a text is, px."""
    return len(text) * GLYPH * TEXT


def name_column(names: Sequence[str], width: float) -> float:
    """Width of a column that holds names beside a picture, px; 0 where they are too long and go above their bars."""
    needed = max(map(text_width, names)) + 14
    return needed if needed <= 0.42 * width else 0.0


def wrapped(text: str, width: float, size: float = TEXT) -> list[str]:
    """A text in lines of at most about `width` px."""
    return wrap(text, int(width / (GLYPH * size)))


def linear_scale(low: float, high: float, start: float, end: float) -> Scale:
    """A linear scale from [low, high] to px."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def log(low: float, high: float, start: float, end: float) -> Scale:
    """A logarithmic scale from [low, high] to px."""
    return lambda value: start + log10(value / low) / log10(high / low) * (end - start)


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` + 1 round values between two bounds, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10.0 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten between two bounds, thinned out to at most `most`."""
    first, last = ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9)
    every = max(1, ceil((last - first + 1) / most))
    return [10.0**i for i in range(first, last + 1) if (i - first) % every == 0]


def doublings(low: float, high: float, most: int = 8) -> list[int]:
    """Powers of two between two bounds, thinned out to at most `most`."""
    powers = [2**i for i in range(64) if low <= 2**i <= high]
    return powers[:: max(1, ceil(len(powers) / most))]
