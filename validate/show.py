"""What the validate commands print."""

import json
import warnings
from collections import Counter
from typing import Any

from perfmodel.report import units
from perfmodel.report.progress import progress
from perfmodel.report.terminal import console, table
from perfmodel.step import PHASES

from .reasons import FAR, reason, reasons


def show_counts(module: Any, grid: str, *, cuda_forward: bool, as_json: bool) -> bool:
    """Run the comparison over a grid and print it; returns whether anything differs."""
    warnings.filterwarnings("ignore")
    for text in module.other_versions():
        console.print(f"[yellow]installed: {text}: differences may be theirs[/]")
    cases = list(module.cuda_forward_grid() if cuda_forward else module.grid(grid))
    results = []
    with progress() as bar:
        task = bar.add_task("tracing", total=len(cases))
        for case in cases:
            bar.update(task, description=f"{case.config.name} {case.method}")
            results.append(module.compare(case, cuda_forward=cuda_forward))
            bar.advance(task)
    if as_json:
        print(json.dumps([_row(r) for r in results], indent=1))
        return any(r.differences for r in results)
    _summary(results)
    bad = [r for r in results if r.differences]
    for r in bad[:20]:
        console.print(f"\n[red]{r.case.config.name} {r.case.method}[/] {_changed(r)}")
        for line in r.differences[:8]:
            console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print(
        f"\n{len(results)} cases, {sum(r.calls for r in results):,} ATen calls compared, "
        f"{'[red]' if bad else '[green]'}{len(bad)} cases differ[/]"
    )
    return bool(bad)


def _changed(result: Any) -> str:
    from perfmodel.setup import Setup

    usual = Setup().as_dict()
    return ", ".join(f"{k}={v}" for k, v in result.case.setup.as_dict().items() if v != usual[k])


def _row(r: Any) -> dict[str, Any]:
    return {
        "model": r.case.config.name, "method": r.case.method, "setup": r.case.setup.as_dict(), "calls": r.calls,
        "flops": r.flops, "bytes": r.bytes, "peak_ratio": r.peak_ratio, "differences": r.differences,
    }  # fmt: skip


def _summary(results: list[Any]) -> None:
    groups: dict[tuple[str, str], list[Any]] = {}
    for r in results:
        groups.setdefault((r.case.config.name, r.case.method), []).append(r)
    rows = []
    for (name, method), members in groups.items():
        setups = Counter(_changed(r) for r in members)
        rows.append(
            [
                name, method, _changed(members[0]) if len(members) == 1 else f"{len(setups)} setups",
                f"{sum(r.calls for r in members):,}", units.count(sum(r.flops for r in members)),
                units.nbytes(sum(r.bytes for r in members)),
                f"{max(abs(r.peak_ratio - 1) for r in members) * 100:.2f} %", sum(len(r.differences) for r in members),
            ]
        )  # fmt: skip
    columns = ("model", "method", "setup", "ATen calls", "FLOPs", "bytes", "peak off by", "differences")
    console.print(table("", columns, rows, left=3))


def show_published(*, plot: Any, all_rows: bool, as_json: bool) -> None:
    """Predict every published row; print errors by source on the rows held out of the fit."""
    from . import published as module

    rows = module.load()
    with progress() as bar:
        task = bar.add_task("predicting", total=len(rows))
        outcomes = module.evaluate_all(rows, progress=lambda name: bar.update(task, advance=1, description=name[:40]))
    check = [o for o in outcomes if o.row.split == "check"]
    lines = module.summary(check)
    if as_json:
        print(json.dumps({"check": lines, "rows": [_published_row(o) for o in outcomes]}, indent=1))
    else:
        _print_published(outcomes, check, lines, all_rows=all_rows)
    if plot is not None:
        from .plots import Point, parity

        points = [
            Point(o.row.family, o.measured_total, o.predicted_total, o.low, o.high, o.row.split == "check")
            for o in outcomes
        ]
        parity(points, plot, "Published training steps (filled: held out, open: fit; dashed: ±25 %)")
        if not as_json:
            console.print(f"\ndrawn: {plot}")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _hundredths(value: float | None) -> str:
    """A percentage under a head that has the sign."""
    return _percent(value).removesuffix(" %")


