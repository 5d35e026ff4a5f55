"""What `perfmodel validate published` prints."""

from typing import Any

from perfmodel import units
from perfmodel.report.plain import paragraph, print_json, show, table
from perfmodel.report.progress import progress

from .reasons import FAR, reason

COLUMNS_EXPLAINED = (
    "ratio, memory: mean errors of the speed-up over full fine-tuning and of the peak, %; right: verdicts "
    "where the measured difference exceeds 10 %; inside: % of the rows in their 90 % interval"
)


def show_published(*, plot: Any, all_rows: bool, as_json: bool) -> None:
    """Predict every published row; print errors by source on the rows held out of the fit."""
    from . import steps as module

    tables = [module.published_steps(path) for path in (module.TABLE, module.FAMILIES, module.SEVERAL)]
    with progress() as bar:
        task = bar.add_task("predicting", total=sum(map(len, tables)))
        outcomes, others, several = (
            module.evaluate_rows(some, progress=lambda name: bar.update(task, advance=1, description=name[:40]))
            for some in tables
        )
    check, other, many = ([o for o in some if o.row.split == "check"] for some in (outcomes, others, several))
    lines, other_lines, many_lines = (module.summarise_rows(some) for some in (check, other, many))
    if as_json:
        families = {"check": other_lines, "rows": [_published_row(o, "families") for o in others]}
        gpus = {"check": many_lines, "rows": [_published_row(o, "several_gpus") for o in several]}
        figures = {"check": lines, "rows": [_published_row(o) for o in outcomes]}
        print_json({**figures, "families": families, "several_gpus": gpus})
    else:
        _print_published(outcomes, lines, all_rows=all_rows)
        show("\n" + _table(other_lines, "families that joined later: step time, |relative error| in %"))
        _print_rows(others, "families", all_rows=all_rows)
        show("\n" + _table(many_lines, "several GPUs, nothing fitted: step time, |relative error| in %"))
        _print_rows(several, "several_gpus", all_rows=all_rows)
    if plot is not None:
        from ..plots import Point, plot_parity

        points = [
            Point(o.row.family, o.seconds, o.predicted_seconds, o.low, o.high, o.row.split == "check") for o in outcomes
        ]
        plot_parity(points, plot, "Published training steps (filled: held out, open: fit; dashed: ±25 %)")
        if not as_json:
            show(f"\ndrawn: {plot}")


def _print_published(outcomes: list[Any], lines: list[dict[str, Any]], *, all_rows: bool) -> None:
    show(_table(lines, "step time, |relative error| in % on rows that no fit saw"))
    show(paragraph(COLUMNS_EXPLAINED), dim=True)
    _print_rows(outcomes, "steps", all_rows=all_rows)
    doubtful = sum(o.row.doubt for o in outcomes)
    if doubtful:
        show(f"\n{doubtful} rows count with their backward only: their forward is out of line (see the notes).")


def _table(lines: list[dict[str, Any]], title: str) -> Any:
    shown = [
        [
            line["source"], line["rows"], *(_hundredths(line[k]) for k in ("mean", "median", "p90", "worst")),
            _hundredths(line["ratio_mean"]), line["verdicts"], _hundredths(line["memory_mean"]),
            _hundredths(line["coverage"]),
        ]
        for line in lines
    ]  # fmt: skip
    columns = ("check rows of", "rows", "mean", "median", "p90", "worst", "ratio", "right", "memory", "inside")
    return table(columns, shown, title=title)


def _print_rows(outcomes: list[Any], source: str, *, all_rows: bool) -> None:
    """Rows that miss by much, with the reason; `source` is their table."""
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
            show(paragraph(f"{o.row.id}: {reason(source, o.row.id)}", indent="  "))


def _hundredths(value: float | None) -> str:
    """A percentage under a head that has the sign."""
    return units.percent(value, 1).removesuffix(" %")


def _published_row(o: Any, source: str = "steps") -> dict[str, Any]:
    why = {"reason": reason(source, o.row.id)} if abs(o.error) > FAR else {}
    return {
        "id": o.row.id, "split": o.row.split, "doubt": o.row.doubt, "measured_s": o.seconds,
        "predicted_s": o.predicted_seconds, "error": o.error, "inside": o.inside, "source": o.row.source,
        "notes": o.row.notes, **why,
    }  # fmt: skip
