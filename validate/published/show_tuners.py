"""What `perfmodel validate tuners` prints."""

from typing import Any

from click import style

from perfmodel import units
from perfmodel.report.plain import paragraph, print_json, show, table
from perfmodel.report.progress import progress

from ..quiet import without_warnings_of_packages
from . import tuners
from .reasons import FAR, reason, reasons


def show_tuners(*, images: bool, host: str, all_rows: bool, as_json: bool) -> bool:
    """Trace every tuner of a benchmark of PEFT's; print errors and rank correlation; returns whether the limits hold.

    Args:
        images: of an image model, in the place of a language model.
    """
    without_warnings_of_packages()
    source = tuners.IMAGES if images else tuners.TABLE
    rows = tuners.published_tuners(source)
    with progress() as bar:
        task = bar.add_task("tracing", total=len(rows))
        outcomes = tuners.evaluate_tuners(rows, lambda name: bar.update(task, advance=1, description=name[:40]), host)
    total = tuners.summarise_tuners(outcomes)
    if as_json:
        figures = {k: v for k, v in vars(total).items() if k != "worst"}
        known = {"summary": {**figures, "holds": total.holds}, "rows": [_tuner_row(o, source.stem) for o in outcomes]}
        print_json(known)
    else:
        _print_tuners(outcomes, total, source.stem, all_rows=all_rows)
    return bool(total.holds)


def show_host_speed(*, images: bool, as_json: bool) -> None:
    """How slow the host of a benchmark must have been; each half of its tuners is judged by what the other tells."""
    without_warnings_of_packages()
    with progress() as bar:
        task = bar.add_task("tracing", total=None)
        rows = tuners.published_tuners(tuners.IMAGES if images else tuners.TABLE)
        found = tuners.host_speed(rows, lambda times: bar.update(task, description=f"{times:.2f} times as slow"))
    if as_json:
        print_json(found._asdict())
        return
    before, crossed = (units.percent(error, 1) for error in (found.before, found.crossed))
    one, other = found.halves
    told = (
        f"{found.rows} configurations: a host {found.slower:g} times as slow as the usual one fits them best (half "
        f"of the tuners alone: {one:g}, the others: {other:g}). Step time off by {before} beside the usual host, by "
        f"{crossed} beside the one that the other half tells"
    )
    show(paragraph(told))


def _print_tuners(outcomes: list[Any], total: Any, source: str, *, all_rows: bool) -> None:
    traced = [o for o in outcomes if o.prediction]
    cells = (
        [o.row.id, units.seconds(o.row.seconds), units.seconds(o.predicted), f"{100 * o.error:+.1f} %"]
        for o in (traced if all_rows else total.worst)
    )
    title = "every configuration" if all_rows else "the worst configurations"
    show(table(("", "measured", "predicted", "error"), cells, title=title))
    for o in sorted(traced, key=lambda o: -abs(o.error)):
        if o in total.worst or abs(o.error) > FAR:
            why = reason(source, o.row.id)
            show(paragraph(f"{o.row.id}, {100 * o.error:+.0f} %: {why}", indent="  "))
    for o in outcomes:
        if o.prediction is None:
            show(paragraph(f"not traced: {o.row.id}: {o.reason}", indent="  "))
    colour = "green" if total.holds else "red"
    mean, rank = (style(text, fg=colour) for text in (units.percent(total.mean, 1), f"{total.spearman:.2f}"))
    told = (
        f"{total.rows} configurations of {total.tuners} tuners: step time off by {mean} in the mean "
        f"(limit {units.percent(tuners.MEAN_LIMIT, 1)}), median {units.percent(total.median, 1)}, "
        f"p90 {units.percent(total.p90, 1)}; Spearman rank correlation {rank} (limit {tuners.RANK_LIMIT:g})"
    )
    show("\n" + paragraph(told))


def _tuner_row(o: Any, source: str) -> dict[str, Any]:
    known = {"id": o.row.id, "tuner": o.row.tuner, "measured_s": o.row.seconds, "source": o.row.source}
    if o.prediction is None:
        return {**known, "reason": o.reason}
    why = reasons(source).get(o.row.id)
    return {**known, "predicted_s": o.predicted, "error": o.error, **({"reason": why} if why else {})}
