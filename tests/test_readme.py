"""The README's examples print what the README says they print.

Every `console` block is a command after `$ ` and its output. `python tests/test_readme.py` writes the present outputs
into the README, for when a price or a sentence has changed on purpose.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(
    r"^```console\n\$ perfmodel (?P<command>(?:[^\n]*\\\n)*[^\n]*)\n(?P<output>(?:(?!```)[^\n]*\n)*)```$", re.MULTILINE
)
COLUMNS = "100"  # width of the terminal that the README shows


def printed(command: str) -> str:
    """What a command of the README prints, without the spaces that pad its lines."""
    arguments = shlex.split(command.replace("\\\n", " "))
    done = subprocess.run(
        [sys.executable, "-m", "perfmodel.cli", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "COLUMNS": COLUMNS, "PYTHONPATH": str(README.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return "".join(line.rstrip() + "\n" for line in done.stdout.strip().splitlines())


@pytest.mark.parametrize("block", BLOCK.finditer(README.read_text()), ids=lambda block: block["command"].split()[0])
def test_an_example_prints_what_the_readme_shows(block: re.Match[str]) -> None:
    """The first thing that a newcomer tries must look like the page it was copied from."""
    assert block["output"] == printed(block["command"])


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(BLOCK.sub(lambda m: f"```console\n$ perfmodel {m['command']}\n{printed(m['command'])}```", text))
