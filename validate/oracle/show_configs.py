"""What `perfmodel validate configs` prints."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from perfmodel.report.plain import print_json, show, table
from perfmodel.report.progress import progress

from . import configs
from .configs import ANSWERED, OTHER, REFUSED, TRACEBACK, TRACED, ConfigRow


def show_configs(
    folders: Sequence[Path],
    asked: Sequence[str],
    *,
    model: str | None,
    traced: bool,
    output: Path | None,
    as_json: bool,
) -> bool:
    """Ask for every file, print how many are answered and why others are not; returns whether no traceback came.

    Args:
        asked: options of `predict` that all are asked with.
    """
    rows = []
    with progress() as bar:
        task = bar.add_task("asking", total=sum(len(configs.files(folder)) for folder in folders))
        for folder in folders:
            for row in configs.try_all(folder, asked, model=model, traced=traced):
                rows.append(row)
                bar.advance(task)
    if output:
        configs.write_configs(output, rows)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        _print(rows)
    return not any(row.outcome == TRACEBACK for row in rows)


def _print(rows: Sequence[ConfigRow]) -> None:
    heads = ("repository", "files", "configs", ANSWERED, TRACED, REFUSED, TRACEBACK, "share")
    lines = [_counts(name, [row for row in rows if row.repository == name]) for name in _repositories(rows)]
    show(table(heads, [*lines, _counts("all", rows)], title="training configs given to predict --config as they are"))
    refused = Counter(row.reason for row in rows if row.outcome in (REFUSED, TRACEBACK))
    if refused:
        show()
        show(table(("refused for", "files"), refused.most_common()))
    differing = sum(bool(row.said) for row in rows if row.outcome in (ANSWERED, TRACED))
    show(f"\n{differing} answers begin with how their step differs from the file's")


def _repositories(rows: Sequence[ConfigRow]) -> list[str]:
    return list(dict.fromkeys(row.repository for row in rows))


def _counts(name: str, rows: Sequence[ConfigRow]) -> tuple[str | int, ...]:
    """A line of the table: files, of which are training configs, and what became of those."""
    by = Counter(row.outcome for row in rows)
    asked = len(rows) - by[OTHER]
    share = f"{100 * (by[ANSWERED] + by[TRACED]) / asked:.0f} %" if asked else ""
    return name, len(rows), asked, *(by[kind] for kind in (ANSWERED, TRACED, REFUSED, TRACEBACK)), share
