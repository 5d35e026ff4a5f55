"""Where the labels of a picture go: off its lines and off each other, and off its shapes where there is room."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import hypot

from ..svg import Canvas, text_width

Point = tuple[float, float]
Segment = tuple[Point, Point]
ASCENT, DESCENT, HALO = 10.0, 3.0, 3.0  # px of a text over and under its baseline, and of its halo around
WIDER, BOLD = 1.2, 1.15  # a text is at most so much wider than `text_width` says: fonts differ
DIRECTIONS = ((-1, 1), (1, 1), (-1, -1), (1, -1), (1, 0.3), (1, -0.3), (-1, 0.3), (-1, -0.3))  # right, down
ACROSS = 300.0  # px² of a shape that are as bad to cover as a leader over a line


@dataclass(frozen=True)
class Box:
    """A rectangle, px; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def shared(self, other: "Box") -> float:
        """The area that two boxes share, px²."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, wide) * max(0.0, tall)

    def within(self, other: "Box") -> bool:
        """Whether it lies in another."""
        return (
            other.left <= self.left and self.right <= other.right
            and other.top <= self.top and self.bottom <= other.bottom
        )  # fmt: skip

    def crossed(self, line: Segment) -> bool:
        """Whether a straight line touches it: their bounds overlap, and its corners are not all on one side."""
        (x1, y1), (x2, y2) = line
        if max(x1, x2) < self.left or min(x1, x2) > self.right or max(y1, y2) < self.top or min(y1, y2) > self.bottom:
            return False
        sides = [_side(line, (x, y)) for x in (self.left, self.right) for y in (self.top, self.bottom)]
        return min(sides) <= 0 <= max(sides)


@dataclass(frozen=True)
class LabelPlace:
    """A place for a label: its baseline's start, middle or end, and from where a thin line leads to it, if any does."""

    x: float
    y: float
    anchor: str = "start"
    leader: Point | None = None


def places_around(x: float, y: float, radius: float) -> Iterable[LabelPlace]:
    """Places around a circle: beside it, over and under it, then farther away with a line that leads there."""
    yield LabelPlace(x + radius + HALO + 2, y + 4)
    yield LabelPlace(x - radius - HALO - 2, y + 4, "end")
    yield LabelPlace(x, y - radius - HALO - 4, "middle")
    yield LabelPlace(x, y + radius + HALO + ASCENT, "middle")
    for away in (16.0, 34.0, 56.0, 84.0, 120.0):
        for right, down in DIRECTIONS:
            edge = radius / hypot(right, down)
            at = (x + right * edge, y + down * edge)
            yield LabelPlace(
                at[0] + right * (away + HALO), at[1] + down * away + 4, "start" if right > 0 else "end", at
            )


@dataclass
class Labels:
    """Labels on a canvas.

    Attributes:
        frame: where they stay.
        lines: which none of them touches.
        shapes: which they avoid where they can.
    """

    canvas: Canvas
    frame: Box
    lines: list[Segment]
    shapes: list[Box]
    placed: list[Box] = field(default_factory=list)

    def add(self, text: str, class_: str, spots: Iterable[LabelPlace]) -> bool:
        """Write a text at the first of its best places; False where each is on a line or a label."""
        found = [(spot, _box(text, class_, spot)) for spot in spots]
        free = [place for place in found if self._is_free(*place)]
        if not free:
            return False
        spot, box = min(free, key=lambda place: self._cost(*place))
        for lead in _leads(spot, box):
            self.lines.append(lead)
            self.canvas.line(*lead[0], *lead[1], "leader")
        self.canvas.text(spot.x, spot.y, text, class_, spot.anchor, halo=True)
        self.placed.append(box)
        return True

    def _is_free(self, spot: LabelPlace, box: Box) -> bool:
        return (
            box.within(self.frame)
            and not any(box.crossed(line) for line in self.lines)
            and not any(box.shared(other) for other in self.placed)
            and not any(other.crossed(lead) for other in self.placed for lead in _leads(spot, box))
        )

    def _cost(self, spot: LabelPlace, box: Box) -> float:
        across = sum(_meet(lead, line) for lead in _leads(spot, box) for line in self.lines)
        return sum(box.shared(shape) for shape in self.shapes) + ACROSS * across


def _box(text: str, class_: str, spot: LabelPlace) -> Box:
    wide = text_width(text) * (BOLD if class_ == "strong" else WIDER)
    left = spot.x - {"start": 0.0, "middle": wide / 2, "end": wide}[spot.anchor]
    return Box(left - HALO, spot.y - ASCENT - HALO, left + wide + HALO, spot.y + DESCENT + HALO)


def _leads(spot: LabelPlace, box: Box) -> list[Segment]:
    """The line to a label, if one leads there: to the middle of the side that faces it."""
    if spot.leader is None:
        return []
    return [(spot.leader, (box.right if spot.anchor == "end" else box.left, spot.y - 4))]


def _side(line: Segment, point: Point) -> float:
    """On which side of a line a point lies: the sign of the cross product."""
    (x1, y1), (x2, y2) = line
    return (x2 - x1) * (point[1] - y1) - (y2 - y1) * (point[0] - x1)


def _meet(a: Segment, b: Segment) -> bool:
    """Whether two straight lines cross each other."""
    return _side(a, b[0]) * _side(a, b[1]) < 0 and _side(b, a[0]) * _side(b, a[1]) < 0