def _print_published(outcomes: list[Any], check: list[Any], lines: list[dict[str, Any]], *, all_rows: bool) -> None:
    shown = [
        [
            line["source"], line["rows"], *(_hundredths(line[k]) for k in ("mean", "median", "p90", "worst")),
            _hundredths(line["ratio_mean"]), line["verdicts"], _hundredths(line["memory_mean"]),
            _hundredths(line["coverage"]),
        ]
        for line in lines
    ]  # fmt: skip
    columns = ("check rows of", "rows", "mean", "median", "p90", "worst", "ratio", "right", "memory", "inside")
    console.print(table("step time, |relative error| in % on rows that no fit saw", columns, shown))
    console.print(
        "[dim]ratio, memory: mean errors of the speed-up over full fine-tuning and of the peak, %; right: verdicts "
        "where the measured difference exceeds 10 %; inside: % of the rows in their 90 % interval[/]"
    )
    listed = outcomes if all_rows else [o for o in outcomes if abs(o.error) > FAR]
    if listed:
        titles = ("row", "split", "measured", "predicted", "error", "reason, or notes")
        cells = (
            [o.row.id, o.row.split, units.seconds(o.measured_total), units.seconds(o.predicted_total),
             f"{100 * o.error:+.1f} %", reason("steps", o.row.id) if abs(o.error) > FAR else o.row.notes]
            for o in listed
        )  # fmt: skip
        console.print(table("\nall rows" if all_rows else "\nrows that miss by more than 25 %", titles, cells, left=2))
    doubtful = sum(o.row.doubt for o in outcomes)
    if doubtful:
        console.print(
            f"\n{doubtful} rows count with their backward only: their forward is out of line (see the notes)."
        )


def _published_row(o: Any) -> dict[str, Any]:
    return {
        "id": o.row.id, "split": o.row.split, "doubt": o.row.doubt, "measured_s": o.measured_total,
        "predicted_s": o.predicted_total, "error": o.error, "inside": o.inside, "source": o.row.source,
    }  # fmt: skip


def show_tuners(module: Any, *, host: str, all_rows: bool, as_json: bool) -> bool:
    """Trace every tuner of PEFT's benchmark; print errors and rank correlation; returns whether the limits hold."""
    warnings.filterwarnings("ignore")
    rows = module.load()
    with progress() as bar:
        task = bar.add_task("tracing", total=len(rows))
        outcomes = module.evaluate_all(rows, lambda name: bar.update(task, advance=1, description=name[:40]), host)
    total = module.summary(outcomes)
    if as_json:
        figures = {k: v for k, v in vars(total).items() if k != "worst"}
        known = {"summary": {**figures, "holds": total.holds}, "rows": [_tuner_row(o) for o in outcomes]}
        print(json.dumps(known, indent=1))
    else:
        _print_tuners(module, outcomes, total, all_rows=all_rows)
    return bool(total.holds)


def _print_tuners(module: Any, outcomes: list[Any], total: Any, *, all_rows: bool) -> None:
    traced = [o for o in outcomes if o.prediction]
    cells = (
        [o.row.id, units.seconds(o.row.seconds), units.seconds(o.predicted), f"{100 * o.error:+.1f} %"]
        for o in (traced if all_rows else total.worst)
    )
    title = "every configuration" if all_rows else "the worst configurations"
    console.print(table(title, ("", "measured", "predicted", "error"), cells))
    for o in sorted(traced, key=lambda o: -abs(o.error)):
        if o in total.worst or abs(o.error) > FAR:
            why = reason("peft_tuners", o.row.id)
            console.print(f"{o.row.id}, {100 * o.error:+.0f} %: {why}", markup=False, soft_wrap=True)
    for o in outcomes:
        if o.prediction is None:
            console.print(f"not traced: {o.row.id}: {o.reason}", markup=False, soft_wrap=True)
    colour = "green" if total.holds else "red"
    console.print(
        f"\n{total.rows} configurations of {total.tuners} tuners: step time off by "
        f"[{colour}]{_percent(total.mean)}[/] in the mean (limit {_percent(module.MEAN_LIMIT)}), median "
        f"{_percent(total.median)}, p90 {_percent(total.p90)}; Spearman rank correlation "
        f"[{colour}]{total.spearman:.2f}[/] (limit {module.RANK_LIMIT:g})"
    )


