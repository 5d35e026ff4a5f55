"""Pictures say what the figures say: axes with few round marks, every curve and point inside its frame."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import UserError, compare, explain, predict
from perfmodel.devices import profile
from perfmodel.questions.crossover import Crossover
from perfmodel.questions.roofline import longest_kernels, roof
from perfmodel.questions.speedup import SAME
from perfmodel.report import svg
from perfmodel.report.charts import NARROW, WIDE
from perfmodel.report.charts.crossing import crossing
from perfmodel.report.charts.labels import Box, Labels, places_around
from perfmodel.report.charts.memory import memory
from perfmodel.report.charts.roofline import label_name, roofline
from perfmodel.report.charts.waterfall import waterfall
from validate import plots
from validate.checking.parity import ParityPoint, marks, parity_svg

bounds = st.tuples(st.floats(1e-9, 1e9), st.floats(1.01, 1e9)).map(lambda b: (b[0], b[0] * b[1]))


@given(bounds=bounds, most=st.integers(2, 9))
def test_an_axis_has_few_round_marks_inside_its_bounds(bounds: tuple[float, float], most: int) -> None:
    """More would run into each other, none would leave an axis without a scale."""
    low, high = bounds
    tens = svg.decades(low, high, most)
    assert len(tens) <= most
    assert all(low * (1 - 1e-6) <= x <= high * (1 + 1e-6) for x in tens)
    assert tens or high < 10.0001 * low
    twos = svg.doublings(low, high, most)
    assert len(twos) <= most
    assert all(low <= x <= high for x in twos)
    straight = svg.ticks(low, high, most)
    assert len(straight) <= most + 1
    assert all(low - 1e-6 * high <= x <= high * (1 + 1e-6) for x in straight)


def test_few_decades_are_all_marked() -> None:
    """Thinning begins where there are too many."""
    assert svg.decades(1.0, 1e5, 6) == pytest.approx([1.0, 10.0, 1e2, 1e3, 1e4, 1e5])
    assert svg.decades(1.0, 1e6, 6) == pytest.approx([1.0, 1e2, 1e4, 1e6])
    assert svg.doublings(1, 100, 8) == [1, 2, 4, 8, 16, 32, 64]


def attributes(canvas: svg.Canvas, tag: str, *names: str) -> list[tuple[str, ...]]:
    """Attributes of every element of a kind."""
    shapes = [shape for shape in canvas.shapes if shape.startswith(f"<{tag} ")]
    return [tuple(re.findall(rf' {name}="([^"]*)"', shape)[0] for name in names) for shape in shapes]


def inside(canvas: svg.Canvas) -> bool:
    """Whether every curve lies in the picture."""
    drawn = [re.findall(r"[ML](\S+) (\S+)", d) for (d,) in attributes(canvas, "path", "d")]
    points = [(float(x), float(y)) for path in drawn for x, y in path]
    return bool(points) and all(0 <= x <= canvas.width and 0 <= y <= canvas.height for x, y in points)


@pytest.mark.parametrize(
    ("axis", "values"), [("batch", [1, 2, 4, 8, 16]), ("r", [1, 2, 4, 8, 16]), ("targets", [1, 2, 3, 4, 5])]
)
def test_a_crossing_marks_the_values_that_were_tried(axis: str, values: list[int]) -> None:
    """A vertical line and its number for each of a few; the curve does not leave the picture."""
    ratio = [2.0, 1.4, 1.0, 0.8, 0.7]
    told = ["faster", "faster", "same", "slower", "slower"]
    canvas = crossing([Crossover(axis, "", 4, values, ratio, told, [True] * 5, [True] * 4 + [False])], ["LoRA"])
    upright = [x1 for x1, x2 in attributes(canvas, "line", "x1", "x2") if x1 == x2]
    assert len(upright) == len(values)
    steps = np.diff([float(x) for x in upright])
    assert steps == pytest.approx(steps[0], rel=0.01)  # doublings are equally far apart, and targets
    numbers = [re.sub("<.*?>", "", shape) for shape in canvas.shapes if shape.startswith("<text")]
    assert {str(v) for v in values} <= set(numbers)
    assert inside(canvas)


def test_the_band_of_a_crossing_holds_what_counts_as_the_same() -> None:
    """A curve inside of it has no verdict: half the band would decide what the words leave open."""
    ratio, told = [2.0, 1.0, 0.5], ["faster", "same", "slower"]
    canvas = crossing([Crossover("batch", "", 1, [1, 2, 4], ratio, told, [True] * 3, [True] * 3)], ["LoRA"])
    names = [re.sub("<.*?>", "", shape) for shape in canvas.shapes if shape.startswith("<text")]
    at = {name: float(y) for name, (y,) in zip(names, attributes(canvas, "text", "y"), strict=True)}
    top, height = map(float, attributes(canvas, "rect", "y", "height")[0])
    octave = at["1×"] - at["2×"]
    assert height == pytest.approx(2 * octave * np.log2(1 + SAME), rel=0.02)
    assert top + height / 2 == pytest.approx(at["1×"] - 4, abs=0.2)


@pytest.mark.parametrize(("count", "all_marked"), [(2, True), (12, True), (13, False), (40, False)])
def test_up_to_a_dozen_values_are_all_marked(count: int, all_marked: bool) -> None:
    """Numbers of many points would run into each other; of few, none should be left to guess."""
    values = list(range(8, 8 + count))
    ratio, told = list(np.linspace(2.0, 0.5, count)), ["same"] * count
    canvas = crossing([Crossover("k", "", 9, values, ratio, told, [True] * count, [True] * count)], ["top-K"])
    numbers = {re.sub("<.*?>", "", shape) for shape in canvas.shapes if shape.startswith("<text")}
    assert ({str(v) for v in values} <= numbers) == all_marked
    assert len({str(v) for v in values} & numbers) <= 12


def test_a_parity_plot_has_its_diagonal_band_and_points_in_the_frame() -> None:
    """The band says at a glance which figures are off by more; drawn elsewhere it would flatter or accuse."""
    points = [ParityPoint(m, p, "blue", f"{m}") for m, p in ((1.0, 1.1), (10.0, 8.0), (100.0, 100.0))]
    canvas = parity_svg(points, "title", "seconds", str, 0.25)
    assert inside(canvas)
    ends = [re.findall(r"[ML](\S+) (\S+)", d) for (d,) in attributes(canvas, "path", "d")]
    lengths = [np.hypot(float(b[0]) - float(a[0]), float(b[1]) - float(a[1])) for a, b in ends]
    assert len(lengths) == 3
    assert lengths[0] == pytest.approx(lengths[1], rel=0.01)  # the band's two sides
    assert lengths[0] < lengths[2] < 1.2 * lengths[0]
    centres = [(float(x), float(y)) for x, y in attributes(canvas, "circle", "cx", "cy")]
    assert len(centres) == len(points)
    assert all(0 < x < canvas.width and 0 < y < canvas.height for x, y in centres)


def texts(canvas: svg.Canvas) -> list[tuple[str, float]]:
    """What is written, and how high its baseline lies."""
    found = [shape for shape in canvas.shapes if shape.startswith("<text ")]
    return [(re.sub("<.*?>", "", t), float(re.findall(r' y="([^"]*)"', t)[0])) for t in found]


def test_a_wide_roofline_is_low_a_narrow_one_high() -> None:
    """A page has room to the side, a telephone below: as high a picture on both would hide the kernels of one."""
    p = predict("gpt2", "lora", device="l40s", batch=2, seq=64)
    kernels = longest_kernels(p)
    wide, narrow = (roofline(kernels, roof(profile.load("l40s"), kernels), "step", width) for width in (WIDE, NARROW))
    assert wide.height / wide.width < 0.75 * narrow.height / narrow.width
    largest = [max(float(r) for (r,) in attributes(canvas, "circle", "r")) for canvas in (wide, narrow)]
    assert largest[1] < largest[0]
    assert inside(wide)
    assert inside(narrow)


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("method", ["full", "lora:targets=all-linear", "qlora"])
def test_a_roofline_names_its_largest_kernels_and_its_lines(method: str, width: int) -> None:
    """What takes the time is what the picture is looked at for: hovering does not work in print or on a phone."""
    kernels = longest_kernels(predict("llama-3.2-1b", method, device="l40s", batch=2, seq=256))
    over = roof(profile.load("l40s"), kernels)
    told = [text for text, _ in texts(roofline(kernels, over, "step", width))]
    named = [re.fullmatch(r"(\w+) (\d+) %", text) for text in told]
    shares = {match[1]: int(match[2]) for match in named if match}
    assert label_name(kernels[0]) in shares
    assert 1 < len(shares) <= 5
    total = sum(k.seconds for k in kernels)
    for name, share in shares.items():
        of_name = sum(k.seconds for k in kernels if label_name(k) == name)
        assert 3 <= share <= 100 * of_name / total + 0.5
    assert [text.split()[0] for text in told if re.match(r"(bf16|fp32) ", text)] == list(over.peaks)


@given(
    shapes=st.lists(st.tuples(st.floats(20, 280), st.floats(20, 180), st.floats(1, 30)), min_size=1, max_size=12),
    ends=st.lists(st.tuples(st.floats(0, 300), st.floats(0, 200)), min_size=2, max_size=5),
)
def test_labels_touch_no_line_and_no_other_label(
    shapes: list[tuple[float, float, float]], ends: list[tuple[float, float]]
) -> None:
    """A name that lies on a line is read with it; one without a place is left out, and its neighbour is not."""
    lines = list(pairwise(ends))
    labels = Labels(svg.Canvas(300, "", 200), Box(0, 0, 300, 200), list(lines), [])
    named = [labels.add(f"mm {i} %", "", places_around(*shape)) for i, shape in enumerate(shapes)]
    assert len(labels.placed) == sum(named) == len(texts(labels.canvas))
    for i, box in enumerate(labels.placed):
        assert not any(box.shared(other) for other in labels.placed[:i])
        assert box.within(labels.frame)
        for (x1, y1), (x2, y2) in lines:
            points = [(x1 + t * (x2 - x1), y1 + t * (y2 - y1)) for t in np.linspace(0, 1, 100)]
            assert not any(box.left < x < box.right and box.top < y < box.bottom for x, y in points)


@pytest.mark.parametrize(
    ("shapes", "side", "led"),
    [
        ([], "right", False),
        ([Box(222, 120, 400, 180)], "left", False),
        ([Box(110, 90, 290, 210)], "far", True),
        ([Box(0, 0, 400, 300)], "right", False),  # nothing is free
    ],
)
def test_a_label_covers_a_shape_only_where_nothing_is_free(shapes: list[Box], side: str, led: bool) -> None:
    """Beside its kernel, else farther away with a line that leads back; on another kernel at the worst."""
    labels = Labels(svg.Canvas(400, "", 300), Box(0, 0, 400, 300), [], shapes)
    assert labels.add("mm 12 %", "", places_around(200, 150, 20))
    (box,) = labels.placed
    assert ("right" if box.left > 200 else "left") == side or led
    assert len(labels.lines) == len(attributes(labels.canvas, "line", "class")) == led
    assert led or abs((box.top + box.bottom) / 2 - 150) < 10


def test_a_peak_close_to_the_memory_of_the_device_is_written_off_its_line() -> None:
    """Full fine-tuning of Llama-3 8B on an A100 of 80 GB: the number that decides lay under the line."""
    c = compare("llama-3-8b", ["full", "lora"], device="a100-80gb-sxm", batch=1, seq=512)
    canvas = memory(c.predictions, ["full", "LoRA"], 85.9e9)
    line = next(float(x1) for x1, x2, y1 in attributes(canvas, "line", "x1", "x2", "y1") if x1 == x2)
    starts = [float(re.findall(r' x="([^"]*)"', shape)[0]) for shape in canvas.shapes if "strong" in shape]
    assert starts[0] == pytest.approx(line + 6)
    assert starts[1] < line / 2


@pytest.mark.parametrize("width", [WIDE, 320])
def test_bars_stand_one_below_the_other_each_beside_its_name(width: int) -> None:
    """On a narrow page a name stands above its bar; nothing is written over another line or beside the picture."""
    labels = ["full fine-tuning", "LoRA of rank sixteen", "IA3"]
    c = compare("gpt2", ["full", "lora", "ia3"], device="l40s", batch=2, seq=64)
    changes = explain("gpt2", "full", "lora", device="l40s", batch=2, seq=64)
    for canvas, names in ((memory(c.predictions, labels, 48e9, width), labels), (waterfall(changes, width), None)):
        bars = [(float(y), float(h)) for y, h in attributes(canvas, "rect", "y", "height")]
        assert all(y >= 0 and y + h <= canvas.height for y, h in bars)
        assert all(0 <= y <= canvas.height for _, y in texts(canvas))
        rows = sorted({y for y, _ in bars})
        assert all(low + bars[0][1] <= high for low, high in pairwise(rows))
        heights = dict(texts(canvas))
        for name, top in zip(names or (), rows, strict=names is not None):
            assert top - 16 <= heights[name] <= top + bars[0][1]


def test_times_below_a_waterfall_fit_the_width_of_the_page() -> None:
    """On a phone they must not run into each other; a wide page has room for more, to read a bar's length by."""
    marked = dict.fromkeys((WIDE, NARROW, 320), 0)
    for batch in (1, 2, 4, 8):
        changes = explain("gpt2", "full", "lora", device="l40s", batch=batch, seq=128, axes=())
        for width in marked:
            canvas = waterfall(changes, width)
            below = [shape for shape in canvas.shapes if shape.startswith("<text ") and "muted" in shape]
            centres = [float(re.findall(r' x="([^"]*)"', text)[0]) for text in below]
            halves = [svg.text_width(re.sub("<.*?>", "", text)) / 2 for text in below]
            centred = list(zip(centres, halves, strict=True))[1:]  # the first begins at 0
            assert all(a + b <= c - d for (a, b), (c, d) in pairwise(centred))
            marked[width] += len(below)
    assert marked[WIDE] > marked[NARROW]


