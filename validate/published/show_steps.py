"""What `perfmodel validate published` prints."""

import json
from typing import Any

from perfmodel import units
from perfmodel.report.plain import paragraph, show, table
from perfmodel.report.progress import progress

from .reasons import FAR, reason

COLUMNS_EXPLAINED = (
    "ratio, memory: mean errors of the speed-up over full fine-tuning and of the peak, %; right: verdicts "
    "where the measured difference exceeds 10 %; inside: % of the rows in their 90 % interval"
)


def show_published(*, plot: Any, all_rows: bool, as_json: bool) -> None:
    """Predict every published row; print errors by source on the rows held out of the fit."""
    from . import steps as module

    rows = module.published_steps()
    with progress() as bar:
        task = bar.add_task("predicting", total=len(rows))
        outcomes = module.evaluate_rows(rows, progress=lambda name: bar.update(task, advance=1, description=name[:40]))
    check = [o for o in outcomes if o.row.split == "check"]
    lines = module.summarise_rows(check)
    if as_json:
        print(json.dumps({"check": lines, "rows": [_published_row(o) for o in outcomes]}, indent=1))
    else:
        _print_published(outcomes, check, lines, all_rows=all_rows)
    if plot is not None:
        from ..plots import Point, plot_parity

        points = [
            Point(o.row.family, o.seconds, o.predicted_seconds, o.low, o.high, o.row.split == "check") for o in outcomes
        ]
        plot_parity(points, plot, "Published training steps (filled: held out, open: fit; dashed: ±25 %)")
        if not as_json:
            show(f"\ndrawn: {plot}")


def _print_published(outcomes: list[Any], check: list[Any], lines: list[dict[str, Any]], *, all_rows: bool) -> None:
    shown = [
        [
            line["source"], line["rows"], *(_hundredths(line[k]) for k in ("mean", "median", "p90", "worst")),
            _hundredths(line["ratio_mean"]), line["verdicts"], _hundredths(line["memory_mean"]),
            _hundredths(line["coverage"]),
        ]
        for line in lines
    ]  # fmt: skip
    columns = ("check rows of", "rows", "mean", "median", "p90", "worst", "ratio", "right", "memory", "inside")
    show(table(columns, shown, title="step time, |relative error| in % on rows that no fit saw"))
    show(paragraph(COLUMNS_EXPLAINED), dim=True)
    listed = outcomes if all_rows else [o for o in outcomes if abs(o.error) > FAR]
    if listed:
        titles = ("row", "split", "measured", "predicted", "error")
        cells = (
            [o.row.id, o.row.split, units.seconds(o.seconds), units.seconds(o.predicted_seconds),
             f"{100 * o.error:+.1f} %"]
            for o in listed
        )  # fmt: skip
        title = "all rows" if all_rows else "rows that miss by more than 25 %"
        show("\n" + table(titles, cells, left=(0, 1), title=title))
    for o in listed:
        if abs(o.error) > FAR:
            show(f"{o.row.id}: {reason('steps', o.row.id)}")
    doubtful = sum(o.row.doubt for o in outcomes)
    if doubtful:
        show(f"\n{doubtful} rows count with their backward only: their forward is out of line (see the notes).")


def _hundredths(value: float | None) -> str:
    """A percentage under a head that has the sign."""
    return units.percent(value, 1).removesuffix(" %")


def _published_row(o: Any) -> dict[str, Any]:
    why = {"reason": reason("steps", o.row.id)} if abs(o.error) > FAR else {}
    return {
        "id": o.row.id, "split": o.row.split, "doubt": o.row.doubt, "measured_s": o.seconds,
        "predicted_s": o.predicted_seconds, "error": o.error, "inside": o.inside, "source": o.row.source,
        "notes": o.row.notes, **why,
    }  # fmt: skip
