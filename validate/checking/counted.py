"""Numbers of a step that must be as predicted: calls, kernels, collectives and their bytes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from perfmodel.calls import costs
from perfmodel.calls.collectives import exchanges, message_bytes
from perfmodel.program.part import PHASES
from perfmodel.recording.step import Step

from ..measuring.names import plain_collective

Counts = dict[str, dict[str, int]]  # phase -> name -> number


@dataclass(frozen=True)
class Difference:
    """A number of calls, kernels, collectives or their bytes that is not as predicted."""

    phase: str
    name: str
    measured: int
    predicted: int


def calls_of(step: Step) -> Counts:
    """Non-view ATen calls on the tape, by phase and name."""
    counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
    for part, op, times in step.ops():
        if not op.view:
            counts[part.phase][op.name] += times
    return {phase: dict(c) for phase, c in counts.items()}


def kernels_of(step: Step) -> Counts:
    """Device kernels that the tape's calls launch, by phase and name."""
    counts: dict[str, Counter[str]] = {phase: Counter() for phase in PHASES}
    for part, op, times in step.ops():
        if number := int(costs.kernels(op)):
            counts[part.phase][op.name] += times * number
    return {phase: dict(c) for phase, c in counts.items()}


def collectives_of(step: Step) -> dict[str, dict[str, list[int]]]:
    """Collectives on the tape: phase -> plain name -> [number, bytes], as records have them."""
    found: dict[str, dict[str, list[int]]] = {phase: {} for phase in PHASES}
    for part, op, times in step.ops():
        if exchanges(op):
            row = found[part.phase].setdefault(plain_collective(op.name), [0, 0])
            row[0] += times
            row[1] += times * int(message_bytes(op))
    return found


def as_counts(messages: dict[str, dict[str, list[int]]]) -> Counts:
    """Numbers and bytes of collectives, each under a name of its own."""
    return {
        phase: {told: n for name, row in of.items() for told, n in zip((name, f"bytes of {name}"), row, strict=True)}
        for phase, of in messages.items()
    }


def differences(measured: Counts, predicted: Counts, by: Callable[[str], str] = str) -> list[Difference]:
    """Where numbers differ, by phase and the name that `by` gives a call."""
    found = []
    for phase in PHASES:
        have, want = (_sums(counts.get(phase, {}), by) for counts in (measured, predicted))
        found += [
            Difference(phase, name, have[name], want[name])
            for name in sorted(have | want)
            if have[name] != want[name]
        ]  # fmt: skip
    return found


def _sums(counts: dict[str, int], by: Callable[[str], str]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for name, number in counts.items():
        sums[by(name)] += number
    return sums
