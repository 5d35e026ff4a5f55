"""Heat maps of a sweep's speed-up, with the contour where a method stops paying (matplotlib)."""

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..questions.sweeps import Columns, Sweep
from ..resources import written
from .sweeps import Key, plane

MOST_PANELS, MOST_NUMBERS, MOST_TICKS = 12, 80, 8  # panels; cells with a number in them; ticks at every value
LINE, HATCHING = "line", "hatching"
TICKS = (0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0)  # speed-ups that the bar names; colours go no further
BLACK, THICK, HATCH, GREY = "black", 1.6, "////", "0.35"
FORMATS = (".png", ".svg", ".pdf")


def check_drawable(planned: Sweep, path: Path) -> None:
    """Whether a picture can be drawn at all, before anything is computed for it.

    Raises:
        UserError: matplotlib is missing, a grid without two axes, an unknown format.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise UserError("a plot needs matplotlib: pip install matplotlib")
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: unknown picture format {path.suffix!r}: choose one of: {', '.join(FORMATS)}")
    if len(planned.gpus) < 2 and (len(planned.batch) < 2 or len(planned.seq) < 2):
        raise UserError("a heat map needs several batches and several lengths, e.g. --batch 1-64*2 --seq 128-8192*2")


def draw_heatmap(planned: Sweep, speedups: dict[Key, list[Columns]], path: Path) -> None:
    """One panel per device and method beside the baseline: batch against sequence, blue where it pays.

    Raises:
        UserError: too many or no panels, a place that cannot be written.
    """
    import matplotlib as mpl

    baseline = planned.methods[0].spec()
    panels = {key: blocks for key, blocks in speedups.items() if key[1] != baseline}
    if not 0 < len(panels) <= MOST_PANELS:
        raise UserError(f"a picture shows 1 to {MOST_PANELS} methods and devices besides the baseline: {len(panels)}")
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    devices = list(dict.fromkeys(device for device, _ in panels))
    columns = len(panels) // len(devices) if len(devices) > 1 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (1.4 + 3.4 * columns, 0.9 + 3.2 * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    mesh: Any = None
    drawn: set[str] = set()
    for axes, ((device, method), blocks) in zip(grid.flat, panels.items(), strict=False):
        speedup, fits = plane(planned, blocks, "speedup"), plane(planned, blocks, "fits")
        mesh, found = _panel(axes, planned, speedup, fits)
        drawn |= found
        axes.set_title(f"{method}\non {device}", fontsize=9)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("tokens per sample")
    for axes in grid[:, 0]:
        axes.set_ylabel("batch")
    bar = figure.colorbar(mesh, ax=grid, label=f"speed-up over {baseline}", shrink=0.8)
    ends = {TICKS[0]: "≤ ", TICKS[-1]: "≥ "}
    bar.set_ticks(list(np.log2(TICKS)), labels=[f"{ends.get(tick, '')}{tick:g}" for tick in TICKS])
    figure.suptitle(f"{planned.model}: blue where it pays", fontsize=10)
    if drawn:
        _legend(figure, drawn, baseline)
    save(figure, path)
    plt.close(figure)


def _legend(figure: Any, drawn: set[str], baseline: str) -> None:
    """What the line and the hatching of the panels mean, below them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys = {
        LINE: Line2D([], [], color=BLACK, linewidth=THICK, label=f"as fast as {baseline}"),
        HATCHING: Patch(facecolor="none", edgecolor=GREY, hatch=HATCH, linewidth=0, label="does not fit"),
    }
    handles = [key for name, key in keys.items() if name in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def _panel(axes: Any, planned: Sweep, speedup: np.ndarray, fits: np.ndarray) -> tuple[Any, set[str]]:
    """The mesh, and what of line and hatching was drawn over it.

    Colours are by the logarithm of the ratio, so that twice as fast and twice as slow are equally strong.
    """
    drawn: set[str] = set()
    x, y = _edges(planned.seq), _edges(planned.batch)
    low, *_, high = np.log2(TICKS)
    mesh = axes.pcolormesh(x, y, np.log2(speedup), cmap="RdBu", vmin=low, vmax=high, rasterized=True)
    if speedup.min() < 1 < speedup.max():
        axes.contour(planned.seq, planned.batch, speedup, levels=[1.0], colors=BLACK, linewidths=THICK)
        drawn.add(LINE)
    if not fits.all():
        drawn.add(HATCHING)
        from matplotlib.collections import PolyCollection

        corners = _corners(x, y)[~fits.astype(bool)]
        axes.add_collection(
            PolyCollection(corners, hatch=HATCH, linewidth=0, facecolor="none", edgecolor=GREY), autolim=False
        )
    if speedup.size <= MOST_NUMBERS:
        _numbers(axes, planned, speedup, mesh)
    from matplotlib import ticker

    for axis, values in ((axes.xaxis, planned.seq), (axes.yaxis, planned.batch)):
        if _is_wide(values):
            getattr(axes, f"set_{axis.axis_name}scale")("log", base=2)
        if len(values) <= MOST_TICKS:
            axis.set_ticks(values)
        axis.set_major_formatter(lambda v, _: f"{v:g}")
        axis.set_minor_locator(ticker.NullLocator())
    return mesh, drawn


def _numbers(axes: Any, planned: Sweep, speedup: np.ndarray, mesh: Any) -> None:
    """The ratio in every cell, on the cell's colour: line and hatching end beside it."""
    for i, batch in enumerate(planned.batch):
        for j, seq in enumerate(planned.seq):
            size = np.log2(speedup[i, j])
            axes.text(
                seq, batch, f"{speedup[i, j]:.2f}", ha="center", va="center", fontsize=7,
                color="white" if abs(size) > 0.6 else "black",
                bbox={"facecolor": mesh.to_rgba(size), "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip


def _is_wide(values: np.ndarray) -> bool:
    """Whether an axis is drawn as a logarithm."""
    return bool(values[-1] > 8 * values[0])


def _edges(values: np.ndarray) -> np.ndarray:
    """The borders of the cells around the values: halfway between neighbours, on the scale that is drawn."""
    scaled = np.log(values) if _is_wide(values) else values.astype(float)
    middle = (scaled[1:] + scaled[:-1]) / 2
    edges = np.concatenate([[2 * scaled[0] - middle[0]], middle, [2 * scaled[-1] - middle[-1]]])
    return np.exp(edges) if _is_wide(values) else edges


def _corners(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The corners of every cell between the borders, (rows, columns, 4, 2)."""
    left, bottom = np.meshgrid(x[:-1], y[:-1])
    right, top = np.meshgrid(x[1:], y[1:])
    return np.stack([left, bottom, right, bottom, right, top, left, top], axis=-1).reshape(*left.shape, 4, 2)


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format that its path's ending names."""
    with written(path, "drawn") as place:
        figure.savefig(place, dpi=150, format=path.suffix.lstrip("."))
