"""The walk of CONTRIBUTING: its files, written as they stand there into a copy of the package, are found and work."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"```(?:python|toml|json)\n# (\S+)\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the files of the walk, and nothing else done to it."""
    root = tmp_path_factory.mktemp("walk")
    for folder in ("perfmodel", "data"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 4
    for path, text in blocks:
        assert not (root / path).exists(), f"{path} is there already: choose a name that no user needs"
        (root / path).write_text(text, encoding="utf-8")
    return root


def predicted(house: Path, *options: str) -> Any:
    environment = os.environ | {"PYTHONPATH": str(house)}
    run = subprocess.run(
        [sys.executable, "-m", "perfmodel", "predict", *options, "--json"],
        cwd=house, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


USUAL = ("--model", "llama-3.2-1b", "--seq", "32")


def test_a_method_is_one_file(house: Path) -> None:
    found = predicted(house, *USUAL, "--method", "gain", "--device", "l40s")
    outputs = 16 * (2048 + 512 + 512 + 2048 + 8192 + 8192 + 2048)  # of the linear layers of 16 blocks
    assert found["params"]["trainable"] == outputs
    assert found["flops"]["backward"] < found["flops"]["forward"]
    fewer = predicted(house, *USUAL, "--method", "gain:every=4", "--device", "l40s")
    assert fewer["params"]["trainable"] == outputs / 4


def test_an_optimizer_is_one_file(house: Path) -> None:
    found = predicted(house, *USUAL, "--method", "full", "--optimizer", "signsgd", "--device", "l40s")
    assert found["memory_bytes"]["optimizer"] == 0
    assert found["setup"]["optimizer"] == "signsgd"


def test_a_device_is_one_file(house: Path) -> None:
    found = predicted(house, *USUAL, "--method", "lora", "--device", "walker-9000")
    assert found["device"] == "walker"
    assert any("no measurements" in note for note in found["notes"])


def test_an_architecture_is_one_file(house: Path) -> None:
    found = predicted(
        house, "--model", "data/models/walker-30m.json", "--seq", "64", "--method", "full", "--device", "l40s"
    )
    assert found["params"]["total"] == found["params"]["trainable"] > 1e6
