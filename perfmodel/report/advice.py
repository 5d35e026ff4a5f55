"""What `advise` shows in the terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.markup import escape

from ..advise import Advice, Candidate, Change
from ..advise import Progress as Report
from . import units
from .terminal import console, table

SHOWN = 8  # changes and candidates in a table
WORTH = 0.005  # of the step: smaller gains are not worth a line


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
    samples = p.setup.batch * p.setup.grad_accum
    console.print(
        f"[bold]{escape(p.method)}[/] on [bold]{escape(p.model)}[/], {escape(p.device)}, "
        f"{samples} sample{'' if samples == 1 else 's'} of {p.setup.seq} tokens a step: "
        f"{units.seconds(s.seconds)}, {units.nbytes(s.peak)}"
        f"{'' if s.fits else ', [red]which does not fit[/]'}"
    )
    if a.best is None:
        console.print(f"[bold red]Nothing that was tried fits in {units.nbytes(a.limit)}.[/]")
    elif not a.path:
        console.print("[bold]This is already the fastest that was found.[/]")
    else:
        ratio = s.seconds / a.best.seconds
        what = "faster" if ratio >= 1 else "the speed, but it fits"
        console.print(
            f"[bold]{ratio:.2f}x {what}: {units.seconds(a.best.seconds)}, {units.nbytes(a.best.peak)}, "
            f"with {escape(_listed(a.best.changes))}[/]\n"
        )
        console.print(table("", ("one change after another", "change", "step", "peak"), map(_after, a.path)))
    gains = [c for c in a.alone if c.seconds < -WORTH * s.seconds]
    if gains:
        console.print()
        console.print(table("", ("each by itself", "change", "step", "peak"), map(_after, gains[:SHOWN])))
    if len(a.front) > 1:
        console.print()
        console.print(
            table(
                "",
                ("step", "peak", "trains", "time against memory"),
                map(_candidate, a.front[:SHOWN]),
                left=0,
                text_last=True,
            )
        )
    if any(not c.after.fits for c in [*a.path, *gains[:SHOWN]]):
        console.print("[dim]* does not fit[/]")
    kind = "all combinations" if a.exhaustive else "one knob turned at a time from where you are"
    console.print(
        f"\n[dim]{a.tried:,} setups tried ({kind}). Quality is outside the model: other methods, ranks and precisions "
        "learn differently.[/]"
    )


def _listed(changes: tuple[str, ...]) -> str:
    return changes[0] if len(changes) == 1 else ", ".join(changes[:-1]) + " and " + changes[-1]


def _after(c: Change) -> list[str]:
    gain = ("-" if c.seconds < 0 else "+") + units.seconds(abs(c.seconds))
    return [c.label, gain, units.seconds(c.after.seconds), units.nbytes(c.after.peak) + ("" if c.after.fits else "*")]


def _candidate(c: Candidate) -> list[str]:
    what = ", ".join(c.changes) or "as you are"
    return [units.seconds(c.seconds), units.nbytes(c.peak), units.count(c.prediction.trainable_params), what]
