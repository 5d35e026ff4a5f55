"""`perfmodel validate configs`: every training config of other tools' checkouts, given to `predict --config`."""

import csv
import io
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from perfmodel.cli import main
from perfmodel.commands import traces
from perfmodel.imports import DIFFERS, NO_TRAINING
from perfmodel.resources import DATA, read_rows, written

TABLE = DATA / "coverage" / "configs.csv"  # of a whole run, made by this command
NAMES = ("*.yml", "*.yaml", "adapter_config.json", "training_params.json")
ANSWERED, TRACED, REFUSED, TRACEBACK, OTHER = "answered", "traced", "refused", "traceback", "no training"
BUILT_IN = "has no built-in form"  # what is refused in these words is asked again with --traced
LONGEST = 300  # characters of a line that the table keeps

# The first that a complaint holds names the reason; what fits none is a reason of its own.
REASONS = (
    ("model unknown", r"unknown model|not be fetched|not bundled|model_type .* is not supported|option '--model"),
    ("code of the model's own", r"is code of its own repository"),
    ("cannot be traced", r"cannot be traced|peft cannot apply"),
    ("objective", r"step is not modelled|is no SFT step|loss .*not modelled"),
    ("extra not installed", r"needs the \w+ extra"),
    ("other quantised base", r"(GPTQ|quantised|4-bit) .*not modelled"),
    ("optimizer", r"optim\w*[ :].*is not modelled"),
    ("tuner without built-in form", BUILT_IN),
    ("targets", r"targets?\b.*(matches no|is a pattern)"),
    ("file not recognised", r"not a config of PEFT"),
    ("what trains, not modelled", r"unfrozen_parameters|freeze_|llama_pro|lora_target_parameters|_pattern"),
    ("what a key asks for, not modelled", r"not modelled"),
)  # fmt: skip


@dataclass(frozen=True)
class ConfigRow:
    """What `predict --config` made of one file.

    Attributes:
        repository, commit, file: where it lies; the path is that within the repository.
        tool, method: as the reader has them, empty where it refused.
        outcome: answered, traced (answered with --traced), refused, traceback, or no training.
        reason: the kind of refusal; empty for an answer.
        said: an answer's first line, where it is for another step than the file's; else the complaint.
    """

    repository: str
    commit: str
    file: str
    tool: str
    method: str
    outcome: str
    reason: str
    said: str


def files(folder: Path) -> list[Path]:
    """The files of a folder that may be training configs; an adapter's own parameters go with its config."""
    found = sorted({path for name in NAMES for path in folder.rglob(name)})
    lone = (p for p in found if p.name != "training_params.json" or not p.with_name("adapter_config.json").exists())
    return [path for path in lone if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def try_all(folder: Path, asked: Sequence[str], *, model: str | None, traced: bool) -> Iterator[ConfigRow]:
    """A row for each file, asked with some options from the root of its checkout, as the tools are."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is answered must not hang on a network
    root = Path(_git(folder, "rev-parse", "--show-toplevel") or folder).resolve()
    repository = re.sub(r"^.*github\.com[/:]|\.git$", "", _git(root, "config", "remote.origin.url")) or root.name
    commit = _git(root, "rev-parse", "HEAD")[:12]
    for path in files(folder.resolve()):
        file = str(path.relative_to(root))
        with chdir(root):
            yield _row(repository, commit, file, ["--config", file, *asked], model=model, traced=traced)


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _row(repository: str, commit: str, file: str, options: list[str], *, model: str | None, traced: bool) -> ConfigRow:
    outcome, out, told = _asked(options)
    typed = ["--model", model] if model and refusal_reason(told) == REASONS[0][0] else []
    if typed:
        outcome, out, told = _asked([*options, *typed])
    if traced and BUILT_IN in told:
        outcome, out, told = _asked([*options, *typed, "--traced"])
        outcome = TRACED if outcome == ANSWERED else outcome
    read = re.search(r"^note: \S+ \(([^)]+)\): (\S+)", told, re.MULTILINE)
    tool, method = read.groups() if read else ("", "")
    if outcome in (ANSWERED, TRACED):
        begin = out.partition("\n\n")[0]
        outcome = TRACED if traces.TRACED in begin else outcome
        first = begin if begin.startswith((DIFFERS, traces.TRACED)) else ""
        return ConfigRow(repository, commit, file, tool, method, outcome, "", _line(first))
    complaint = _line(told.rstrip().rsplit("\n", 1)[-1].removeprefix("perfmodel: "))
    if outcome == REFUSED and NO_TRAINING in complaint:
        return ConfigRow(repository, commit, file, tool, method, OTHER, "", complaint)
    return ConfigRow(repository, commit, file, tool, method, outcome, refusal_reason(complaint), complaint)


def _asked(options: list[str]) -> tuple[str, str, str]:
    """Outcome, standard output and standard error of `perfmodel predict`.

    Raises:
        SystemExit: the whole run is to end (a signal, Ctrl-C, a stream that takes no more).
    """
    out, told = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(told):
            main(["predict", *options])
    except SystemExit as end:
        if end.code not in (0, 2):
            raise
        return REFUSED if end.code else ANSWERED, out.getvalue(), told.getvalue()
    except Exception as error:  # the very thing that must not happen, whatever its kind
        return TRACEBACK, out.getvalue(), f"{told.getvalue()}\n{type(error).__name__}: {error}"
    return ANSWERED, out.getvalue(), told.getvalue()


def refusal_reason(complaint: str) -> str:
    """The kind of a refusal."""
    found = (name for name, pattern in REASONS if re.search(pattern, complaint))
    return next(found, "another")


def _line(text: str) -> str:
    return " ".join(text.split())[:LONGEST]


def read_table(path: Path = TABLE) -> list[ConfigRow]:
    """The rows of a table.

    Raises:
        UserError: it cannot be read, or is no such table.
    """
    return read_rows(path, lambda record: ConfigRow(**record))


def write_configs(path: Path, rows: Sequence[ConfigRow]) -> None:
    """Write the table as CSV."""
    with written(path) as place, place.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(ConfigRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
