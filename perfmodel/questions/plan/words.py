"""A plan in sentences: which run, what it costs, what LoRA costs against full fine-tuning, what is not known."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from ... import units
from ...prediction.predict import Prediction
from ..sentences import capitalised, in_words
from .inverse import Largest
from .job import Job, JobCounts, samples_of_step
from .planning import Plan
from .runs import HOUR, PlannedRun, gpus_in_words

NAMED = 6  # devices in a list


def span(seconds: float) -> str:
    """A time of a job: 40 s, 12 min, 32.3 h."""
    if seconds < 60:
        return units.seconds(seconds)
    if seconds < HOUR:
        return f"{seconds / 60:.{0 if seconds >= 600 else 1}f} min"
    return f"{seconds / HOUR:,.1f} h" if seconds < 1000 * HOUR else f"{seconds / HOUR:,.0f} h"


def between(low: str, high: str) -> str:
    """An interval: 7.4 - 10.3 h, the unit once where it is the same."""
    unit = high.partition(" ")[2]
    return f"[{low.removesuffix(f' {unit}') if unit else low} - {high}]"


def money(dollars: float) -> str:
    """Dollars with the cents that are worth saying: $0.42, $24.30, $1,234."""
    return f"${dollars:,.2f}" if dollars < 1000 else f"${dollars:,.0f}"


def energy(joules: float, beside: float | None = None) -> str:
    """Energy of a job: 8.3 kWh, 41 Wh; in the unit of what stands beside it."""
    in_kwh = (joules if beside is None else beside) >= 3.6e5
    return f"{joules / 3.6e6:,.2f} kWh" if in_kwh else f"{joules / 3600:,.1f} Wh"


def plan_answer(plan: Plan) -> str:
    """The answer in a few sentences."""
    if not plan.runs:
        none = [f"{_listed(devices)} with {method}: {why}" for method, why, devices in _grouped(plan)]
        return f"Nothing fits: {_listed(none)}.{_further(plan)}"
    if len(plan.runs) == 1:
        return f"{capitalised(_named(plan.runs[0]))} takes {_figures(plan.runs[0])}."
    cheapest, in_time = plan.cheapest(), plan.in_time()
    fastest = plan.fastest()
    both = bool(cheapest) and cheapest[0] is fastest[0]
    told = [f"Cheapest{' and fastest' * both}: {_choice(cheapest, 'cost')}."] if cheapest else []
    if not both:
        told.append(f"Fastest: {_choice(fastest, 'take')}.")
    if plan.deadline is not None:
        before = f"before {span(plan.deadline * HOUR)}"
        if in_time and in_time[0] is cheapest[0]:
            told.append(f"The cheapest surely ends {before}.")
        else:
            told.append(f"Cheapest {before}: {_choice(in_time, 'cost') if in_time else _none_in_time(plan)}.")
    return " ".join([*told, *_against(plan)])


def _none_in_time(plan: Plan) -> str:
    """What is said where no run with a price ends before the deadline."""
    without = [run for run in plan.runs if run.interval[1] <= (plan.deadline or 0) * HOUR]
    if not without:
        return "none is sure to end"
    names = _listed([run.where for run in without])
    return f"only those without a known price are sure to end ({names})"


def _choice(runs: list[PlannedRun], what: str) -> str:
    """The first of a choice, and those that are as good."""
    first, *others = runs
    text = f"{_named(first)}, {_figures(first)}"
    if others:
        alike = [f"{run.where} ({in_words(run.prediction)})" for run in others]
        text += f"; {_listed(alike)} {what}{'s' if len(others) == 1 else ''} the same"
    return text


def _named(run: PlannedRun) -> str:
    given = f" with {' and '.join(g for g in run.given_up if g != 'QLoRA')}" if set(run.given_up) - {"QLoRA"} else ""
    return f"{in_words(run.prediction)} on {run.where}{given}"


def _figures(run: PlannedRun) -> str:
    """Hours, dollars and energy, each with its interval."""
    low, high = run.interval
    told = [f"{span(run.seconds)} {between(span(low), span(high))}"]
    if run.hourly is None or run.dollars is None:
        told.append("at a price that is not known")
    else:
        bounds = between(*(money(bound / HOUR * run.hourly) for bound in (low, high)))
        told.append(f"{money(run.dollars)} {bounds}")
    if run.joules is not None and run.joules_interval is not None:
        total = sum(run.joules.values())
        bounds = between(*(energy(bound, total) for bound in run.joules_interval))
        told.append(f"{energy(total)} {bounds}")
    return ", ".join(told)


def _against(plan: Plan) -> Iterator[str]:
    """What each further method costs at its cheapest, or takes at its fastest, against the first one."""
    first, *others = plan.methods
    yield from (f"{method} fits nowhere here." for method in plan.methods if others and not plan.of(method))
    for method in others:
        if (a := plan.cheapest(first)) and (b := plan.cheapest(method)):
            here, there = a[0].dollars or 0.0, b[0].dollars or 0.0
            text = f"{money(there)} against {money(here)}"
            yield f"At its cheapest {_which(b[0])} costs {text} for {_which(a[0])}{_factor(there, here)}."


def _which(run: PlannedRun) -> str:
    return f"{in_words(run.prediction)} ({run.where})"


def _factor(there: float, here: float) -> str:
    return f": {there / here:.2f}x" if here > 0 else ""


def energy_in_words(run: PlannedRun) -> str:
    """Joules of a step and of a token, and what draws them."""
    found, power = run.energy, run.power
    if found is None or power is None:
        return "energy: unknown, as the board's power limit is"
    token = f"{found['token']:.2f} J" if found["token"] >= 1 else f"{1e3 * found['token']:.1f} mJ"
    each = f"{units.count(found['step'], 'J')} a step, {token} a token of the job"
    return f"energy: {each}; the board draws {power.step:.0f} W in a step, its node {power.node:.0f} W besides"


WHAT = {
    "batch": "largest micro-batch", "seq": "longest context", "device": "smallest GPU",
    "model": "biggest bundled model",
}  # fmt: skip


def what_fits(answers: Iterable[Largest]) -> Iterator[str]:
    """Answers to what fits, a line each; GPUs of one size share theirs."""
    for (what, *_), group in groupby(answers, lambda a: (a.what, a.method, a.given_up)):
        if what == "device":
            yield _smallest_gpus(sorted(group, key=lambda a: _step(a.prediction)))
        else:
            yield from map(_what_fits, group)


def _what_fits(answer: Largest) -> str:
    what, p, where = WHAT[answer.what], answer.prediction, gpus_in_words(answer.device, answer.gpus)
    if p is None:
        return f"{what} of {answer.method} on {where}: none fits"
    setup = p.setup
    size = {"batch": f" at {setup.seq} tokens", "seq": f" at batch {setup.batch}"}.get(answer.what, "")
    unit = " tokens" if answer.what == "seq" else ""
    value = f"{answer.value:,}" if isinstance(answer.value, int) else answer.value
    limit = "" if answer.limited_by == "memory" else f"; {answer.limited_by}"
    found = f"{units.nbytes(p.memory.peak)}, {units.seconds(_step(p))} a step"
    return f"{what} of {in_words(p)} on {where}{size}{_half(p)}: {value}{unit} ({found}){limit}"


def _smallest_gpus(answers: Sequence[Largest]) -> str:
    """GPUs of one size, each with its step."""
    first = answers[0]
    assert first.prediction is not None
    given = f", with {' and '.join(first.given_up)}" if first.given_up else ""
    each = (f"{gpus_in_words(a.device, a.gpus)} ({units.seconds(_step(a.prediction))} a step)" for a in answers)
    peak = units.nbytes(first.prediction.memory.peak)
    asked = first.method if "QLoRA" in first.given_up else in_words(first.prediction)
    return f"{WHAT['device']} of {asked}{given}{_half(first.prediction)}, {peak}: {', '.join(each)}"


def _half(p: Prediction) -> str:
    """What a GPU without units for bf16 computes in instead."""
    return " in fp16" if p.setup.computes_in == "fp16" else ""


def _step(p: Prediction | None) -> float:
    return math.inf if p is None else float(p.time.phases["total"])


def job_in_words(plan: Plan, run: PlannedRun) -> str:
    """The job of a run: data, steps, and what comes beside them."""
    job, work, setup = plan.job, run.work, run.prediction.setup
    group = samples_of_step(setup)
    rows = "" if work.rows == work.samples else f" in {work.rows:,} rows"
    padded = "" if work.computed == work.tokens else f", {work.computed:,} with padding"
    what = f"{units.of_these(work.samples, 'sample')}{rows} of {work.tokens:,} tokens{padded}"
    told = [f"{what}, {_passes(job, work)}"]
    short = f", {work.short} of them with {round(work.last * group)}" if work.short else ""
    on = f" on {run.where}" if len({other.gpus for other in plan.runs}) > 1 else ""  # others make other steps
    told.append(f"{units.of_these(work.steps, 'step')} of {group}{short}{on}")
    if work.evaluated:
        told.append(f"{units.of_these(work.evaluated, 'evaluation')} of {units.of_these(job.eval_samples, 'sample')}")
    told.append(units.of_these(work.saved, "checkpoint"))
    told.append(f"{span(job.startup)} of start-up")
    return "; ".join(told)


def _further(plan: Plan) -> str:
    """Where to look for what fits after all, where a run is too large for its GPUs."""
    if not plan.too_large:
        return ""
    forms = "other --parallel, " if any(gpus > 1 for _, gpus, _ in plan.too_large) else ""
    return f" advise tries more: {forms}optimizers, kernels and methods."


def _left_out(plan: Plan) -> Iterator[str]:
    """Devices that are left out, by method and reason."""
    for method, why, devices in _grouped(plan):
        yield f"left out of {method}: {_listed(devices)}: {why}"
    if further := _further(plan).strip(" ."):
        yield further


def _grouped(plan: Plan) -> list[tuple[str, str, list[str]]]:
    """What is left out: method, reason, devices."""
    groups: dict[tuple[str, str], list[str]] = {}
    for (device, gpus, method), why in plan.left_out.items():
        groups.setdefault((method, why), []).append(gpus_in_words(device, gpus))
    return [(method, why, devices) for (method, why), devices in groups.items()]


def _passes(job: Job, work: JobCounts) -> str:
    if job.max_steps is not None:
        return "once" if work.epochs == 1 else f"{work.epochs:.3g} times"
    return "once" if job.epochs == 1 else f"{job.epochs:g} epochs"


def plan_notes(plan: Plan) -> list[str]:
    """What a reader should know: prices of named runs with their age, what has none, what fits nowhere, energy."""
    named = {run.device: run for run in [*plan.cheapest(), *plan.in_time(), *plan.fastest(), *plan.runs[:1]]}
    told = [f"{d}: {run.price.in_words(plan.today)}, {run.price.source}".rstrip(", ")
            for d, run in named.items() if run.price is not None]  # fmt: skip
    if plan.unpriced:
        told.append(f"no price is known of {_listed(plan.unpriced)}: give --price DEVICE=USD")
    told += [*_left_out(plan), *_in_other_half(plan)]
    if any(run.power is None for run in plan.runs):
        unknown = dict.fromkeys(run.device for run in plan.runs if run.power is None)
        told.append(f"no power limit is known of {_listed(list(unknown))}, so no energy")
    told.append(
        "energy is that of the board and of its share of a server's node at the wall (--node-power); checked on H100 "
        "nodes alone"
    )
    return told


def _in_other_half(plan: Plan) -> list[str]:
    """GPUs that run in another 16-bit dtype than asked for."""
    found = {run.device: run.prediction.setup.computes_in for run in plan.runs}
    others = [device for device, half in found.items() if half != plan.dtype]
    return [f"{_listed(others)}: no {plan.dtype} units, so in {found[others[0]]}"] if others else []


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
