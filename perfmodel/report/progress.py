"""Progress bars: on standard error, and only where someone watches, so that files and pipes stay clean."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


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
