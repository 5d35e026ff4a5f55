"""What `perfmodel validate fit --collectives` prints."""

from pathlib import Path

from perfmodel import units
from perfmodel.report.plain import print_json, show, table

from .fit import HARDER, HEADLINE, fit_collectives


def show_links(path: Path, *, write: bool, as_json: bool) -> None:
    """Fit nodes and print the errors on rows that the fits did not see, the plain line beside them."""
    rows = fit_collectives(path, write=write)
    if as_json:
        print_json(rows)
        return
    for part in (HEADLINE, *HARDER):
        cells = (
            (r["gpu"], r["kind"], r["node"], r["rows"], *(units.percent(r[k], 1) for k in FIGURES))
            for r in sorted(rows, key=lambda r: (r["gpu"], r["kind"]))
            if r["slice"] == part
        )
        columns = ("GPU", "collective", "node", "rows", "mean", "median", "p90", "plain line")
        show(table(columns, cells, left=(0, 1, 2), title=f"|relative error|, {part}"))
        show()


FIGURES = ("mean", "median", "p90", "line_mean")
