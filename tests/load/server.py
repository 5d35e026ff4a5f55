"""The page's server as people start it, in a process of its own, and what that process takes."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

STARTS = 120.0  # s that it may take


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        folder: its temporary folder, in which nothing may be left.
        log: what it says on its standard streams.
    """

    port: int
    pid: int
    folder: Path
    log: Path

    @property
    def rss(self) -> float:
        """Bytes of memory that it holds."""
        pages = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    @property
    def open_files(self) -> int:
        """Its open files and connections."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def left(self) -> list[str]:
        """Files that it wrote."""
        return [str(path) for path in self.folder.rglob("*") if path.is_file()]

    def errors(self) -> list[str]:
        """How errors end that it tells of, but for those of values that Gradio refuses before the page sees them."""
        _, *told = self.log.read_text(encoding="utf-8", errors="replace").split("Traceback (most recent call last):\n")
        return [re.split(r"\n(?=\S)", text, maxsplit=1)[-1][:200] for text in told if "/perfmodel/" in text]

    def unprintable(self) -> bool:
        """Whether it wrote to its terminal what would move the cursor, or worse."""
        return re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", self.log.read_bytes()) is not None


@contextmanager
def served() -> Iterator[Server]:
    """Start one on a free port of loopback, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as scratch:
        folder, log = Path(scratch, "files"), Path(scratch, "log")
        folder.mkdir()
        environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder), "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "perfmodel", "app", "--port", str(port)]
        with log.open("wb") as said, subprocess.Popen(command, env=environment, stdout=said, stderr=said) as process:
            try:
                _wait_for(f"http://127.0.0.1:{port}/", process, log)
                yield Server(port, process.pid, folder, log)
            finally:
                process.terminate()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + STARTS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(log.read_text(encoding="utf-8").strip())
        try:
            urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise SystemExit(f"the server did not answer within {STARTS:.0f} s")
