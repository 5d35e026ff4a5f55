"""The roofline: the kernels of a step under the device's bandwidth and peaks, as large as the time that they take."""

from math import sqrt

from ... import units
from ...questions.roofline import Roof, RooflineKernel
from ..svg import Canvas, Scale, decades, log
from . import WIDE

LEAST = 0.002  # of the step: shorter kernels are not drawn
LARGEST = 26.0  # px, radius of a kernel that takes half the step
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
    y = log(low_y, high_y, height - 40, 10)
    _axes(canvas, x, y, (low_x, high_x), (low_y, high_y), narrow)
    for k in sorted(shown, key=lambda k: -k.seconds):
        radius = max(2.0, LARGEST * sqrt(2 * k.seconds / total) * (0.7 if narrow else 1.0))
        colour = group(k.part)[1]
        canvas.circle(x(k.intensity), y(k.rate), radius, f"bubble f-{colour} s-{colour}", _tip(k, total))
    _roof(canvas, roof, x, y, (low_x, high_x), (low_y, high_y))
    return canvas


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


def _roof(canvas: Canvas, roof: Roof, x: Scale, y: Scale, xs: tuple[float, float], ys: tuple[float, float]) -> None:
    """The slope of the bandwidth up to the highest peak, and a flat line per peak."""
    start = max(xs[0], ys[0] / roof.bandwidth)
    highest = next(iter(roof.peaks))
    ridge = roof.ridge(highest)
    canvas.path([(x(start), y(start * roof.bandwidth)), (x(ridge), y(ridge * roof.bandwidth))], "line s-ink")
    slope = f"{units.count(roof.bandwidth, 'B/s')}"
    at = sqrt(start * ridge)
    canvas.text(x(at) - 8, y(at * roof.bandwidth) - 6, slope, "strong", "end", halo=True)
    for i, (dtype, peak) in enumerate(roof.peaks.items()):
        canvas.path([(x(roof.ridge(dtype)), y(peak)), (x(xs[1]), y(peak))], "line s-ink")
        told = f"{dtype} {units.count(peak, '')}"  # short, the axis has the unit: kernels lie around it
        canvas.text(x(xs[1]), y(peak) + (17 if i else -6), told, "strong", "end", halo=True)
