"""Where a method pays: speed-up over batch and length as coloured cells, as the heat map of `sweep` shows it."""

from dataclasses import dataclass
from math import log2

import numpy as np

from ...questions.speedup import SAME
from ..svg import Canvas, text_width
from ..theme import TONES
from . import WIDE

FULL = 2.0  # times faster or slower: from there on the colour is at its strongest
HEAD, FOOT, LEFT, CORNER = 8.0, 42.0, 52.0, 10.0  # px


@dataclass(frozen=True)
class BreakEven:
    """A plane of speed-ups.

    Attributes:
        batch, seq: values of the axes, ascending.
        speedup: over the baseline, (batch, seq).
        fits: whether the method fits.
        labels: baseline and method in words.
        here: batch and length of the setup that is asked about.
    """

    batch: list[int]
    seq: list[int]
    speedup: np.ndarray
    fits: np.ndarray
    labels: tuple[str, str]
    here: tuple[int, int]


def breakeven(plane: BreakEven, width: int = WIDE) -> Canvas:
    """The picture: blue where the method is faster, red where slower, a filled corner where it does not fit."""
    columns, rows = len(plane.seq), len(plane.batch)
    cell = (width - LEFT - 4) / columns
    tall = 30.0 if width >= WIDE else 34.0
    title = f"Speed-up of {plane.labels[1]} over {plane.labels[0]} by batch and tokens per sample"
    canvas = Canvas(width, title, HEAD + rows * tall + FOOT)
    for i, batch in enumerate(plane.batch):
        y = HEAD + (rows - 1 - i) * tall
        canvas.text(LEFT - 8, y + tall / 2 + 4.5, f"{batch:,}", "muted", "end")
        for j, seq in enumerate(plane.seq):
            _cell(canvas, LEFT + j * cell, y, cell, tall, (batch, seq), plane.speedup[i, j].item(), plane.fits[i, j])
    every = 1 + (max(text_width(f"{seq:,}") for seq in plane.seq) > cell)
    for j, seq in list(enumerate(plane.seq))[::every]:
        canvas.text(LEFT + (j + 0.5) * cell, HEAD + rows * tall + 17, f"{seq:,}", "muted", "middle")
    canvas.text(LEFT + columns * cell / 2, HEAD + rows * tall + 35, "tokens per sample", "muted", "middle")
    canvas.text(0, HEAD + rows * tall + 17, "batch", "muted")
    _mark(canvas, plane, cell, tall)
    return canvas


def _cell(
    canvas: Canvas, x: float, y: float, wide: float, tall: float, at: tuple[int, int], ratio: float, fits: bool
) -> None:
    said = f"batch {at[0]:,}, {at[1]:,} tokens: {ratio:.2f}x{'' if fits else ', does not fit'}"
    canvas.rect(x + 1, y + 1, wide - 2, tall - 2, f"cell {tone(ratio)}", said)
    if not fits:
        right, top = x + wide - 1, y + 1
        canvas.path([(right - CORNER, top), (right, top), (right, top + CORNER)], "f-muted")
    canvas.text(x + wide / 2, y + tall / 2 + 4.5, f"{ratio:.2f}", anchor="middle")


def tone(ratio: float) -> str:
    """The class of a cell's colour: the same within 5 %, else one of a few tones of faster or slower."""
    if 1 / (1 + SAME) <= ratio <= 1 + SAME:
        return "f-grid"
    level = min(len(TONES), 1 + int(len(TONES) * abs(log2(ratio)) / log2(FULL)))
    return f"f-{'saved' if ratio > 1 else 'added'} tone-{level}"


def _mark(canvas: Canvas, plane: BreakEven, cell: float, tall: float) -> None:
    """A frame where the setup is, if it is within the map: at the nearest of its values."""
    batch, seq = plane.here
    if not (plane.batch[0] <= batch <= plane.batch[-1] and plane.seq[0] <= seq <= plane.seq[-1]):
        return
    i, j = (int(np.abs(np.log2(values) - log2(value)).argmin())
            for values, value in ((plane.batch, batch), (plane.seq, seq)))  # fmt: skip
    y = HEAD + (len(plane.batch) - 1 - i) * tall
    canvas.add("rect", x=LEFT + j * cell, y=y, width=cell, height=tall, class_="here", rx=3)
