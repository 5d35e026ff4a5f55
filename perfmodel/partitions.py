"""A job in partitions: each is computed once, here or by workers of Dask, and then is a Parquet file in a folder.

Workers send a partition back as the bytes of its file, and this process writes them, whole or not at all. So no disk
has to be shared, a worker that dies loses nothing but what it was at, and whoever asks the same again goes on where it
was.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np

from .errors import UserError
from .resources import DATA, read_json, write_text, written
from .values import immutable

T = TypeVar("T")
Columns = dict[str, np.ndarray]
Part = Callable[[], Sequence[Columns]]  # makes the blocks of a partition, in any process

QUESTION = "_question.json"  # readers of data sets pass over what begins with an underscore or a point
NAME = re.compile(r"part-(\d{6})\.parquet")
MARK = b"perfmodel"  # the key under which a file says whose it is
AHEAD = 256  # tasks that a cluster has at a time, whatever the size of the job
PATIENCE = 10  # s until a scheduler has answered, and until it has a worker
SHOWN = 80  # characters of a value in a complaint
INSTALL = "pip install 'perfmodel[cluster]'"


@immutable
class Workers:
    """Who computes.

    Attributes:
        count: processes of this machine; of one, this process.
        address: of a Dask scheduler in their place, such as tcp://host:8786.
    """

    count: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.address is not None and self.count > 1:
            raise UserError("give --workers for processes of this machine, or --dask for those of a cluster: not both")
        if self.address is not None and not self.address.strip():
            raise UserError("--dask takes the address of a scheduler, such as tcp://host:8786: this one is empty")

    @property
    def here(self) -> bool:
        """Whether it is this process, without Dask."""
        return self.count == 1 and self.address is None


def fingerprint(*values: Any) -> str:
    """A few characters for values: the same in every process; others for other values."""
    return sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(values)).encode()).hexdigest()[:16]


@cache
def program_digest() -> str:
    """A fingerprint of the package and its data: rows of other programs are other rows."""
    found = sha256()
    for path in sorted([*Path(__file__).parent.rglob("*.py"), *DATA.rglob("*.toml")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Partitions:
    """The partitions of a question in a folder, which is made if it is not there.

    Raises:
        UserError: a folder that cannot be made, that holds something else, or partitions of another question; a
            partition that is broken.
    """

    def __init__(self, folder: Path, question: Mapping[str, Any], workers: Workers) -> None:
        self.folder, self.workers = folder, workers
        asked = json.loads(json.dumps({**question, "program": program_digest()}, default=repr))
        self.mark = fingerprint(asked)
        try:
            names = sorted(os.listdir(folder)) if os.path.lexists(folder) else []
            if QUESTION in names:
                self._check(asked)
            elif strange := [name for name in names if not name.startswith(".")]:
                raise UserError(f"{folder}: holds no partitions but {strange[0]!r}: give a new or an empty folder")
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / QUESTION, json.dumps(asked, indent=1))
        except OSError as error:
            raise UserError(f"{folder}: cannot hold partitions ({error.strerror})") from None
        numbers = (int(found[1]) for found in map(NAME.fullmatch, names) if found)
        self.done = {number for number in numbers if self._opened(number)}

    def _check(self, asked: Mapping[str, Any]) -> None:
        found = read_json(self.folder / QUESTION)
        for key in dict.fromkeys([*asked, *found]):
            if asked.get(key) != found.get(key):
                theirs, ours = (_short(q.get(key, "not given")) for q in (found, asked))
                raise UserError(
                    f"{self.folder}: partitions of another question, whose {key} is {theirs} and not {ours}: "
                    f"remove it, or give another folder (--partitions)"
                )

    def fill(self, parts: Iterable[Part], told: Callable[[int], None]) -> None:
        """Compute what is not there yet.

        Args:
            told: is called with the number of each partition that is there, those of before first.

        Raises:
            UserError: what a part raises, and as `answered`.
        """
        for number in sorted(self.done):
            told(number)
        todo = ((n, partial(as_parquet, part, self._marked(n))) for n, part in enumerate(parts) if n not in self.done)
        for number, content in answered(todo, self.workers):
            with written(self._path(number)) as place:
                place.write_bytes(content)
            self.done.add(number)
            told(number)

    def columns(self, number: int, block: int = 0) -> Columns:
        """A block of a partition."""
        import pyarrow as pa

        try:
            table = self._opened(number).read_row_group(block)
        except (OSError, pa.ArrowException) as error:
            raise self._broken(number, error) from None
        found = {name: table[name].to_numpy() for name in table.column_names}
        return {name: values.astype(str) if values.dtype == object else values for name, values in found.items()}

    def remove(self) -> None:
        """Remove the partitions, and the folder if there is nothing else in it."""
        ours = [path for path in self.folder.iterdir() if path.name.startswith(("part-", ".part-", QUESTION))]
        for path in ours:
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06}.parquet"

    def _marked(self, number: int) -> str:
        return f"{self.mark} {number}"

    def _opened(self, number: int) -> Any:
        """The file of a partition, whose end is whole and says that it is this one."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            found = pq.ParquetFile(self._path(number), page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise self._broken(number, error) from None
        if (found.schema_arrow.metadata or {}).get(MARK, b"").decode() != self._marked(number):
            raise UserError(f"{self._path(number)}: a partition of another question: remove it, or give another folder")
        return found

    def _broken(self, number: int, error: Exception) -> UserError:
        return UserError(f"{self._path(number)}: broken ({error}): remove it, and it is computed again")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@contextmanager
