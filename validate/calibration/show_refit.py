"""What `perfmodel validate fit --records` prints."""

from pathlib import Path

from perfmodel import units
from perfmodel.program.part import PHASES
from perfmodel.report.plain import paragraph, print_json, show, table
from perfmodel.report.progress import counting

from . import hosts, refit
from .refit import Refit


def show_refit(records: Path, *, device: str | None, host: str | None, output: Path | None, as_json: bool) -> bool:
    """Refit a host to measured steps; print its factors and the errors on cells left out, before and after.

    Returns whether the fit is one to keep; else no file is written.
    """
    with counting("predicting") as tick:
        found = refit.refit([records], device=device, host=host, progress=tick)
    refusal = refit.no_better(found)
    written = output is not None and not refusal
    if output and written:
        hosts.write_host(found.host, output, refit.refit_provenance(found))
    if as_json:
        print_json({**refit.refit_provenance(found), "refusal": refusal})
        return not refusal
    _print(found)
    if refusal:
        show(refusal, colour="yellow")
    elif output:
        show(f"\nwritten: {output} (use it with --host {output})")
    return not refusal


def _print(found: Refit) -> None:
    factors = [[name, f"{factor:.2f}", ", ".join(refit.FACTORS[name])] for name, factor in found.factors.items()]
    show(table(("", "factor", "of"), factors, left=(0, 2), title=f"factors on host {found.machine.by.name}"))
    where = found.machine.on.slug
    if bound := found.caveats.at_bound:
        told = f"at their bounds: {', '.join(bound)}: it is rather the kernels of {where} that are off"
        show(paragraph(told), colour="yellow")
    if kept := found.caveats.kept:
        show(paragraph(f"not measured by these cells, so kept: {', '.join(kept)}"))
    rows = [
        [name, *(units.percent(e, 1) for e in (x.step.mean, x.step.median, x.step.p90, x.ratio.mean)),
         *(units.percent(x.phases[phase].mean, 1) for phase in PHASES)]
        for name, x in (("before", found.before), ("after", found.after))
    ]  # fmt: skip
    title = f"|relative error| on {found.left_out} cells left out of the fit ({found.fitted} in it)"
    show("\n" + table(("", "step", "median", "p90", "ratio", *PHASES), rows, title=title))
