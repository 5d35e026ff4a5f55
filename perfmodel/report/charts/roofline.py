"""The roofline: the kernels of a step under the device's bandwidth and peaks, as large as the time that they take."""

from dataclasses import dataclass
from math import hypot, sqrt

from ... import units
from ...questions.roofline import Roof, RooflineKernel
from ..svg import Canvas, Scale, decades, log
from . import WIDE
from .labels import Box, LabelPlace, Labels, Segment, places_around

LEAST = 0.002  # of the step: shorter kernels are not drawn
LARGEST = 26.0  # px, radius of a kernel that takes half the step
NAMED, NAMED_NARROW, NAMED_LEAST = 5, 3, 0.03  # kernels with their names beside them, at most; of the step, at least
NEAR = 40.0  # px between kernels of one name that share it
GROUPS = {  # part -> (its group in the legend, colour)
    "gemm_forward": ("GEMMs of the base model", "blue"),
    "gemm_input_grad": ("GEMMs of the base model", "blue"),
    "gemm_weight_grad": ("GEMMs of the base model", "blue"),
    "attention": ("attention", "green"),
    "recompute": ("recomputed forward", "sky"),
    "adapter_gemm": ("adapter GEMMs", "red"),
    "adapter_pointwise": ("adapter casts and pointwise", "orange"),
    "optimizer": ("optimizer and clipping", "purple"),
    "clipping": ("optimizer and clipping", "purple"),
}
OTHER = ("norms, activations, loss and the rest", "grey")


def group(part: str) -> tuple[str, str]:
    """A part's group in the legend, and its colour."""
    return GROUPS.get(part, OTHER)


def roofline(kernels: list[RooflineKernel], roof: Roof, title: str, width: int = WIDE) -> Canvas:
    """The picture of one step; log-log."""
    total = sum(k.seconds for k in kernels)
    shown = [k for k in kernels if k.seconds >= LEAST * total]
    narrow = width < WIDE
    height = 0.82 * width if narrow else 0.5 * width
    canvas = Canvas(width, title, height)
    low_x, high_x = _span([k.intensity for k in shown] + [roof.ridge(dtype) for dtype in roof.peaks], 3.0)
    low_y, high_y = _span([k.rate for k in shown] + list(roof.peaks.values()), 2.0)
    x = log(low_x, high_x, 58, width - 8)
    y = log(low_y, high_y, height - 40, 20)  # over the highest peak stands its name
    _axes(canvas, x, y, (low_x, high_x), (low_y, high_y), narrow)
    bubbles = [
        _Bubble(
            k, x(k.intensity), y(k.rate), max(2.0, LARGEST * sqrt(2 * k.seconds / total) * (0.7 if narrow else 1.0))
        )
        for k in sorted(shown, key=lambda k: -k.seconds)
    ]
    for b in bubbles:
        colour = group(b.kernel.part)[1]
        canvas.circle(b.x, b.y, b.radius, f"bubble f-{colour} s-{colour}", _tip(b.kernel, total))
    lines = _roof(canvas, roof, x, y, (low_x, high_x), (low_y, high_y))
    unit = Box(x(low_x), y(high_y) - 2, x(low_x) + 56, y(high_y) + 16)  # where `_axes` writes it
    frame = Box(x(low_x), 0.0, width, y(low_y))
    labels = Labels(canvas, frame, list(lines), [b.bounds for b in bubbles], [unit])
    _name_roof(labels, roof, lines)
    _name_kernels(labels, bubbles, total, NAMED_NARROW if narrow else NAMED)
    return canvas


