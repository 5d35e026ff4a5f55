"""Does anything get lost? Stops programs while they write, or takes away what they need, and looks at their files.

    python -m tests.injection

For each kind of file and each fault, some tries in forks of this process: the program writes version after version, or
entry after entry, telling how far it is, until the fault. What it told of has to be in the file once (nothing lost, or
there twice), the file has to be whole (not torn), and the program, begun again, has to come to its end (not stuck).
`ended` counts programs that the fault ended, `error` those that ended neither well nor in one clear line, `left` files
beside theirs that killed ones could not remove.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from perfmodel.errors import UserError
from perfmodel.report.plain import print_json, show, table

from .commands import commands_under_faults
from .faults import FAULTS, NONE, Fault, as_a_command
from .targets import TARGETS, WRITES, Target, TornError

LONGEST = 20.0  # s that a program may take
COLUMNS = ("tries", "ended", "lost", "twice", "torn", "stuck", "error", "left")
WRONG = COLUMNS[2:7]
FINE, REFUSED, INTERRUPTED, BROKEN = 0, 2, 130, 70  # exit codes


def in_a_fork(target: Target, folder: Path, fault: Fault, place: int, after: float) -> tuple[int, int]:
    """Run a target's program under a fault; its exit code (negative: the signal that ended it), writes that it told."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os._exit(program(target, folder, fault, place, writer))
    os.close(writer)
    if fault.sent:
        os.read(reader, 1)  # it has begun
        time.sleep(after)
        os.kill(child, fault.sent)
    deadline = time.monotonic() + LONGEST
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.001)
        if time.monotonic() > deadline:
            os.kill(child, 9)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    return os.waitstatus_to_exitcode(done[1]), max(told, default=0)


def program(target: Target, folder: Path, fault: Fault, place: int, writer: int) -> int:
    """Write, as a command would: its exit code."""
    as_a_command()
    try:
        os.write(writer, b"\0")
        fault.inject(place, folder)
        target.write(folder, lambda done: os.write(writer, bytes([done])) and None)
    except UserError:
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:
        return int(str(end.code))
    except BaseException as error:
        print(f"{target.name}, {fault.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return BROKEN
    return FINE


def tried(target: Target, fault: Fault, drawn: random.Random) -> Counter[str]:
    """One try: what was wrong with the file after it, and after the program was begun again."""
    found: Counter[str] = Counter(tries=1)
    folder = Path(tempfile.mkdtemp(prefix="injection-"))
    folder.chmod(0o777)
    try:
        code, told = in_a_fork(target, folder, fault, drawn.randrange(1 << 20), drawn.uniform(0.0, 0.02))
        folder.chmod(0o777)
        found["ended"] += code != FINE
        found["error"] += code == BROKEN
        found["left"] += sum(path.name.endswith(".part") for path in folder.iterdir())
        found += judged(target, folder, told)
        if not found["torn"]:
            again, _ = in_a_fork(target, folder, NONE, 0, 0.0)
            expected = list(range(WRITES)) if target.adds else [WRITES - 1]
            found["stuck"] += again != FINE or target.held(folder) != expected
        return found
    finally:
        shutil.rmtree(folder)


def judged(target: Target, folder: Path, told: int) -> Counter[str]:
    """What is wrong with what a folder holds, of a program that told of so many writes."""
    try:
        held = target.held(folder)
    except TornError as error:
        print(f"{target.name}: {error}", file=sys.stderr)
        return Counter(torn=1)
    last = held[-1] + 1 if held else 0
    doubled = len(held) - len(set(held))
    whole = held == list(range(last)) if target.adds else len(held) <= 1
    return Counter(lost=int(last < told or not (whole or doubled)), twice=doubled)


def main() -> None:
    """Try all, print the table; the exit code is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10, help="of each fault on each kind of file (10)")
    parser.add_argument("--seed", type=int, default=0, help="of places and moments (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    drawn = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    for fault in FAULTS:
        for target in TARGETS:
            found: Counter[str] = Counter()
            for _ in range(options.tries):
                found += tried(target, fault, drawn)
            rows.append({"fault": fault.name, "file": target.name, **{name: found[name] for name in COLUMNS}})
    rows += [{**dict.fromkeys(rows[0], 0), **row} for row in commands_under_faults()]
    if options.json:
        print_json(rows)
    else:
        show(table(("fault", "file", *COLUMNS), [list(row.values()) for row in rows], left=(0, 1)))
    wrong = sum(row[name] for row in rows for name in WRONG)
    tries, ended = (sum(row[name] for row in rows) for name in COLUMNS[:2])
    show(f"\n{tries} tries, {ended} ended by a fault: {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
