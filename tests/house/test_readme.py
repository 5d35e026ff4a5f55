"""The README's examples print what the README says they print.

Every `console` block is a command after `$ ` and its output. `PYTHONPATH=tests python tests/house/test_readme.py`
writes the present outputs into the README, for when a price or a sentence has changed on purpose.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from documented import ROOT, install_wheel, typed

README = ROOT / "README.md"
BLOCK = re.compile(
    r"^```console\n\$ (?P<command>perfmodel (?:[^\n]*\\\n)*[^\n]*)\n(?P<output>(?:(?!```)[^\n]*\n)*)```$", re.MULTILINE
)


def printed(command: str, site: Path, folder: Path) -> str:
    """What a command of the README prints, without the spaces that pad its lines."""
    done = typed(command, site, folder)
    assert done.returncode == 0, done.stderr
    return "".join(line.rstrip() + "\n" for line in done.stdout.strip().splitlines())


@pytest.mark.parametrize("block", BLOCK.finditer(README.read_text()), ids=lambda block: block["command"].split()[1])
def test_an_example_prints_what_the_readme_shows(block: re.Match[str], site: Path, tmp_path: Path) -> None:
    """The first thing that a newcomer tries must look like the page it was copied from."""
    assert block["output"] == printed(block["command"], site, tmp_path)


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        folder, text = Path(name), README.read_text()
        site = install_wheel(folder)
        README.write_text(
            BLOCK.sub(lambda m: f"```console\n$ {m['command']}\n{printed(m['command'], site, folder)}```", text)
        )
