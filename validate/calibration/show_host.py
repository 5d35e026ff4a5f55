"""What `perfmodel validate host` prints."""

from dataclasses import replace
from pathlib import Path

from perfmodel import units
from perfmodel.report.plain import show, table
from perfmodel.report.progress import progress

from ..fitting.show import show_caveats
from ..quiet import without_warnings_of_packages
from . import hosts, verify
from .show_calibration import show_checks


def show_host(output: Path) -> bool:
    """Calibrate the host and write its file; returns whether it was written."""
    without_warnings_of_packages()
    with progress() as bar:
        task = bar.add_task("timing", total=len(list(hosts.host_programs())))
        found = hosts.calibrate_host(lambda name: bar.update(task, advance=1, description=name))
    checks = verify.of_programs(found)
    kept = found.caveats.kept
    rows = [
        [name, units.seconds(getattr(found.host, name)), "the default host's" if name in kept else ""]
        for name in hosts.COSTS
    ]
    show(table(("", "seconds", "not measured"), rows, left=(0, 2), title="host costs"))
    show_checks(checks)
    show_caveats({"host": replace(found.caveats, kept=())})
    if refusal := verify.refusal(checks):
        show(refusal, colour="yellow")
        return False
    hosts.write_host(found.host, output, found.provenance(checks))
    show(f"written: {output}")
    return True
