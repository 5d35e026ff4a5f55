"""Progress bars: on standard error, and only where someone watches, so that files and pipes stay clean."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

LONGEST = 60  # characters of what is running


def progress(*, counted: bool = True, auto_refresh: bool = True) -> Progress:
    """A bar with what is running; if the work can be counted, also how much is done and the time left.

    Args:
        auto_refresh: redraw in a thread of its own; False where the process forks or takes times: then it is for the
            caller to refresh.
    """
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    if counted:
        columns += [MofNCompleteColumn(), TimeRemainingColumn()]
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, transient=True, auto_refresh=auto_refresh, disable=not console.is_terminal
    )


@contextmanager
def stoppable(left: str) -> Iterator[None]:
    """Tell whoever interrupts a long command what it leaves."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nstopped: {left}", err=True)
        raise


@contextmanager
def counting(first: str, total: int | None = None, *, forks: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A bar for work in parts: is told how many are done, how many there are, and which one comes next.

    Args:
        first: what is running before the first part.
        forks: whether the process forks or takes times, beside which no thread may draw.
    """
    with progress(auto_refresh=not forks) as bar:
        task = bar.add_task(first, total=total)

        def tick(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label[:LONGEST], refresh=forks)

        yield tick


@contextmanager
def filling() -> Iterator[Callable[[float, str], None]]:
    """A bar for work that fills a budget of time and forks or takes times: is told the share, and what comes next."""
    with progress(counted=False, auto_refresh=False) as bar:
        task = bar.add_task("loading", total=1.0)

        def tick(share: float, label: str) -> None:
            bar.update(task, completed=share, description=label[:LONGEST], refresh=True)

        yield tick
