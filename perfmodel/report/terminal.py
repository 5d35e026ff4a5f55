"""What `predict`, `compare` and `methods NAME` show in the terminal."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from click import style

from .. import units
from ..methods.parts.periodic import PeriodicCost
from ..prediction.predict import Prediction
from ..program.part import PHASES
from ..questions.comparison import Comparison
from ..questions.precisions import Estimate, Estimated
from ..questions.sentences import in_words, notes_by_method
from .figures import FigureCell, any_best, figures, gpus_of, headline, mfu_of, setup_line
from .plain import notes, paragraph, show, table

if TYPE_CHECKING:
    from ..prediction.pipeline import Pipelined

COLUMNS = (*PHASES, "total")
PER_TABLE = 4  # methods side by side in a terminal of 80 columns


def show_prediction(p: Prediction) -> None:
    """One prediction: phases, then memory, then notes."""
    method, model = style(p.method, bold=True), style(p.model, bold=True)
    show(paragraph(f"{method} on {model}, {gpus_of(p.setup, p.device)}: {setup_line(p.setup)}"))
    show(
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
    show(table(("", *COLUMNS), rows))
    t = p.time
    show(
        "\n"
        + paragraph(
            f"step {units.seconds(t.phases['total'])} [{units.seconds(t.low)} - {units.seconds(t.high)}], device busy "
            f"{units.seconds(t.device_busy)}, waiting for the host {units.percent(t.launch_bound_share)} of the time"
        )
    )
    if p.setup.gpus > 1:
        show(paragraph(communication_line(p)))
    if p.pipeline is not None:
        show("\n" + stages_table(p.pipeline) + "\n")
    if p.setup.offload != "none":
        show(paragraph(offloading_line(p)))
    if p.setup.lengths:
        padding = f"{units.percent(p.padding, 1)} of the tokens are padding, " if p.setup.packing == "none" else ""
        show(paragraph(f"{padding}{p.tokens_per_second:,.0f} tokens/s of documents"))
    m = p.memory
    fits = "fits" if p.fits else style("does not fit", fg="red")
    beside = f"; NCCL's buffers take {units.nbytes(m.buffers)} beside it" if m.buffers else ""
    show(
        paragraph(
            f"peak memory {style(units.nbytes(m.peak), bold=True)} = weights {units.nbytes(m.weights)} + gradients "
            f"{units.nbytes(m.gradients)} + optimizer {units.nbytes(m.optimizer)} + activations and temporaries "
            f"{units.nbytes(m.activations)}{beside}; {fits}"
        )
    )
    for cost in p.periodic:
        show(paragraph(periodic_line(cost)))
    if p.choices:
        show("\n" + choices_table(p.choices))
    notes(p.notes)


def communication_line(p: Prediction) -> str:
    """What the GPUs of a job exchange, and how much of it is hidden, in words."""
    c = p.time.communication
    kinds = [f"{n:,} {kind.replace('_', '-')} of {units.nbytes(c.nbytes[kind])}" for kind, n in c.calls.items() if n]
    exposed, hidden = c.exposed["total"], c.hidden["total"]
    return (
        f"a GPU's collectives: {', '.join(kinds)} in all; {units.seconds(exposed)} exposed, {units.seconds(hidden)} "
        f"hidden behind other work; {p.tokens_per_second:,.0f} tokens/s on all {p.setup.gpus} GPUs"
    )


def stages_table(of: "Pipelined") -> str:
    """The ranks of a pipeline: what each has, does and holds."""
    rows = [
        [
            f"{s.rank}{'*' if s.rank == of.busiest else ''}", ", ".join(f"{low}-{high}" for low, high in s.blocks),
            f"{s.in_flight}", *map(units.seconds, (s.forward, s.backward, s.waiting)), units.nbytes(s.peak),
        ]
        for s in of.stages
    ]  # fmt: skip
    share = units.percent(of.bubble / of.time.phases["total"])
    title = f"bubble {units.seconds(of.bubble)}, {share} of the step; * the busiest rank, whose work is shown above"
    return table(("rank", "blocks", "in flight", "forward", "backward", "waits", "peak"), rows, title=title)


def offloading_line(p: Prediction) -> str:
    """What offloading takes of the host's memory, and of the step, in words."""
    seconds = p.time.communication.offloading["total"]
    return (
        f"offloaded: {units.nbytes(p.memory.host)} of the host's memory a GPU; copies over the bus and the host's "
        f"cores take {units.seconds(seconds)} of the step that nothing hides"
    )


