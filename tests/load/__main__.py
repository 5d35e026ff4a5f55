"""Does the page stand many at once, and strangers? Starts `perfmodel app` on loopback and asks it as browsers do.

    pip install -e '.[app]' && python -m tests.load

So many clients ask for so many minutes, each its own questions (fields, links, files, what is refused, every GPU), and
compare each answer with what the library answers to it alone: an answer to somebody else would differ. Whoever is told
that too many wait asks again later. Before that come requests that no page makes, somebody who never reads, lines that
hardly move, and many questions all at once. The memory is that of the server's process, its slope that of a line
through the second half of the time. The exit code is 1 if anything is wrong.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from statistics import linear_regression, median, quantiles
from typing import Any

from perfmodel.app.guard import AT_ONCE, WAITING
from perfmodel.report.plain import print_json, show, table

from .asking import Refused, Visitor, functions_of
from .hostile import refused, slowly, unread
from .server import Server, served
from .visitors import Question, questions_of

NEW = 0.5  # how often who has an answer comes back as somebody else
PAUSE = 1.0  # s after which one asks again who was told that too many wait
SAMPLE = 1.0  # s between two looks at the memory
STEADY = 5.0  # min from which the memory may be judged
MOST_GROWTH = 1.0  # MB a minute of a memory that is flat


@dataclass
class Findings:
    """What came of it: answers, refusals because too many wait, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, float]] = field(default_factory=list)  # (minutes, MB)
    rows: list[list[Any]] = field(default_factory=list)

    def check(self, what: str, tries: int, wrong: list[str], more: str = "") -> None:
        """A line of the table."""
        self.rows.append([what, tries, len(wrong), more])
        self.wrong += [f"{what}: {said}" for said in wrong]


async def visit(server: Server, functions: dict[str, int], mine: list[Question], end: float, found: Findings) -> None:
    """Ask at random until the end, in a session that is a new one now and then."""
    visitor, drawn = Visitor(server.port, functions), random.Random(mine[0].answer[-1])
    while time.monotonic() < end:
        question = drawn.choice(mine)
        began = time.monotonic()
        try:
            given = await visitor.ask(question.name, question.values, question.query, question.event)
        except Refused as no:
            found.counts["refused" if no.status == 503 else "failed"] += 1
            if no.status != 503:
                found.wrong.append(str(no))
            await asyncio.sleep(PAUSE * drawn.uniform(0.5, 1.5))
            continue
        found.seconds.append(time.monotonic() - began)
        found.counts["answers"] += 1
        if wrong := question.wrong(given):
            found.wrong.append(wrong)
        if drawn.random() < NEW:
            visitor = Visitor(server.port, functions)


async def watch(server: Server, began: float, found: Findings) -> None:
    """Note the memory now and then."""
    while True:
        found.memory.append(((time.monotonic() - began) / 60, server.rss / 1e6))
        await asyncio.sleep(SAMPLE)


async def burst(server: Server, functions: dict[str, int], questions: list[Question], at_once: int) -> list[str]:
    """More questions at once than may wait: the others are refused, and those that are taken are answered."""

    async def one(number: int) -> str | None:
        question, visitor = questions[number % len(questions)], Visitor(server.port, functions)
        try:
            return question.wrong(await visitor.ask(question.name, question.values, question.query, question.event))
        except Refused as no:
            return None if no.status == 503 else str(no)

    ends = await asyncio.gather(*map(one, range(at_once)))
    wrong = [end for end in ends if end]
    taken, most = at_once - ends.count(None), 2 * (WAITING + AT_ONCE * len(functions))  # some leave before others come
    if taken > most:
        wrong.append(f"{taken} of {at_once} at once were let wait")
    return wrong


async def strangers(server: Server, functions: dict[str, int], question: Question, lines: int, found: Findings) -> None:
    """What no page sends, by kind."""
    kinds: dict[str, list[str]] = {}
    for kind, wrong in await refused(server.port, functions):
        kinds.setdefault(kind, []).append(wrong)
    for kind, ends in kinds.items():
        found.check(kind, len(ends), list(filter(None, ends)))
    found.check("asks and never reads", 1, list(filter(None, [await unread(server.port, functions, question)])))
    if lines:
        wrong, said = await slowly(server.port, functions, question, lines)
        found.check("slow lines", lines, [wrong] if wrong else [], said)


async def tried(server: Server, clients: int, minutes: float, at_once: int, lines: int) -> Findings:
    """All of it."""
    found, functions = Findings(), functions_of(server.port)
    questions = [list(questions_of(number)) for number in range(clients)]
    began = time.monotonic()
    watching = asyncio.create_task(watch(server, began, found))
    await strangers(server, functions, questions[0][0], lines, found)
    flat = [question for mine in questions for question in mine if question.name != "everywhere"]
    found.check("at once", at_once, await burst(server, functions, flat, at_once))
    start, before = time.monotonic(), len(found.wrong)
    await asyncio.gather(*(visit(server, functions, mine, start + 60 * minutes, found) for mine in questions))
    wrong = found.wrong[before:]
    del found.wrong[before:]
    said = [
        f"{found.counts['refused']} told to wait",
        f"{found.counts['answers'] / (time.monotonic() - start):.1f} a second",
    ]
    if len(found.seconds) > 1:
        said.append(f"median {median(found.seconds):.1f} s, 95 % within {quantiles(found.seconds, n=20)[-1]:.1f} s")
    found.check(f"{clients} clients, {minutes:g} min", found.counts["answers"], wrong, "; ".join(said))
    watching.cancel()
    remember(server, minutes, (start - began) / 60, found)
    return found


def remember(server: Server, minutes: float, start: float, found: Findings) -> None:
    """The memory's line, and what is left behind."""
    steady = [(minute, mb) for minute, mb in found.memory if minute >= start + minutes / 2]
    slope = linear_regression(*zip(*steady, strict=True)).slope if len(steady) > 2 else 0.0
    last = found.memory[-1][1]
    grew = minutes >= STEADY and slope > MOST_GROWTH
    said = f"{slope:+.2f} MB/min in the second half; {found.memory[0][1]:.0f} MB at first, {last:.0f} MB at last"
    found.check("memory", len(found.memory), [f"{slope:.2f} MB a minute"] if grew else [], said)
    found.check("files left", 1, server.left())
    wrong = server.errors() + ["control characters"] * server.unprintable()
    found.check("its streams", 1, wrong, f"{server.open_files} open files")


def main() -> None:
    """Try all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100, help="that ask at the same time (100)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for which they do (10)")
    parser.add_argument("--at-once", type=int, default=300, help="questions that come all at once (300)")
    parser.add_argument("--lines", type=int, default=200, help="connections that hardly move (200)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    with served() as server:
        found = asyncio.run(tried(server, options.clients, options.minutes, options.at_once, options.lines))
    if options.json:
        print_json({"rows": found.rows, "wrong": found.wrong, "memory": found.memory})
    else:
        show(table(("what", "tries", "wrong", ""), found.rows, left=(0, 3)))
    for wrong in found.wrong[:50]:
        print(wrong, file=sys.stderr)
    sys.exit(1 if found.wrong else 0)


if __name__ == "__main__":
    main()
