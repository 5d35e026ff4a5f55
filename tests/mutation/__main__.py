"""Would the tests see a fault? Changes one place of the code at a time, at random, and runs the tests that reach it.

    pip install -e '.[mutation]' && python -m tests.mutation

The places are those that cosmic-ray changes (operators, comparisons, numbers, conditions, loops, decorators), each as
likely as any other, but for annotations: a change of theirs only breaks the import. One run of the suite, with a few
cases of each test, notes which test enters which function. A mutant is killed when a test fails or takes ten times as
long as it did. A survivor passed `--seconds` of the tests that enter its function, and as much of those that enter the
modules that read its module: the share killed is a lower bound. Everything is kept in `--output`: what was stopped goes
on where it was, and `--again` judges survivors over the tests and the time that there are now.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .reach import Reach, measured
from .sample import ROOT, Mutant, sampled

HEAVY = ("numpy", "scipy.optimize", "pandas", "torch", "transformers", "peft", "hypothesis", "click.testing", "rich")
START = 60.0  # s that imports and collection may take at the most
settled: list[Reach] = []  # what a process that judges knows
VERDICTS = ("killed", "killed by time", "survived", "reached by no test")


def copied(to: Path) -> Path:
    """The files of the checkout, apart, so that nobody meets a mutant."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    shutil.rmtree(to, ignore_errors=True)
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def in_a_fork(arguments: list[str], place: Path, limit: float) -> int | None:
    """Run pytest in a fork, which has the heavy libraries already; its exit code, None after `limit` seconds."""
    child = os.fork()
    if child == 0:
        _pytest(arguments, place)
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _pytest(arguments: list[str], place: Path) -> None:
    """pytest over a copy of the checkout; this process ends with it."""
    os.setpgid(0, 0)
    os.chdir(place)
    log = os.open(place / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(place), *(p for p in sys.path if ROOT not in (Path(p or ".").resolve(), Path(p).resolve()))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "perfmodel", "validate")]:
        del sys.modules[name]
    import pytest

    os._exit(int(pytest.main([*arguments, "-q", "-p", "no:cacheprovider", f"--rootdir={place}"])))


def reach(output: Path, told: Callable[[str], None]) -> Reach:
    """Which tests enter which function, measured unless it was."""
    copy = copied(output / "probed")

    def run(arguments: list[str]) -> None:
        in_a_fork(arguments, copy, 3600.0)

    return measured(output / "reach", copy, run, told)


def settle(output: Path, reached: Reach) -> None:
    """A process that judges mutants has a copy of its own, and works there."""
    os.chdir(copied(output / f"copy-{os.getpid()}"))
    settled.append(reached)


def judged(mutant: Mutant, budget: float) -> dict[str, Any]:
    """Apply a mutant in this process's copy, run its tests, and put the file back."""
    place, (known,) = Path.cwd(), settled
    target, changed = place / mutant.path, mutant.text()
    original = target.read_text(encoding="utf-8")
    pairs = zip(original.splitlines(), changed.splitlines(), strict=False)
    shown = next(({"was": a.strip(), "is": b.strip()} for a, b in pairs if a != b), {})
    direct = known.direct(mutant.path, mutant.line)
    verdict = "reached by no test"
    try:
        target.write_text(changed, encoding="utf-8")
        for tests in (direct, [t for t in known.readers(mutant.path) if t not in set(direct)]):
            chosen, seconds = known.within(tests, budget)
            code = in_a_fork([*chosen, "-x"], place, START + 10 * seconds) if chosen else 0
            if code != 0:
                verdict = "killed by time" if code is None else "killed"
                break
            verdict = "survived" if chosen else verdict
    finally:
        target.write_text(original, encoding="utf-8")
    return {**asdict(mutant), **shown, "sha": digest(target), "verdict": verdict, "tests": len(direct)}


def kept(file: Path, sample: list[Mutant]) -> dict[Mutant, dict[str, Any]]:
    """The last verdict on each mutant of the sample whose file is as it was then."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    texts = {(k["path"], k["sha"], k["operator"], k["occurrence"]): k for k in lines}
    found = ((m, texts.get((m.path, digest(ROOT / m.path), m.operator, m.occurrence))) for m in sample)
    return {m: k for m, k in found if k}


def digest(path: Path) -> str:
    """Of a file's text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def report(known: list[dict[str, Any]]) -> None:
    """The survivors, and how many of each verdict."""
    for k in known:
        if not k["verdict"].startswith("killed"):
            print(f"{k['path']}:{k['line']} {k['verdict']} ({k['tests']} tests)\n  - {k.get('was')}\n  + {k.get('is')}")
    counts = {verdict: sum(k["verdict"] == verdict for k in known) for verdict in VERDICTS}
    killed = counts["killed"] + counts["killed by time"]
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + f": {killed / len(known):.1%} of {len(known)}")


def main() -> None:
    """Judge the sample; print the survivors and the share killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=200, help="mutants (200)")
    parser.add_argument("--seed", type=int, default=6, help="of the sample (6)")
    parser.add_argument("--seconds", type=float, default=60, help="of tests a mutant, twice at the most (60)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="stop then; the next run goes on from there"
    )
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (1)")
    parser.add_argument("--again", action="store_true", help="judge what survived before, too")
    parser.add_argument("--output", type=Path, default=ROOT / ".mutation", help="where everything is kept (.mutation)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes

    def told(text: str) -> None:
        if time.monotonic() > end:
            sys.exit("stopped: out of time; run it again to go on")
        print(text, flush=True)

    for name in HEAVY:
        __import__(name)
    results = options.output / f"sample-{options.seed}.jsonl"
    reached, sample = reach(options.output, told), sampled(options.sample, options.seed)
    known = kept(results, sample)
    left = [m for m in sample if m not in known or (options.again and not known[m]["verdict"].startswith("killed"))]
    pool = ProcessPoolExecutor(options.jobs, get_context("fork"), settle, (options.output, reached))
    try:
        judging = {pool.submit(judged, mutant, options.seconds): mutant for mutant in left}
        for i, done in enumerate(as_completed(judging), 1):
            mutant = judging[done]
            known[mutant] = done.result()
            with results.open("a") as file:
                file.write(json.dumps(known[mutant]) + "\n")
            told(f"{i}/{len(left)} {mutant.path}:{mutant.line} {known[mutant]['verdict']}")
    finally:
        pool.shutdown(cancel_futures=True)
        for copy in options.output.glob("copy-*"):
            shutil.rmtree(copy)
    report([known[mutant] for mutant in sample])


if __name__ == "__main__":
    main()