@given(bounds=bounds, most=st.integers(4, 9))
def test_marks_of_a_parity_plot_differ_and_lie_inside(bounds: tuple[float, float], most: int) -> None:
    """A mark drawn twice is one that is missing elsewhere."""
    found = marks(*bounds, most)
    assert all(a < b for a, b in pairwise(found))
    assert all(bounds[0] <= x <= bounds[1] for x in found)


def test_a_decade_is_marked_evenly() -> None:
    """On a logarithmic axis no two neighbours are further apart than a factor of two."""
    found = marks(1.0, 9.9, 8)
    assert len(found) == 8
    assert all(high <= 2 * low for low, high in pairwise(found))


@pytest.mark.parametrize("name", ["missing/steps.png", "steps.odd"])
def test_a_plot_that_cannot_be_drawn_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A wrong folder or ending is told; half a picture would be taken for a whole one."""
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match="cannot be drawn"):
        plots.plot_parity([plots.Point("a", 1.0, 1.1, 0.9, 1.3, True)], tmp_path / name, "steps")
    assert not list(tmp_path.iterdir())


def test_each_measured_step_is_one_mark_of_its_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled where it was held out, open where a fit saw it: drawn as both, or as another's, it would mislead."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn: dict[float, tuple[str, str]] = {}

    def errorbar(self: Any, x: list[float], y: list[float], *, color: str, mfc: str, **options: Any) -> None:
        assert not drawn.keys() & set(x)
        drawn.update((at, (color, mfc)) for at in x)

    monkeypatch.setattr(axes, "errorbar", errorbar)
    monkeypatch.setattr(axes, "legend", lambda self, **options: None)
    kinds = [("a", True), ("b", True), ("b", False), ("a", True)]
    points = [plots.Point(name, i, i, i, i, filled) for i, (name, filled) in enumerate(kinds, start=1)]
    plots.plot_parity(points, tmp_path / "steps.png", "steps")
    assert drawn == {1: ("C0", "C0"), 2: ("C1", "C1"), 3: ("C1", "white"), 4: ("C0", "C0")}
