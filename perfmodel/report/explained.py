"""An explanation in the terminal: the answer, the waterfall, what limits each phase, where the verdict turns."""

from rich.markup import escape
from rich.table import Table

from ..anatomy import Phase
from ..explanation import Explanation
from . import units
from .crossings import in_words
from .terminal import console, headline, notes, table

BAR = 12  # characters of the longest bar
SMALL = 0.002  # of the longer step: parts that change by less are summed up
PHASES_EXPLAINED = (
    "compute, memory, waits: time in kernels that either limits, and without a kernel; the largest is the regime. "
    "peak, traffic: its FLOPs at the datasheet's peak, its bytes at the full bandwidth; host: time to dispatch it"
)


def show_explanation(e: Explanation) -> None:
    """The answer first, then its parts."""
    told = escape(f"{headline(e.a)}\nA: {e.labels[0]}\nB: {e.labels[1]}\n")
    console.print(f"[bold]{escape(e.answer)}[/]\n{told}")
    console.print(_waterfall(e))
    console.print()
    console.print(_phases({"A": e.before.phases, "B": e.after.phases}))
    console.print(f"[dim]{PHASES_EXPLAINED}[/]")
    if e.crossovers:
        console.print("\nwhere the verdict turns (5 % either way is the same)")
        for crossover in e.crossovers:
            console.print(f"  {escape(in_words(crossover, e.labels))}")
    notes(dict.fromkeys([*e.a.notes, *e.b.notes]))


def _waterfall(e: Explanation) -> Table:
    """The parts by the size of their change, bars to scale, and the step that they sum to."""
    longest = max(abs(bar.difference) for bar in e.waterfall) or 1.0
    small = SMALL * max(e.before.total, e.after.total)
    shown = [bar for bar in e.waterfall if abs(bar.difference) >= small]
    rest = [bar for bar in e.waterfall if abs(bar.difference) < small]
    lines = [(bar.name, bar.before, bar.after, bar.difference) for bar in shown]
    if rest:
        sums = [sum(getattr(bar, field) for bar in rest) for field in ("before", "after", "difference")]
        lines.append(("what hardly changes", *sums))
    rows = [
        [name, units.seconds(before), units.seconds(after), units.signed(change), _bar(change / longest)]
        for name, before, after, change in lines
    ]
    total = (e.before.total, e.after.total)
    rows.append(["step", *map(units.seconds, total), units.signed(total[1] - total[0]), ""])
    made = table("", ("from A to B", "A", "B", "change", ""), rows)
    made.columns[-1].justify = "left"
    return made


def _bar(share: float) -> str:
    return ("+" if share > 0 else "-") * round(abs(share) * BAR)


def _phases(steps: dict[str, dict[str, Phase]]) -> Table:
    """Each phase with what takes its time, and the floors under it."""
    rows = [
        [
            f"{step} {name}", units.seconds(p.seconds), p.regime, units.seconds(p.limited["compute"]),
            units.seconds(p.limited["memory"]), units.seconds(p.waiting), units.seconds(p.at_peak),
            units.seconds(p.at_bandwidth), units.seconds(p.host),
        ]
        for step, phases in steps.items()
        for name, p in phases.items()
    ]  # fmt: skip
    return table("", ("", "time", "regime", "compute", "memory", "waits", "peak", "traffic", "host"), rows)
