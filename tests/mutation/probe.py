"""Notes which test reaches which function. Laid into a copy of the checkout whose functions begin with `reached(name)`.

A plugin of pytest, and a module of the processes that tests start: those learn the test's name from the environment.
"""

import json
import os
from typing import Any

CASES = 24  # of a test with more, so many, spread evenly: the oracle has a case an architecture
FILE = os.environ.get("REACH_FILE", os.devnull)
seen: set[str] = set()
test = os.environ.get("PYTEST_CURRENT_TEST", "")  # "tests/test_x.py::test_y[case] (call)", as pytest writes it


def reached(function: str) -> None:
    """Note a function for the test that runs, once."""
    if function not in seen:
        seen.add(function)
        if test:
            write({"test": test.rsplit(" (", 1)[0], "reached": function})


def write(line: dict[str, Any]) -> None:
    """Append a line in one piece: other processes write too."""
    file = os.open(FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (json.dumps(line) + "\n").encode())
    os.close(file)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Leave out most cases of tests that have many: a mutant meets few of them anyway."""
    cases: dict[str, list[Any]] = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    items[:] = [c for found in cases.values() for c in found[:: -(-len(found) // CASES)]]


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins: everything may be reached again."""
    global test
    test = nodeid + " ("
    seen.clear()


def pytest_runtest_logreport(report: Any) -> None:
    """The seconds that a test took in each of its phases, and whether it passed."""
    write({"test": report.nodeid, "seconds": report.duration, "passed": report.outcome != "failed"})
