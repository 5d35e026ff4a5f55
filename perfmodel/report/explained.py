"""An explanation in the terminal: the answer, the waterfall, what limits each phase, where the verdict turns."""

from .. import units
from ..questions.anatomy import Phase
from ..questions.explanation import Explanation
from ..questions.sentences import notes_by_method
from .crossings import crossing_in_words
from .figures import headline, outside_told, phase_table
from .plain import notes, paragraph, show, table

BAR = 12  # characters of the longest bar
SMALL = 0.002  # of the longer step: parts that change by less are summed up
PHASES_EXPLAINED = (
    "compute, memory, waits: time in kernels that either limits, and without a kernel{}; the largest is the regime. "
    "peak, traffic: its FLOPs at the datasheet's peak, its bytes at the full bandwidth; host: time to dispatch it"
)


def show_explanation(e: Explanation) -> None:
    """The answer first, then its parts."""
    show(paragraph(e.answer), bold=True)
    show(f"{headline(e.a)}\nA: {e.labels[0]}\nB: {e.labels[1]}\n")
    show(f"{_waterfall(e)}\n")
    shown, told = _phases({"A": e.before.phases, "B": e.after.phases})
    show(shown)
    show(paragraph(PHASES_EXPLAINED.format(f"; {told}" if told else "")), dim=True)
    if e.crossovers:
        show("\nwhere the verdict turns (5 % either way is the same)")
    for crossover in e.crossovers:
        show(paragraph(f"  {crossing_in_words(crossover, e.labels)}", indent="    "))
    notes(notes_by_method((e.a, e.b)))


def _waterfall(e: Explanation) -> str:
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
    return table(("from A to B", "A", "B", "change", ""), rows, left=(0, 4))


def _bar(share: float) -> str:
    return ("+" if share > 0 else "-") * round(abs(share) * BAR)


def _phases(steps: dict[str, dict[str, Phase]]) -> tuple[str, str]:
    """Each phase with what takes its time, and the floors under it, all in one unit; and what rare columns mean."""
    named = [(f"{step} {name}", p) for step, phases in steps.items() for name, p in phases.items()]
    unit, limits, rows = phase_table([p for _, p in named])
    heads = ["", f"time, {unit}", "regime", *limits, "waits", "peak", "traffic", "host"]
    lines = [[name, time, p.regime, *rest] for (name, p), (time, *rest) in zip(named, rows, strict=True)]
    told = outside_told(limits)
    if not told:
        return table(heads, lines, left=(0, 2)), told
    floors = len(heads) - 3  # with further columns one table is wider than a terminal
    above = table(heads[:floors], [line[:floors] for line in lines], left=(0, 2))
    below = table(["", *heads[floors:]], [[line[0], *line[floors:]] for line in lines])
    return f"{above}\n\n{below}", told
