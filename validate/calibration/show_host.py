"""What `perfmodel validate host` and `validate fit --records` print."""

import json
import warnings
from typing import Any

from perfmodel import units
from perfmodel.program.part import PHASES
from perfmodel.report.progress import progress
from perfmodel.report.terminal import console, table


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
        [name, *(units.percent(e, 1) for e in (x.step.mean, x.step.median, x.step.p90, x.ratio.mean)),
         *(units.percent(x.phases[phase].mean, 1) for phase in PHASES)]
        for name, x in (("before", found.before), ("after", found.after))
    ]  # fmt: skip
    title = f"\n|relative error| on {found.left_out} cells left out of the fit ({found.fitted} in it)"
    console.print(table(title, ("", "step", "median", "p90", "ratio", *PHASES), rows))
    if output:
        console.print(f"\nwritten: {output} (use it with --host {output})")
