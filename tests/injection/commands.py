"""Commands in processes of their own whose surroundings lack something: streams, a home, a locale, room."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SETUP = "--model gpt2 --device l40s --batch 1 --seq 16"
COMMANDS = (
    f"predict {SETUP}", f"compare {SETUP} --json", f"sweep {SETUP} --batch 1+2", "devices", "methods lora", "nonsense",
    "predict --model gpt2 --device nowhere",
)  # fmt: skip
NOBODY = 12345  # has no entry in any table of users
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "locale C": {"env": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}},
    "no HOME": {"without": ("HOME",)},
    "no HOME and no user": {"without": ("HOME",), "user": NOBODY},
    "closed stdin": {"closed": (0,)},
    "closed stdout": {"closed": (1,)},
    "closed stderr": {"closed": (2,)},
    "all streams closed": {"closed": (0, 1, 2)},
    "full stdout": {"full": True},
}


def commands_under_faults() -> Iterator[dict[str, Any]]:
    """A row for each of the surroundings; `error`: a traceback, or an exit code that is none of a command's."""
    for name, surroundings in SURROUNDINGS.items():
        if "user" in surroundings and not _for_anybody():
            continue
        found: Counter[str] = Counter()
        for command in COMMANDS:
            done = run(command.split(), **surroundings)
            wrong = done.returncode not in (0, 1, 2) or b"Traceback" in done.stderr
            if wrong:
                print(f"{name}: {command}: {done.returncode} {done.stderr.decode()[-500:]}", file=sys.stderr)
            found += Counter(tries=1, ended=done.returncode != 0, error=wrong)
        yield {"fault": name, "file": "answers", **found}


def _for_anybody() -> bool:
    """Whether this process may start one of another user, and that one may start Python."""
    folders = Path(sys.executable).resolve().parents
    return os.getuid() == 0 and all(folder.stat().st_mode & 0o001 for folder in folders)


def run(
    words: list[str], *, env: dict[str, str] | None = None, without: tuple[str, ...] = (), user: int | None = None,
    closed: tuple[int, ...] = (), full: bool = False,
) -> "subprocess.CompletedProcess[bytes]":  # fmt: skip
    kept = {k: v for k, v in os.environ.items() if k not in (*without, "PERFMODEL_HOME")}
    environment = {**kept, "PYTHONPATH": str(ROOT), **(env or {})}

    def close() -> None:
        for stream in closed:
            os.close(stream)

    with _output(full=full) as stdout:
        return subprocess.run(
            [sys.executable, "-m", "perfmodel", *words], cwd="/", env=environment, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.PIPE, check=False, user=user, preexec_fn=close if closed else None,
        )  # fmt: skip


@contextmanager
def _output(*, full: bool) -> Iterator[Any]:
    if not full:
        yield subprocess.DEVNULL
        return
    with open("/dev/full", "wb") as device:
        yield device