def _tuner_row(o: Any) -> dict[str, Any]:
    known = {"id": o.row.id, "tuner": o.row.tuner, "measured_s": o.row.seconds, "source": o.row.source}
    if o.prediction is None:
        return {**known, "reason": o.reason}
    why = reasons("peft_tuners").get(o.row.id)
    return {**known, "predicted_s": o.predicted, "error": o.error, **({"reason": why} if why else {})}


def show_host(output: Any) -> None:
    """Calibrate the host and write its file."""
    from . import hosts as module

    warnings.filterwarnings("ignore")
    with progress() as bar:
        task = bar.add_task("timing", total=len(list(module.programs())))
        found, error, phases = module.calibrate(lambda name: bar.update(task, advance=1, description=name))
    module.write(found, output)
    rows = [[name, units.seconds(getattr(found, name))] for name in vars(found) if name not in ("name", "source")]
    console.print(table("host costs", ("", "seconds"), rows))
    console.print(f"fitted to {phases} timed phases, mean |relative error| {100 * error:.1f} %; written: {output}")


def show_fit(folder: Any, *, leave_one_device_out: bool, write: bool, as_json: bool) -> None:
    """Fit device profiles and print the errors on left-out rows, a plain roofline beside them."""
    from . import fit as module

    with progress() as bar:
        task = bar.add_task("reading", total=None)

        def tick(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label[:40])

        if leave_one_device_out:
            rows = module.leave_one_device_out(folder, tick)
        else:
            rows = module.fit_kernels(folder, progress=tick, write=write)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    cells = (
        [r["block"], r["device"], r["slice"], r["rows"],
         *(_percent(_number(r.get(k))) for k in ("mean", "median", "p90", "roofline_mean"))]
        for r in rows
    )  # fmt: skip
    columns = ("block", "device", "rows of", "rows", "mean", "median", "p90", "plain roofline")
    console.print(table("|relative error| on rows that the fit did not see", columns, cells, left=3))


def show_refit(records: Any, *, device: str | None, host: str | None, output: Any, as_json: bool) -> None:
    """Refit a host to measured steps; print its factors and the errors on cells left out, before and after."""
    from . import hosts as writer
    from . import refit as module

    with progress() as bar:
        task = bar.add_task("predicting", total=None)

        def tick(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label[:40])

        found = module.refit([records], device=device, host=host, progress=tick)
    if output:
        writer.write(found.host, output, module.provenance(found))
    if as_json:
        print(json.dumps(module.provenance(found), indent=1))
        return
    factors = [[name, f"{factor:.2f}", ", ".join(module.FACTORS[name])] for name, factor in found.factors.items()]
    console.print(table(f"factors on host {found.machine.by.name}", ("", "factor", "of"), factors, text_last=True))
    if bound := module.at_bound(found.factors):
        where = found.machine.on.slug
        console.print(
            f"[yellow]at their bounds: {', '.join(bound)}: it is rather the kernels of {where} that are off[/]"
        )
    rows = [
        [name, *(_percent(e) for e in (x.step.mean, x.step.median, x.step.p90, x.ratio.mean)),
         *(_percent(x.phases[phase].mean) for phase in PHASES)]
        for name, x in (("before", found.before), ("after", found.after))
    ]  # fmt: skip
    title = f"\n|relative error| on {found.left_out} cells left out of the fit ({found.fitted} in it)"
    console.print(table(title, ("", "step", "median", "p90", "ratio", *PHASES), rows))
    if output:
        console.print(f"\nwritten: {output} (use it with --host {output})")


def _number(value: Any) -> float | None:
    return None if value in (None, "") else float(value)
