"""What README and CONTRIBUTING tell a reader to type, and a wheel of the project in which to try it."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md", "CONTRIBUTING.md", "docs/accuracy.md", "docs/limits.md", "docs/options.md", "docs/several-gpus.md",
    "docs/validation.md",
)  # fmt: skip
PROGRAMS = ("perfmodel", "pip", "python", "python3", "pytest", "ruff", "mypy", "torchrun", ".", ".ci/run")
NAMES = ("perfmodel",)  # of the project; alone it is no command

PRINTED = {"SOURCE_DATE_EPOCH": "1796083200"}  # the date of the examples: 2026-12-01

FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
TABLE_OF_COMMANDS = re.compile(r"^\| command \|.*\n(?:\|.*\n)+", re.MULTILINE)
OPTION = re.compile(r"(?<!\S)--[a-z][a-z0-9-]*")
PATCHED = 'perfmodel() { PYTHON -c "$PATCH\nfrom perfmodel.__main__ import run\nrun()" "$@"; }\n'  # changed, or loaded


def code(document: str) -> tuple[list[str], list[str]]:
    """The blocks of code of a document, and the code within its lines."""
    text = (ROOT / document).read_text()
    fenced = FENCED.findall(text)
    text = FENCED.sub("", text)
    indented = ["".join(line[4:] + "\n" for line in b.splitlines()) for b in INDENTED.findall(text)]
    return fenced + indented, [" ".join(span.split()) for span in SPAN.findall(INDENTED.sub("", text))]


def snippets(document: str) -> list[str]:
    """The Python of a document."""
    return [block for block in code(document)[0] if block.startswith(("import ", "from "))]


def commands(document: str) -> Iterator[str]:
    """Every command of a document, what `&&` joins each by itself; without `perfmodel` in a table of its commands."""
    blocks, spans = code(document)
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            yield from _programs(line.removeprefix("$ "))
    for span in spans:
        yield from _programs(span)
    for table in TABLE_OF_COMMANDS.findall((ROOT / document).read_text()):
        for cell in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
            for span in SPAN.findall(cell):
                yield from _programs(span) or [f"perfmodel {span}"]


def _programs(line: str) -> list[str]:
    parts = [" ".join(part.split("  #")[0].split()) for part in line.split("&&")]
    words = [re.sub(r"^(?:[A-Z_]+=\S+ )+", "", part).split(" ") for part in parts]
    return [part for part, (first, *_) in zip(parts, words, strict=True) if first in PROGRAMS and part not in NAMES]


def options(document: str) -> set[str]:
    """Every `--option` in a document's code."""
    blocks, spans = code(document)
    return set(OPTION.findall("\n".join([*blocks, *spans])))


def install_wheel(folder: Path) -> Path:
    """Build the checkout's wheel and install it, and nothing else, into a folder."""
    wheels, site = folder / "wheels", folder / "site"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return site


def typed(
    script: str, site: Path, folder: Path, patch: str = "", python: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """What becomes of commands that are typed in a folder where only the wheel is installed.

    Args:
        patch: Python that runs before each `perfmodel`, to make its tables shorter.
        python: runs each `perfmodel`, in place of the installed script (`ready`).
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    path = os.pathsep.join([str(site / "bin"), str(Path(sys.executable).parent), environment["PATH"]])
    environment |= {
        "PATH": path, "PYTHONPATH": str(site), "HOME": str(folder), "PERFMODEL_HOME": str(folder / "home"),
        "CHECKOUT": str(ROOT), "DATA": str(site / "perfmodel" / "data"), "PATCH": patch, "COLUMNS": "100",
        "HF_HUB_OFFLINE": "1", **PRINTED,
    }  # fmt: skip
    changed = PATCHED.replace("PYTHON", shlex.join(python or ["python"])) if patch or python else ""
    bash = ["bash", "-euc", changed + script]
    return subprocess.run(bash, cwd=folder, env=environment, capture_output=True, text=True, check=False)
