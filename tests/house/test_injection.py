"""Files under programs that are stopped while they write: a few tries of `python -m tests.injection`."""

import random
from collections import Counter
from pathlib import Path

import pytest

from tests.injection.__main__ import WRONG, tried
from tests.injection.commands import run
from tests.injection.faults import FAULTS, Fault
from tests.injection.targets import TARGETS, TornError, replaced


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_was_told_to_be_written_is_there_once_and_whole(fault: Fault) -> None:
    """An hour of measuring on a rented machine must outlast whatever ends it."""
    drawn = random.Random(fault.name)
    for target in TARGETS:
        found = tried(target, fault, drawn)
        assert not any(found[name] for name in WRONG), (target.name, found)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize(("words", "code"), [("devices --json", 0), ("nonsense", 2)])
def test_a_command_without_streams_ends_as_with_them(closed: tuple[int, ...], words: str, code: int) -> None:
    """Services and cron jobs start programs so: what cannot be told is not worth a traceback."""
    done = run(words.split(), closed=closed)
    assert (done.returncode, b"Traceback" in done.stderr) == (code, False)


def test_a_file_that_is_written_in_place_is_found_torn() -> None:
    """A check that cannot fail would let everything pass."""

    def write(path: Path, version: int) -> None:
        with path.open("w") as file:
            for _ in range(200):
                file.write(f"{version}" * 100)
                file.flush()

    def read(path: Path) -> int:
        text = path.read_text()
        if len(text) != 200 * 100:
            raise TornError
        return int(text[0])

    within = next(fault for fault in FAULTS if fault.name == "kill within a write")
    drawn, found = random.Random(0), Counter[str]()
    for _ in range(5):
        found += tried(replaced("in place", write, read), within, drawn)
    assert found["torn"]
