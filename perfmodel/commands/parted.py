"""Options of commands whose work of minutes can be shared out."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..partitions import Partitions

workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes of this machine that share work of minutes (needs the extra `cluster`).",
)
dask_option = click.option(
    "--dask", metavar="ADDRESS", help="Scheduler of a Dask cluster that does the work, such as tcp://host:8786."
)
partitions_option = click.option(
    "--partitions",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder that keeps what is done as Parquet files: the same command goes on there after any end.",
)

PARTED = (workers_option, dask_option, partitions_option)


@contextmanager
def partitions_asked(
    options: dict[str, Any], question: Callable[[], Mapping[str, Any]], output: Path | None = None
) -> "Iterator[Partitions | None]":
    """The partitions of a question, where the options of `PARTED` ask for them."""
    count, address, folder = (options.pop(name) for name in ("workers", "dask", "partitions"))
    if count == 1 and address is None and folder is None:
        yield None
        return
    from ..partitions import Workers, partitions_of

    with partitions_of(question(), Workers(count, address), folder, output) as found:
        yield found