def partitions_of(
    question: Mapping[str, Any], workers: Workers, folder: Path | None, output: Path | None = None
) -> Iterator[Partitions]:
    """The partitions of a question.

    Args:
        folder: where they are and stay; None: beside the output until all went well, or for this process only.
    """
    with ExitStack() as stack:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UserError(f"partitions need pyarrow: {INSTALL}") from None
        beside = None if output is None else output.with_name(f"{output.name}.partitions")
        at = folder or beside or Path(stack.enter_context(TemporaryDirectory(prefix="perfmodel-")))
        found = Partitions(at, question, workers)
        yield found
        if folder is None:
            found.remove()


def as_parquet(part: Part, mark: str) -> bytes:
    """A partition as a Parquet file, a row group for each block.

    Args:
        mark: says whose it is.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink, writer = pa.BufferOutputStream(), None
    for columns in part():
        table = pa.table(columns).replace_schema_metadata({MARK: mark})
        writer = writer or pq.ParquetWriter(sink, table.schema, write_page_checksum=True)
        writer.write_table(table, row_group_size=max(1, len(table)))
    assert writer is not None
    writer.close()
    content: bytes = sink.getvalue().to_pybytes()
    return content


def answered(tasks: Iterable[tuple[int, Callable[[], T]]], workers: Workers) -> Iterator[tuple[int, T]]:
    """(number of a task, its answer) of each, as they come.

    A task whose worker dies is given to another one. Processes of this machine begin with the first task.

    Raises:
        UserError: what a task raises; no cluster, or one that is lost; workers that run another program, or that this
            task ends again and again.
    """
    waiting = iter(tasks)
    first = list(islice(waiting, 1))
    if not first or workers.here:
        yield from ((number, task()) for number, task in chain(first, waiting))
        return
    with _client(workers) as client:
        yield from _of_cluster(client, chain(first, waiting))


def _of_cluster(client: Any, waiting: Iterator[tuple[int, Callable[[], T]]]) -> Iterator[tuple[int, T]]:
    from distributed import as_completed

    numbers: dict[str, int] = {}
    running = as_completed()

    def begin(most: int) -> None:
        for number, task in islice(waiting, most):
            future = client.submit(_same_program, task, program_digest(), pure=False)
            numbers[future.key] = number
            running.add(future)

    begin(AHEAD)
    for future in running:
        begin(1)
        yield numbers.pop(future.key), future.result()


def _same_program(task: Callable[[], T], asked: str) -> T:
    """What a worker does, in a thread that Dask's profiler does not watch.

    It keeps frames of what it watches, and so their tensors: a step would be said to hold more memory.
    """
    if program_digest() != asked:
        raise UserError("the workers run another perfmodel than this one: install the same there")
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(task).result()


@contextmanager
def _processes(count: int) -> Iterator[Any]:
    """A cluster of processes of this machine, at ports of it that take whoever has its key, which is made here."""
    import dask.config
    from distributed import LocalCluster

    quiet = {"dashboard_address": None, "silence_logs": logging.CRITICAL}
    # Dask has malloc give back what is free from 64 kB on: our arrays would fetch it again, two thirds of the time.
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None}),
        LocalCluster(n_workers=count, threads_per_worker=1, security=True, **quiet) as cluster,
    ):
        yield cluster


@contextmanager
def _client(workers: Workers) -> Iterator[Any]:
    """A client of a cluster that has a worker; its troubles are a line each."""
    try:
        import cryptography  # noqa: F401  # for the key of `_processes`
        from distributed import Client
        from distributed.client import FutureCancelledError
        from distributed.scheduler import KilledWorker
        from distributed.utils import silence_logging_cmgr
    except ImportError as error:
        raise UserError(f"--workers and --dask need dask.distributed ({error.name} is missing): {INSTALL}") from None
    name = f"--dask {workers.address}" if workers.address is not None else "--workers"
    with ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))  # what matters is told below
        try:
            where = stack.enter_context(_processes(workers.count)) if workers.address is None else workers.address
            client = stack.enter_context(Client(where, timeout=PATIENCE))
            client.wait_for_workers(1, timeout=PATIENCE)
            # A worker that cannot read a task ends, and then the next: so whether they can is asked first.
            client.run(resolve_name, f"{__name__}:INSTALL")
        except (OSError, ValueError, RuntimeError, TypeError, AssertionError) as error:  # the last two: certificates
            why = str(error).partition("\n")[0] or "TLS?"
            raise UserError(f"{name}: no Dask cluster that computes ({why})") from None
        except (ImportError, AttributeError) as error:
            raise UserError(f"{name}: workers without what this perfmodel needs ({error}): {INSTALL} there") from None
        try:
            yield client
        except KilledWorker:
            raise UserError("a part of the work ended all who took it: short of memory? try fewer workers") from None
        except FutureCancelledError:
            raise UserError(f"{name}: the cluster was lost; the same command goes on where it was") from None
