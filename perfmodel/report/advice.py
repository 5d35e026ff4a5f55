"""What `advise` shows in the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .. import units
from ..questions.advice import Advice, Candidate, Change
from ..questions.advice import Progress as Report
from ..setup import PAIRS
from .figures import gpus_of
from .plain import notes, paragraph, show, table

SHOWN = 8  # changes and candidates in a table
WORTH = 0.005  # of the step: smaller gains are not worth a line
COLUMNS = ("change", "step", "peak")


@contextmanager
def searching() -> Iterator[Report]:
    """A progress bar over the methods of a search, where someone watches."""
    if not sys.stderr.isatty():
        yield lambda done, total, name: None
        return
    from .progress import progress

    with progress(counted=False) as bar:
        task = bar.add_task("searching")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)


def show_advice(a: Advice) -> None:
    """The answer in a sentence, the way there, each change by itself, and time against memory."""
    s, p = a.start, a.start.prediction
    n = p.setup.batch * p.setup.grad_accum * p.setup.replicas
    what = ("pair" if p.setup.objective in PAIRS else "sample") + ("" if n == 1 else "s")
    of = f"{'up to ' if p.setup.lengths else ''}{p.setup.seq} tokens a step"
    where = f"{p.method} on {p.model}, {gpus_of(p.setup, p.device)}, {n} {what} of {of}"
    where += f", {units.percent(p.padding, 1)} of the tokens are padding" if p.setup.lengths else ""
    fits = "" if s.fits else ", which does not fit"
    show(paragraph(f"{where}: {units.seconds(s.seconds)}, {units.nbytes(s.peak)}{fits}"))
    show(paragraph(advice_answer(a)), bold=True)
    if a.path:
        show("\n" + table(("one change after another", *COLUMNS), [change_cells(c) for c in a.path]))
    gains = [c for c in a.alone if c.seconds < -WORTH * s.seconds][:SHOWN]
    if gains:
        show("\n" + table(("each by itself", *COLUMNS), [change_cells(c) for c in gains]))
    if len(a.front) > 1:
        heads = ("step", "peak", "trains", "time against memory")
        show("\n" + table(heads, [_candidate(c) for c in _spread(a.front)], left=(3,)))
    if any(not c.after.fits for c in [*a.path, *gains]):
        show("* does not fit", dim=True)
    kind = "all combinations" if a.exhaustive else "one knob turned at a time from where you are"
    tried = f"{a.tried:,} setups tried ({kind}). Quality is outside the model: other methods, ranks and precisions "
    show("\n" + paragraph(tried + "learn differently."), dim=True)
    notes(p.notes)


def _spread(front: list[Candidate]) -> list[Candidate]:
    """As many as are shown, from the smallest to the fastest."""
    last = len(front) - 1
    return [front[round(i * last / (SHOWN - 1))] for i in range(SHOWN)] if last >= SHOWN else front


def advice_answer(a: Advice) -> str:
    """What to run, in a sentence."""
    if a.best is None:
        return f"Nothing that was tried fits in {units.nbytes(a.limit)}."
    if not a.path:
        return "This is already the fastest that was found."
    ratio = a.start.seconds / a.best.seconds
    what = "faster" if ratio >= 1 else "the speed, but it fits"
    found = f"{units.seconds(a.best.seconds)}, {units.nbytes(a.best.peak)}"
    return f"{ratio:.2f}x {what}: {found}, with {_listed(a.best.changes)}"


def _listed(changes: tuple[str, ...]) -> str:
    return changes[0] if len(changes) == 1 else ", ".join(changes[:-1]) + " and " + changes[-1]


def change_cells(c: Change) -> list[str]:
    """The row of a change: its label, what it gains, and the step and peak with it."""
    gain = ("-" if c.seconds < 0 else "+") + units.seconds(abs(c.seconds))
    return [c.label, gain, units.seconds(c.after.seconds), units.nbytes(c.after.peak) + ("" if c.after.fits else "*")]


def _candidate(c: Candidate) -> list[str]:
    what = ", ".join(c.changes) or "as you are"
    return [units.seconds(c.seconds), units.nbytes(c.peak), units.count(c.prediction.trainable_params), what]
