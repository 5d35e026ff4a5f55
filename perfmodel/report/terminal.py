"""Tables for the terminal (Rich)."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .. import units
from ..methods.parts.periodic import PeriodicCost
from ..prediction.predict import Prediction
from ..program.part import PHASES
from ..questions.comparison import Comparison
from ..questions.sentences import in_words
from .figures import FigureCell, figures, headline, mfu_of, setup_line

console = Console(highlight=False)
COLUMNS = (*PHASES, "total")
PER_TABLE = 4  # methods side by side in a terminal of 80 columns


def table(
    title: str, columns: Sequence[str], rows: Iterable[Iterable[Any]], *, left: int = 1, text_last: bool = False
) -> Table:
    """A plain table; the first `left` columns are text, the others numbers, the last long text if it is `text_last`.

    Where the terminal is narrow, text and heads wrap; numbers and the first of several columns of text do not.
    """
    lines = [[str(cell) for cell in row] for row in rows]
    made = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for i, name in enumerate(columns):
        is_text = i < left or (text_last and i == len(columns) - 1)
        longest = max((Text.from_markup(line[i]).cell_len for line in lines), default=0)
        made.add_column(
            name,
            justify="left" if is_text else "right",
            overflow="fold",
            no_wrap=i == 0 and is_text and (left > 1 or text_last),
            min_width=None if is_text else longest,
        )
    for line in lines:
        made.add_row(*line)
    return made


def show_prediction(p: Prediction) -> None:
    """One prediction: phases, then memory, then notes."""
    console.print(
        f"[bold]{escape(p.method)}[/] on [bold]{escape(p.model)}[/], {escape(p.device)}: {setup_line(p.setup)}"
    )
    console.print(
        f"{units.count(p.trainable_params)} of {units.count(p.total_params)} parameters train "
        f"({100 * p.trainable_params / p.total_params:.2f} %)\n"
    )
    rows: list[list[str]] = [
        ["time", *(units.seconds(p.time.phases[c]) for c in COLUMNS)],
        ["FLOPs", *(units.count(p.flops[c]) for c in COLUMNS)],
        ["memory traffic", *(units.nbytes(p.bytes[c]) for c in COLUMNS)],
        ["kernels", *(f"{p.kernels[c]:,}" for c in COLUMNS)],
        ["ATen calls", *(f"{p.dispatches[c]:,}" for c in COLUMNS)],
    ]
    console.print(table("", ("", *COLUMNS), rows))
    t = p.time
    console.print(
        f"\nstep {units.seconds(t.phases['total'])} [{units.seconds(t.low)} - {units.seconds(t.high)}], device busy "
        f"{units.seconds(t.device_busy)}, waiting for the host {units.percent(t.launch_bound_share)} of the time"
    )
    m = p.memory
    console.print(
        f"peak memory [bold]{units.nbytes(m.peak)}[/] = weights {units.nbytes(m.weights)} + gradients "
        f"{units.nbytes(m.gradients)} + optimizer {units.nbytes(m.optimizer)} + activations and temporaries "
        f"{units.nbytes(m.activations)}; {'fits' if p.fits else '[red]does not fit[/]'}"
    )
    for cost in p.periodic:
        console.print(periodic_line(cost))
    if p.choices:
        console.print()
        console.print(choices_table(p.choices))
    notes(p.notes)


def periodic_line(cost: PeriodicCost) -> str:
    """What comes besides the steps, in words."""
    work = f"{cost.what} {units.seconds(cost.seconds)}"
    traffic = f"{units.count(cost.flops, 'FLOP')}, {units.nbytes(cost.bytes)}"
    if cost.every is None:
        return f"once per run: {work} ({traffic})"
    return f"every {cost.every} steps: {work} ({traffic}), {units.seconds(cost.seconds_per_step)} a step on average"


def choices_table(choices: Sequence[dict[str, Any]]) -> Table:
    """Orders that a method chose for its layers: the cost of each, and the best order of another cost."""
    timed = choices[0]["forward_seconds"] is not None
    rows = []
    for c in choices:
        rows.append([c["layer"].rpartition(".")[2], c["copies"], f"{c['inputs']}x{c['outputs']}"])
        for phase in ("forward", "backward"):
            costs = c[f"{phase}_{'seconds' if timed else 'flops'}"]
            rows[-1] += _why(c[phase], costs, units.seconds if timed else units.count)
    title = f"orders of the products, chosen by {'predicted time' if timed else 'FLOPs'}"
    return table(title, ("layer", "copies", "n x m", "forward", "next", "backward", "next"), rows)


def _why(chosen: int, costs: dict[int, float], show: Callable[[float], str]) -> list[str]:
    cost = costs[chosen]
    others = {order: other for order, other in costs.items() if abs(other / cost - 1) > 1e-6}
    best = min(others, key=lambda order: others[order], default=None)
    return [f"{chosen}: {show(cost)}", "" if best is None else f"{best} {100 * (others[best] / cost - 1):+.1f} %"]


def show_method(row: dict[str, Any]) -> None:
    """One method: what it is, where it comes from, and its options."""
    console.print(f"[bold]{row['method']}[/]: trains {row['trains']}; adds {row['adds']}\n")
    for paragraph in row["description"].split("\n\n"):
        console.print(escape(" ".join(paragraph.split())) + "\n")
    console.print(f"[dim]{row['source']}[/]")
    if row["options"]:
        console.print()
        console.print(table("", ("option", ""), ((o, escape(text)) for o, text in row["options"].items()), left=2))


def notes(told: Iterable[str]) -> None:
    """Notes below a result."""
    for note in told:
        console.print(f"[dim]note: {escape(note)}[/]")


def show_comparison(c: Comparison) -> None:
    """The answer in words, then a column a method; the best value of a row is marked."""
    for speedup in c.speedups:
        console.print(f"[bold]{escape(speedup.answer)}[/]")
    console.print(f"{escape(headline(c.predictions[0]))}\n")
    rows = figures(c)
    for start in range(0, len(c.predictions), PER_TABLE):
        which = slice(start, start + PER_TABLE)
        shown = [[row.name, *(_marked(cell) for cell in row.cells[which])] for row in rows]
        console.print(table("", ("", *(escape(in_words(p)) for p in c.predictions[which])), shown))
    for p in c.predictions:
        for cost in p.periodic:
            console.print(f"{escape(p.method)}, {periodic_line(cost)}")
    console.print(
        "[dim]in brackets the 90 % interval; * best of those that fit; launch-bound: share of the step that waits for "
        f"the host; {mfu_of(c.predictions[0])}[/]"
    )
    notes(dict.fromkeys(note for p in c.predictions for note in p.notes))


def _marked(cell: FigureCell) -> str:
    return f"{cell.text}{' *' if cell.best else '  '}"
