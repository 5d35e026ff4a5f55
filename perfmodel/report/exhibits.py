"""The pictures and tables of a page, as plain values for its template."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import units
from ..devices.host import Host
from ..devices.profile import DeviceProfile
from ..prediction.predict import Prediction
from ..questions.anatomy import Anatomy
from ..questions.crossover import Crossover, speedup_plane
from ..questions.explanation import Explanation, pair_of
from ..questions.roofline import Roof, RooflineKernel, roof
from . import crossings as words
from .charts import NARROW, WIDE
from .charts.breakeven import BreakEven, breakeven
from .charts.crossing import AXES, COLOURS, crossing
from .charts.memory import PARTS, memory
from .charts.roofline import legend, roofline, short_name
from .charts.waterfall import waterfall
from .figures import outside_told, phase_table
from .svg import Canvas, doublings

LONGEST = 8  # kernels listed below a roofline
CELLS = 9  # of a side of a heat map, at most: a phone shows as many
ROOF_TOLD = (
    "Area: time, and in percent its share. Matrix products and attention are placed by their FLOPs, all other "
    "kernels by one operation per element. Above the slope: operands that stay in the cache. FLOPs of causal "
    "attention include the masked half, as FlopCounterMode counts them, so that it may pass the peak."
)


@dataclass(frozen=True)
class Picture:
    """A picture for a desk and for a phone, as SVG."""

    wide: str
    narrow: str


def both_forms(draw: Callable[[int], Canvas]) -> Picture:
    """Both forms of a picture that draws itself for a width."""
    return Picture(draw(WIDE).svg(), draw(NARROW).svg())


def waterfalls(explained: list[Explanation]) -> dict[str, Any]:
    """One waterfall a method."""
    return {
        "falls": [
            {"label": e.labels[1], "picture": both_forms(lambda width, e=e: waterfall(e, width))}  # type: ignore[misc]
            for e in explained
        ]
    }


def limit_exhibits(explained: list[Explanation], chosen: Explanation) -> dict[str, Any]:
    """The phases of every method, and the rooflines of the baseline and of a chosen method."""
    steps = [(explained[0].labels[0], explained[0].before), *((e.labels[1], e.after) for e in explained)]
    roofs = [_roofline(chosen, of, label + chosen.of_longest) for of, label in zip("ab", chosen.labels, strict=True)]
    return {"phases": _phases(steps), "roofs": roofs, "roof_told": ROOF_TOLD}


def _phases(steps: list[tuple[str, Anatomy]]) -> dict[str, Any]:
    phases = [(label, name, p) for label, step in steps for name, p in step.phases.items()]
    unit, limits, told = phase_table([p for *_, p in phases])
    rows: list[list[str]] = []
    for i, (label, name, p) in enumerate(phases):
        if not i or phases[i - 1][0] != label:
            rows.append([label])
        rows.append([name, p.regime, *told[i]])
    heads = ["phase", "regime", f"time, {unit}", *limits, "waits", "at peak", "at bandwidth", "host"]
    return {"heads": heads, "rows": rows, "style": "left2 grouped", "told": outside_told(limits)}


def _roofline(e: Explanation, of: str, label: str) -> dict[str, Any]:
    kernels = e.kernels(of)
    over = roof(e.on, kernels)
    total = sum(k.seconds for k in kernels)
    return {
        "label": label,
        "picture": both_forms(lambda width: roofline(kernels, over, f"Roofline of {label}", width)),
        "legend": [{"name": n, "colour": c, "told": units.seconds(s)} for n, c, s in legend(kernels)],
        "kernels": _longest(kernels, over, total),
    }


def _longest(kernels: list[RooflineKernel], over: Roof, total: float) -> dict[str, Any]:
    """The kernels that take the most time, with what they reach of their roof."""
    shown = kernels[:LONGEST]
    *seconds, unit = units.alike([k.seconds for k in shown])
    rows = [
        [short_name(k), k.shapes, k.dtype, f"{k.calls:,}", told, units.percent(k.seconds / total), _reached(k, over)]
        for k, told in zip(shown, seconds, strict=True)
    ]
    heads = ["longest kernels", "operands", "dtype", "calls", f"time, {unit}", "share", "of its roof"]
    return {"heads": heads, "rows": rows, "style": "left3"}


def _reached(k: RooflineKernel, over: Roof) -> str:
    """Share of what bandwidth and peak allow at its intensity."""
    allowed = min(over.bandwidth * k.intensity, over.peaks.get(k.dtype, float("inf")))
    return units.percent(k.rate / allowed)


def memories(predictions: list[Prediction], labels: list[str], on: DeviceProfile) -> dict[str, Any]:
    """Peak memory of every method, as bars and in figures."""
    capacity = on.capacity
    rows = [
        [
            label, *(units.nbytes(getattr(p.memory, name)) for name, _ in PARTS), units.nbytes(p.memory.peak),
            f"{units.nbytes(p.memory.low)} to {units.nbytes(p.memory.high)}", "yes" if p.fits else "no",
        ]
        for p, label in zip(predictions, labels, strict=True)
    ]  # fmt: skip
    heads = ["", *(name for name, _ in PARTS), "peak", "reserved", "fits"]
    return {
        "memory": {"picture": both_forms(lambda width: memory(predictions, labels, capacity, width))},
        "memory_legend": [
            {"name": "activations and temporaries" if name == "activations" else name, "colour": colour, "told": ""}
            for name, colour in PARTS
        ],
        "memory_table": {"heads": heads, "rows": rows, "style": ""},
    }


def crossings(explained: list[Explanation]) -> dict[str, Any]:
    """One picture an axis, all methods that have it in it, and in words what it shows."""
    by_axis: dict[str, list[tuple[Explanation, Crossover]]] = {}
    for e in explained:
        for c in e.crossovers:
            by_axis.setdefault(c.axis, []).append((e, c))
    return {"crossings": [_axis(axis, lines) for axis, lines in by_axis.items()]}


def heat_map(e: Explanation, by: Host) -> dict[str, Any]:
    """The speed-up over batch and length together, where it was looked for along both."""
    ends = {c.axis: (c.values[0], c.values[-1]) for c in e.crossovers}
    if not {"batch", "seq"} <= set(ends):
        return {"heat_map": None}
    step = e.a.setup.seq_multiple
    batch = doublings(*ends["batch"], 64)[-CELLS:]
    seq = [step * n for n in doublings(ends["seq"][0] / step, ends["seq"][1] / step, 64)[-CELLS:]]
    if min(len(batch), len(seq)) < 2:
        return {"heat_map": None}
    speedup, fits = speedup_plane(pair_of(e.a, e.b, e.on, by), batch, seq)
    found = BreakEven(batch, seq, speedup, fits, e.labels, (int(e.a.setup.batch), int(e.a.setup.seq)))
    return {"heat_map": {"label": e.labels[1], "picture": both_forms(lambda width: breakeven(found, width))}}


def _axis(axis: str, lines: list[tuple[Explanation, Crossover]]) -> dict[str, Any]:
    labels = [e.labels[1] for e, _ in lines]
    drawn = [c for _, c in lines]
    told = [f"{e.labels[1]}: {words.verdicts(c, e.labels)}" for e, c in lines]
    keys = [{"name": label, "colour": COLOURS[i % len(COLOURS)], "told": ""} for i, label in enumerate(labels)]
    return {
        "name": AXES.get(axis, axis),
        "picture": both_forms(lambda width: crossing(drawn, labels, width)),
        "legend": keys if len(lines) > 1 else [],
        "told": told,
    }
