"""Shell completion offers what can be asked for, and its scripts are such as the shells take."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from perfmodel import architectures, methods
from perfmodel.cli import COMMANDS, main
from perfmodel.commands.completion import VARIABLE
from perfmodel.devices import profile

ROOT = Path(__file__).resolve().parents[2]


def offered(*words: str) -> list[str]:
    """What a shell offers for the last word."""
    *before, incomplete = words
    items = ShellComplete(main, {}, "perfmodel", VARIABLE).get_completions(before, incomplete)
    return [item.value for item in items]


def test_commands_and_options_are_offered() -> None:
    """The first thing that anyone completes."""
    assert set(offered("")) == set(COMMANDS)
    assert offered("predict", "--grad") == ["--grad-accum"]
    assert "--optimizer" in offered("sweep", "--")


@pytest.mark.parametrize("command", ["predict", "compare", "advise", "sweep", "report"])
def test_names_are_offered(command: str) -> None:
    """Nobody remembers the names of thirty devices."""
    models = architectures.model_names()
    assert offered(command, "--model", "llama-3.2") == [m for m in models if m.startswith("llama-3.2")]
    assert offered(command, "--device", "h") == [d for d in profile.names() if d.startswith("h")]
    assert "default" in offered(command, "--host", "")
    assert offered(command, "--dtype", "b") == ["bf16"]


def test_methods_and_their_options_are_offered() -> None:
    """Also the second of a list, and the arguments of explain."""
    assert offered("predict", "--method", "qlo") == ["qlora"]
    assert offered("compare", "--methods", "full", "dor") == ["dora"]
    assert offered("compare", "--model", "gpt2", "--methods", "full", "lora", "") == list(methods.registered())
    assert offered("explain", "full", "lora_f") == ["lora_fa"]
    assert offered("predict", "--method", "lora:r=8,ta") == ["lora:r=8,targets=", "lora:r=8,target_parameters="]
    assert "--model" in offered("compare", "--methods", "full", "--m")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_what_the_shell_takes(shell: str) -> None:
    """A script with an error would greet its user at every login."""
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0, done.output
    assert VARIABLE in done.stdout
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: its script was printed, but not parsed")
    subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)


def test_a_real_process_answers_a_shell() -> None:
    """As bash asks: words and position in the environment."""
    environment = {
        **os.environ, VARIABLE: "bash_complete", "COMP_WORDS": "perfmodel predict --device l40", "COMP_CWORD": "3",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    code = "from perfmodel.cli import main; main(prog_name='perfmodel')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["plain,l40", "plain,l40s"]
