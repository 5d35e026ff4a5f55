"""What a campaign's records say: a device and a host fitted to its microbenchmarks, checked on its training steps.

No training step enters the fit, so every one of them checks it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perfmodel import architectures, methods
from perfmodel.architectures import Config
from perfmodel.errors import UserError
from perfmodel.program.part import PHASES
from perfmodel.recording.record import build
from perfmodel.recording.step import Step
from perfmodel.resources import write_text
from perfmodel.setup import Setup

from ..accuracy import Errors
from ..calibration import calibrate, hosts, verify
from ..checking.check import Report, check_records
from ..fitting.judging import Fit
from ..measuring.records import Record

DEVICE, HOST = "device.toml", "host.toml"
NAME = "campaign"  # of the profile in its file
FEWEST = 10  # host programs


@dataclass
class Finding:
    """What a campaign found so far.

    Attributes:
        fits: blocks of the device file, with their errors on left-out rows.
        host: errors of predicting the tiny programs in the host's fit, and those left out of it.
        report: the check of the training steps; None where something for it is missing.
        missing: what there is too little of yet, or why a fit was not kept.
    """

    fits: Mapping[str, Fit] = field(default_factory=dict)
    host: Mapping[str, Errors] = field(default_factory=dict)
    report: Report | None = None
    missing: list[str] = field(default_factory=list)


def finish(records: Sequence[Record], environment: Record, path: Path) -> Finding:
    """Fit the device and the host, write their files beside the records, and check the steps with them.

    Args:
        records: of the file at `path`.
        environment: the one of this call.

    Raises:
        UserError: a file cannot be written.
    """
    found = Finding()
    try:
        _fit(found, records, environment, path.parent)
    except TooFewRecords as little:
        found.missing.append(str(little))
        return found
    if not any(r["kind"] == "visit" for r in records):
        found.missing.append("no training step was measured yet: give the campaign more time")
        return found
    found.report = check_records([path], device=str(path.parent / DEVICE), host=str(path.parent / HOST))
    return found


class TooFewRecords(Exception):
    """A fit cannot be made or kept: why."""


def _fit(found: Finding, records: Sequence[Record], environment: Record, folder: Path) -> None:
    """Fit to microbenchmarks and tiny programs, and write both files, or none.

    Raises:
        TooFewRecords: there are too few of them, or what the fit predicts is far from what was timed.
    """
    benches = [environment, *(r for r in records if r["kind"] == "microbench")]
    programs = [r for r in records if r["kind"] == "host"]
    try:
        text, found.fits = calibrate.device_file(benches, NAME)
    except UserError as error:
        raise TooFewRecords(str(error)) from None
    if len(programs) < FEWEST:
        raise TooFewRecords(f"only {len(programs)} programs of the host, too few to fit: give the campaign more time")
    mine = calibrate.profile_of_text(text, NAME)
    on = mine if mine.kind == "cpu" else None
    by = hosts.fit_host([_timed(r) for r in programs], on, calibrate.host_floors(benches))
    found.host = verify.of_programs(by, on)
    found.missing += verify.poor(found.fits, mine.kind).values()
    if refusal := verify.refusal(found.host):
        raise TooFewRecords(refusal)
    write_text(folder / DEVICE, text)
    hosts.write_host(by.host, folder / HOST, by.provenance(found.host))


def _timed(record: Record) -> hosts.Timed:
    """A tiny program as it was timed, with its step."""
    p = record["program"]
    step = campaign_step(Config(p["config"], p["model"], p["model"]), p["method"], p["checkpoint"], p["optimizer"])
    return hosts.Timed(record["unit"], step, {phase: float(record["seconds"][phase]) for phase in PHASES})


def campaign_step(config: Config, method: str, checkpoint: str, optimizer: str) -> Step:
    """The step of a tiny program (an entry of `hosts.host_programs`) as the tape has it."""
    architecture = architectures.from_config(config)
    setup = Setup(batch=1, seq=4, dtype="fp32", checkpoint=checkpoint, optimizer=optimizer)
    return build(architecture, methods.parse(method).bind(architecture), setup, "cpu")
