"""The files that Hugging Face Spaces run, and the command, as far as they show without Gradio."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.commands.app import app

ROOT = Path(__file__).resolve().parents[2]
SPACES = ROOT / "spaces"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_the_space_runs_the_gradio_that_was_tried() -> None:
    """A Space installs what its header says, before it looks at the package's own bounds."""
    header = yaml.safe_load((SPACES / "README.md").read_text().split("---")[1])
    least, below = EXTRAS["app"][0].removeprefix("gradio>=").split(",<")
    said = tuple(map(int, header["sdk_version"].split(".")))
    assert tuple(map(int, least.split("."))) <= said < (int(below),)
    assert header["sdk"] == "gradio"
    assert (SPACES / header["app_file"]).is_file()
    assert "app" in EXTRAS
    assert (SPACES / "requirements.txt").read_text() == "perfmodel[app]\n"


def test_the_space_starts_the_page() -> None:
    tree = ast.parse((SPACES / "app.py").read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert names == ["perfmodel.app.page"]


def test_it_binds_to_loopback_unless_it_is_told_otherwise() -> None:
    """A page that was started to look at it must not be open to a whole network."""
    host = next(option for option in app.params if option.name == "host")
    assert host.default == "127.0.0.1"


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("page", "form"):
        monkeypatch.delitem(sys.modules, f"perfmodel.app.{name}", raising=False)
    done = CliRunner().invoke(main, ["app"])
    assert done.exit_code == 2
    assert done.stderr == "perfmodel: the page needs the app extra (gradio is missing): pip install 'perfmodel[app]'\n"