def periodic_line(cost: PeriodicCost) -> str:
    """What comes besides the steps, in words."""
    work = f"{cost.what} {units.seconds(cost.seconds)}"
    traffic = f"{units.count(cost.flops, 'FLOP')}, {units.nbytes(cost.bytes)}"
    if cost.every is None:
        return f"once per run: {work} ({traffic})"
    return f"every {cost.every} steps: {work} ({traffic}), {units.seconds(cost.seconds_per_step)} a step on average"


def choices_table(choices: Sequence[dict[str, Any]]) -> str:
    """Orders that a method chose for its layers: the cost of each, and the best order of another cost."""
    timed = choices[0]["forward_seconds"] is not None
    rows = []
    for c in choices:
        rows.append([c["layer"].rpartition(".")[2], c["copies"], f"{c['inputs']}x{c['outputs']}"])
        for phase in ("forward", "backward"):
            costs = c[f"{phase}_{'seconds' if timed else 'flops'}"]
            rows[-1] += _why(c[phase], costs, units.seconds if timed else units.count)
    title = f"orders of the products, chosen by {'predicted time' if timed else 'FLOPs'}"
    return table(("layer", "copies", "n x m", "forward", "next", "backward", "next"), rows, title=title)


def _why(chosen: int, costs: dict[int, float], show: Callable[[float], str]) -> list[str]:
    cost = costs[chosen]
    others = {order: other for order, other in costs.items() if abs(other / cost - 1) > 1e-6}
    best = min(others, key=lambda order: others[order], default=None)
    return [f"{chosen}: {show(cost)}", "" if best is None else f"{best} {100 * (others[best] / cost - 1):+.1f} %"]


def show_method(row: dict[str, Any]) -> None:
    """One method: what it is, where it comes from, and its options."""
    show(paragraph(f"{style(row['method'], bold=True)}: trains {row['trains']}; adds {row['adds']}") + "\n")
    for part in row["description"].split("\n\n"):
        show(paragraph(" ".join(part.split())) + "\n")
    show(row["source"], dim=True)
    if row["options"]:
        show("\n" + table(("option", ""), row["options"].items(), left=(0, 1)))


def show_comparison(c: Comparison) -> None:
    """The answer in words, then a column a method; the best value of a row is marked."""
    for answer in (*(speedup.answer for speedup in c.speedups), *c.unanswered):
        show(paragraph(answer), bold=True)
    show(paragraph(headline(c.predictions[0])) + "\n")
    rows = figures(c)
    for start in range(0, len(c.predictions), PER_TABLE):
        which = slice(start, start + PER_TABLE)
        shown = [[row.name, *(_marked(cell) for cell in row.cells[which])] for row in rows]
        show(table(("", *(in_words(p) for p in c.predictions[which])), shown))
    for p in c.predictions:
        for cost in p.periodic:
            show(paragraph(f"{p.method}, {periodic_line(cost)}"))
    told = "in brackets the 90 % interval; " + "* best of those that fit; " * any_best(rows)
    told += f"launch-bound: share of the step that waits for the host; {mfu_of(*c.predictions)}"
    show(paragraph(told), dim=True)
    notes(notes_by_method(c.predictions))


def _marked(cell: FigureCell) -> str:
    return f"{cell.text}{' *' if cell.best else '  '}"


def show_estimate(e: Estimate) -> None:
    """The answer, then a line for each method in each precision."""
    p = e.rows[0].prediction
    show(paragraph(e.answer), bold=True)
    where = f"{p.model}, {units.count(p.total_params)} parameters, on {gpus_of(p.setup, p.device)}"
    show(paragraph(f"{where}, {setup_line(p.setup, precision=False)}") + "\n")
    heads = ("precision", "method", "weights", "gradients, states", "peak", "fits", "step")
    show(table(heads, map(_estimated, e.rows), left=(0, 1)))
    show(
        paragraph("autocast: weights in fp32; states: the optimizer's; peak: with activations and temporaries"),
        dim=True,
    )
    notes(e.notes)


def _estimated(row: Estimated) -> list[str]:
    p, held = row.prediction, row.prediction.memory
    sizes = map(units.nbytes, (held.weights, held.gradients + held.optimizer, held.peak))
    return [row.precision, p.method, *sizes, "yes" if p.fits else "no", units.seconds(p.time.phases["total"])]
