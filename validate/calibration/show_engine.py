"""What `perfmodel validate engine` prints."""

from pathlib import Path

from perfmodel import units
from perfmodel.errors import UserError
from perfmodel.report.plain import show, table
from perfmodel.report.progress import progress

from ..quiet import without_warnings_of_packages
from . import engine


def show_engine(name: str, output: Path) -> None:
    """Measure an engine's costs, print them beside what they were fitted to, and write its file."""
    without_warnings_of_packages()
    try:
        engine.start(name)
    except ImportError as missing:
        raise UserError(
            f"this command needs DeepSpeed ({missing.name} is missing): pip install 'perfmodel[engine]'"
        ) from None
    with progress() as bar:
        task = bar.add_task("timing", total=len(list(engine.engine_programs())))
        rows = engine.time_programs(name, lambda told: bar.update(task, advance=1, description=told))
    costs, error = engine.fit_engine(rows)
    engine.write_engine(name, costs, error, rows, output)
    told = [(row.name, units.seconds(row.plain), units.seconds(row.engine)) for row in rows]
    show(table(("", "without", "with"), told, title="four more layers"))
    figures = [(cost_of, f"{cost:.2f}") for cost_of, cost in costs.items()]
    show(table(("", "modules of the host"), figures, title="costs"))
    show(f"mean |relative error| {100 * error:.1f} %; written: {output}")
