"""The reference is Megatron-Core itself, one rank of so many in a process of its own; without it these are skipped.

Adapters are Megatron-Bridge's.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest

pytest.importorskip("peft")

from validate.oracle.cases import Case
from validate.oracle.megatron import cases, compare
from validate.oracle.megatron.program import RealRank, real_rank

pytestmark = pytest.mark.skipif(not cases.has_megatron("core"), reason="megatron-core is not installed")
QUICK = list(cases.megatron_grid("quick"))


def named(case: Case) -> str:
    s = case.setup
    options = [name for name in ("sequence_parallel", "overlap") if getattr(s, name)]
    return " ".join([case.config.name, case.method, s.parallel, f"{s.gpus}/{s.tp}", s.checkpoint, *options])


@cache
def real(number: int) -> RealRank:
    """Each program runs once, whichever test is first."""
    return real_rank(QUICK[number])


@pytest.mark.parametrize("number", range(len(QUICK)), ids=lambda i: named(QUICK[i]))
def test_the_tape_has_the_calls_and_messages_of_megatron(number: int) -> None:
    """Published steps of Megatron are compared with its tape: that has to be the program that they ran."""
    case = QUICK[number]
    if case.method != "full" and not cases.has_megatron("bridge"):
        pytest.skip("megatron-bridge is not installed")
    found = compare.judge_megatron(case, compare.tape_of(case), real(number))
    assert found.calls > 0
    assert found.differences == []


CHANGES: dict[str, Callable[[RealRank], RealRank]] = {  # what is told of a difference -> what makes it
    "collective 0": lambda r: replace(r, collectives=[r.collectives[0]._replace(elements=7), *r.collectives[1:]]),
    "wait 0": lambda r: replace(r, waits=r.waits[1:]),
    "product 0": lambda r: replace(r, multiplied=r.multiplied[1:]),
    "forward": lambda r: replace(r, calls={**r.calls, "forward": Counter()}),
    "optimizer": lambda r: replace(r, calls={**r.calls, "optimizer": Counter()}),
    "parameters": lambda r: replace(r, trainable=r.trainable - 1),
    "peak": lambda r: replace(r, peak=2 * r.peak),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_program_is_noticed(what: str) -> None:
    """A comparison that cannot fail proves nothing."""
    number = next(i for i, case in enumerate(QUICK) if case.method == "full" and case.setup.tp > 1)
    case = QUICK[number]
    found = compare.judge_megatron(case, compare.tape_of(case), CHANGES[what](real(number)))
    assert any(line.startswith(what) for line in found.differences)
