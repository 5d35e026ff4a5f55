"""The examples of README and `docs/` print what is shown.

Every `console` block is a command after `$ ` and its output. `PYTHONPATH=tests python tests/house/test_readme.py`
writes the present outputs into the documents, for when a price or a sentence has changed on purpose.
"""

import re
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from documented import DOCUMENTS, ROOT, install_wheel, typed

BLOCK = re.compile(
    r"^```console\n\$ (?P<command>perfmodel (?:[^\n]*\\\n)*[^\n]*)\n(?P<output>(?:(?!```)[^\n]*\n)*)```$", re.MULTILINE
)
BLOCKS = [block for document in DOCUMENTS for block in BLOCK.finditer((ROOT / document).read_text())]


def printed(command: str, site: Path, folder: Path) -> str:
    """What a command prints, without the spaces that pad its lines."""
    done = typed(command, site, folder)
    assert done.returncode == 0, done.stderr
    return "".join(line.rstrip() + "\n" for line in done.stdout.strip().splitlines())


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["command"].split()[1])
def test_an_example_prints_what_is_shown(block: re.Match[str], site: Path, tmp_path: Path) -> None:
    """The first thing that a newcomer tries must look like the page it was copied from."""
    assert block["output"] == printed(block["command"], site, tmp_path)


if __name__ == "__main__":
    with TemporaryDirectory() as name:
        folder = Path(name)
        site = install_wheel(folder)
        for path in (ROOT / document for document in DOCUMENTS):
            text = path.read_text()
            now = BLOCK.sub(lambda m: f"```console\n$ {m['command']}\n{printed(m['command'], site, folder)}```", text)
            path.write_text(now)
