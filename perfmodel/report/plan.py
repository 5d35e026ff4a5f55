"""What `plan` shows in the terminal."""

from .. import units
from ..questions.plan import words
from ..questions.plan.inverse import Largest
from ..questions.plan.planning import Plan
from ..questions.plan.runs import PlannedRun
from ..questions.sentences import in_words
from .plain import notes, paragraph, show, table

SHOWN = 12  # runs in the table
SHARED = "*"


def show_plan(plan: Plan) -> None:
    """The answer in sentences, the runs by dollars, the parts of a single one, and what is behind the figures."""
    show(paragraph(words.plan_answer(plan)), bold=True)
    if not plan.runs:
        return
    first = plan.runs[0]
    show(paragraph(f"{plan.model}: {words.job_in_words(plan, first)}"))
    if len(plan.runs) == 1:
        rows = [[part, words.span(seconds), units.percent(seconds / first.seconds, 1)]
                for part, seconds in first.parts.items() if seconds > 0]  # fmt: skip
        show("\n" + table(("what takes the time", "", ""), rows))
        show(paragraph(words.energy_in_words(first)))
    else:
        heads, rows = plan_table(plan)
        show("\n" + table(heads, rows, left=(0, 1, len(heads) - 1)))
        if said := shares_in_words(plan):
            show(paragraph(said), dim=True)
        more = len(plan.runs) - len(_shown(plan))
        if more:
            show(paragraph(f"and {more} more (--json has all)"), dim=True)
    of_step = first.prediction.notes if len(plan.runs) == 1 else []
    notes([*words.plan_notes(plan), *of_step])


def _heads(plan: Plan) -> tuple[str, ...]:
    co2 = ("kg CO2",) if plan.grid_co2 is not None else ()
    return ("GPU", "method", "time", "dollars", "an hour", "energy", *co2, "peak", "given up to fit")


def plan_table(plan: Plan) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heads and rows: the first runs, and those that the answer names."""
    return _heads(plan), [_row(plan, run) for run in _shown(plan)]


def shares_in_words(plan: Plan) -> str:
    """What the mark beside some prices means; empty where none has it."""
    marked = any(_shared(run) for run in _shown(plan))
    return f"{SHARED} a GPU's share of a larger machine, which is rented whole" if marked else ""


def _shown(plan: Plan) -> list[PlannedRun]:
    """The first runs, and those that the answer names."""
    named = [*plan.cheapest(), *plan.fastest(), *plan.in_time()]
    return [run for i, run in enumerate(plan.runs) if i < SHOWN or run in named]


def _row(plan: Plan, run: PlannedRun) -> list[str]:
    price = ["unknown", ""] if run.dollars is None else [words.money(run.dollars), f"{run.hourly:,.2f}{_shared(run)}"]
    energy = "" if run.joules is None else words.energy(sum(run.joules.values()))
    co2 = run.co2(plan.grid_co2)
    of_grid = [] if plan.grid_co2 is None else ["" if co2 is None else f"{co2:,.2f}"]
    peak = units.nbytes(run.prediction.memory.peak)
    return [
        run.where,
        in_words(run.prediction),
        words.span(run.seconds),
        *price,
        energy,
        *of_grid,
        peak,
        _given_up(run),
    ]


def _shared(run: PlannedRun) -> str:
    """A mark where no machine with one GPU has a known price."""
    return SHARED if run.price is not None and run.price.gpus > 1 else ""


def _given_up(run: PlannedRun) -> str:
    """What was given up in few words: 2 x 16, checkpointing."""
    if not run.given_up:
        return ""
    setup = run.prediction.setup
    words = " ".join(run.given_up)
    short = {
        "QLoRA": "QLoRA", "micro-batches": f"{setup.batch} x {setup.grad_accum}", "checkpointing": "checkpointing",
        "reduced": "reduced each",
    }  # fmt: skip
    return ", ".join(text for word, text in short.items() if word in words)


def show_answers(answers: list[Largest]) -> None:
    """What fits: the largest batch, the longest context, the smallest GPU, the biggest model; a line each."""
    for line in words.what_fits(answers):
        show(paragraph(line))
    if any(answer.gpus > 1 for answer in answers):  # where they stand, and how they exchange
        notes(dict.fromkeys(note for answer in answers if answer.prediction for note in answer.prediction.notes))
