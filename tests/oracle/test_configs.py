"""`validate configs`: every file of a checkout is asked for once, and its outcome is told by kind."""

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from validate.oracle import configs

LORA = "base_model: gpt2\nmicro_batch_size: 1\nsequence_len: 16\nadapter: lora\nlora_target_modules: [c_attn]\n"
FILES = {  # file: what it holds, and what must become of it
    "examples/lora.yml": (LORA, "answered", ""),
    "examples/two.yml": ("base_model: gpt2\nmicro_batch_size: 1\nsequence_len: 16\nfsdp: [full]\n", "answered", ""),
    "examples/dpo.yml": ("base_model: gpt2\nmicro_batch_size: 1\nrl: spin\n", "refused", "objective"),
    "examples/mine.yml": ("base_model: no-such-model\nmicro_batch_size: 1\n", "refused", "model unknown"),
    "examples/eight.yml": (LORA + "load_in_8bit: true\n", "answered", ""),
    "examples/lomo.yml": ("base_model: gpt2\nmicro_batch_size: 1\noptimizer: lomo\n", "refused", "optimizer"),
    "examples/accelerate.yaml": ("distributed_type: FSDP\n", "no training", ""),
    "examples/other.yaml": ("x: 1\n", "refused", "file not recognised"),
    "peft/adapter_config.json": (
        '{"peft_type": "WAVEFT", "base_model_name_or_path": "gpt2"}', "refused", "tuner without built-in form",
    ),
    "peft/training_params.json": ("{}", None, ""),  # belongs to the adapter beside it
    ".github/tests.yml": ("x: 1\n", None, ""),
    "README.md": ("", None, ""),
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with such files."""
    root = tmp_path / "axolotl"
    for name, (text, _, _) in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for words in (
        ["init", "-q"], ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "commit", "-q", "-m", "x"],
        ["remote", "add", "origin", "https://github.com/someone/axolotl.git"],
    ):  # fmt: skip
        subprocess.run(["git", "-C", str(root), *words], check=True)
    return root


@pytest.mark.parametrize("code", [1, 130, 143])
def test_whoever_ends_the_run_ends_it(code: int, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM and Ctrl-C leave `predict` by its exit: neither is what becomes of a file."""

    def ended(arguments: list[str]) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(configs, "main", ended)
    with pytest.raises(SystemExit) as end:
        list(configs.try_all(checkout, ("--device", "l40s"), model=None, traced=False))
    assert end.value.code == code


def test_every_file_has_its_outcome(checkout: Path) -> None:
    """What is refused is told apart by reason, and what is no training config is no refusal."""
    rows = {row.file: row for row in configs.try_all(checkout, ("--device", "l40s"), model=None, traced=False)}
    assert {name: (row.outcome, row.reason) for name, row in rows.items()} == {
        name: (outcome, reason) for name, (_, outcome, reason) in FILES.items() if outcome
    }
    assert {row.repository for row in rows.values()} == {"someone/axolotl"}
    assert all(len(row.commit) == 12 for row in rows.values())
    assert (rows["examples/lora.yml"].tool, rows["examples/lora.yml"].method) == ("Axolotl", "lora:r=8,targets=c_attn")
    assert "one GPU, without FSDP (fsdp)" in rows["examples/two.yml"].said


def test_the_table_of_a_whole_run_holds_no_traceback() -> None:
    """The evidence in the repository: five repositories, each at one commit, every refusal with its reason."""
    rows = configs.read_table()
    assert len({row.repository for row in rows}) == len({row.commit for row in rows}) == 5
    assert {row.outcome for row in rows} <= {"answered", "traced", "refused", "no training"}
    assert all(bool(row.reason) == (row.outcome == "refused") for row in rows)
    assert all(row.method for row in rows if row.outcome == "answered")


def test_a_known_model_is_typed_beside_an_unknown_one(checkout: Path) -> None:
    """So that the readers can be measured apart from the models that are bundled."""
    rows = {
        row.file: row
        for row in configs.try_all(checkout / "examples", ("--device", "l40s"), model="gpt2", traced=False)
    }
    assert rows["examples/mine.yml"].outcome == "answered"


def test_the_command_writes_the_table(checkout: Path, tmp_path: Path) -> None:
    """A row a file, and the counts by reason."""
    table = tmp_path / "table.csv"
    command = ["validate", "configs", str(checkout / "examples"), "--device", "l40s", "--output", str(table)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "objective" in result.stdout
    assert len(table.read_text().splitlines()) == 1 + 8
    assert len(json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)) == 8


def test_a_traceback_is_caught_and_fails_the_command(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one outcome that must never be passed over."""

    def crash(path: Path) -> None:
        raise KeyError(str(path))

    monkeypatch.setattr("perfmodel.imports.read", crash)
    result = CliRunner().invoke(main, ["validate", "configs", str(checkout / "examples")])
    assert result.exit_code == 1
    assert "traceback" in result.stdout