@dataclass(frozen=True)
class _Bubble:
    """A kernel where it is drawn, px."""

    kernel: RooflineKernel
    x: float
    y: float
    radius: float

    @property
    def bounds(self) -> Box:
        """What it covers."""
        return Box(self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


def _name_kernels(labels: Labels, bubbles: list[_Bubble], total: float, most: int) -> None:
    """Names and shares of the largest kernels; neighbours of one name and colour have it together."""
    named: list[list[_Bubble]] = []
    for b in bubbles:
        alike = (kernels for kernels in named if _is_alike(kernels[0], b))
        found = next(alike, None)
        if found is None:
            named.append([b])
        else:
            found.append(b)
    shares = [(sum(b.kernel.seconds for b in kernels) / total, kernels[0]) for kernels in named]
    for share, b in sorted(shares, key=lambda item: -item[0])[:most]:
        if share >= NAMED_LEAST:
            labels.add(f"{label_name(b.kernel)} {units.percent(share)}", "", places_around(b.x, b.y, b.radius))


def _is_alike(a: _Bubble, b: _Bubble) -> bool:
    same = (label_name(a.kernel), group(a.kernel.part)) == (label_name(b.kernel), group(b.kernel.part))
    return same and hypot(a.x - b.x, a.y - b.y) < NEAR


def short_name(k: RooflineKernel) -> str:
    """A kernel's name without what all have."""
    return k.name.removeprefix("_").partition(".")[0].replace("scaled_dot_product_", "")


def label_name(k: RooflineKernel) -> str:
    """The shortest name of a kernel, for its label."""
    return short_name(k).rpartition("::")[2].rstrip("_")


def legend(kernels: list[RooflineKernel]) -> list[tuple[str, str, float]]:
    """(group, colour, seconds) of a step, the longest first."""
    totals: dict[tuple[str, str], float] = {}
    for k in kernels:
        totals[group(k.part)] = totals.get(group(k.part), 0.0) + k.seconds
    return [(name, colour, seconds) for (name, colour), seconds in sorted(totals.items(), key=lambda item: -item[1])]


def _span(values: list[float], margin: float) -> tuple[float, float]:
    return min(values) / margin, max(values) * margin


def _tip(k: RooflineKernel, total: float) -> str:
    share = units.percent(k.seconds / total)
    return (
        f"{k.name} {k.dtype} {k.shapes}: {k.calls:,} calls, {units.seconds(k.seconds)} ({share} of the kernels' time), "
        f"{units.count(k.rate, 'FLOP/s')}, {k.intensity:.3g} FLOP/B"
    )


def _axes(canvas: Canvas, x: Scale, y: Scale, xs: tuple[float, float], ys: tuple[float, float], narrow: bool) -> None:
    bottom, left = y(ys[0]), x(xs[0])
    for value in decades(*xs, 4 if narrow else 7):
        canvas.line(x(value), y(ys[1]), x(value), bottom, "grid")
        canvas.text(x(value), bottom + 17, f"{value:,g}", "muted", "middle")
    for value in decades(*ys, 5):
        canvas.line(left, y(value), x(xs[1]), y(value), "grid")
        canvas.text(
            left - 6, y(value) + 4, f"{units.count(value, '').replace('.00', '').replace('.0', '')}", "muted", "end"
        )
    canvas.text((left + x(xs[1])) / 2, bottom + 34, "FLOP per byte of memory traffic", "muted", "middle")
    canvas.text(left + 6, y(ys[1]) + 12, "FLOP/s", "muted", halo=True)


def _roof(
    canvas: Canvas, roof: Roof, x: Scale, y: Scale, xs: tuple[float, float], ys: tuple[float, float]
) -> list[Segment]:
    """The slope of the bandwidth up to the highest peak, and a flat line per peak; where they are drawn."""
    start = max(xs[0], ys[0] / roof.bandwidth)
    ridge = roof.ridge(next(iter(roof.peaks)))
    lines = [((x(start), y(start * roof.bandwidth)), (x(ridge), y(ridge * roof.bandwidth)))]
    lines += [((x(roof.ridge(dtype)), y(peak)), (x(xs[1]), y(peak))) for dtype, peak in roof.peaks.items()]
    for line in lines:
        canvas.path(line, "line s-ink")
    return lines


def _name_roof(labels: Labels, roof: Roof, lines: list[Segment]) -> None:
    """The bandwidth beside its slope; over each peak, or under it, its dtype and FLOP/s (the axis has the unit)."""
    (x1, y1), (x2, y2) = lines[0]
    along = [(x1 + t * (x2 - x1), y1 + t * (y2 - y1)) for t in (0.5, 0.4, 0.6, 0.7, 0.3)]
    labels.add(units.count(roof.bandwidth, "B/s"), "strong", [LabelPlace(x - 10, y - 8, "end") for x, y in along])
    for (dtype, peak), ((left, y), (right, _)) in zip(roof.peaks.items(), lines[1:], strict=True):
        near = [
            LabelPlace(x, y + down, end) for down in (-8.0, 17.0) for x, end in ((right, "end"), (left + 8, "start"))
        ]
        below = [LabelPlace(right, y + down, "end", (right, y)) for down in range(34, 130, 16)]
        labels.add(f"{dtype} {units.count(peak, '')}", "strong", [*near, *below])
