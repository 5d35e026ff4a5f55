"""What a command reads is bounded, and what it writes is there whole or not at all, whatever the path names."""

import gzip
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from perfmodel import imports
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.recording import files
from perfmodel.resources import read_packed, read_text, write_text, written

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """A link that became a file would leave what it named as it was, without a word."""
    (tmp_path / "link").symlink_to("target")
    for text in ("new", "other"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "target").read_text() == text
    assert (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "target"}


def test_a_pipe_gets_what_is_written_and_stays_one(tmp_path: Path) -> None:
    """A rename onto a device node or a pipe destroys it for everyone."""
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "through")
    reader.join(10)
    assert got == ["through"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    """A half-written file looks like a whole one to whoever reads it next."""
    write_text(tmp_path / "file", "old")
    (tmp_path / "file").chmod(0o640)
    with pytest.raises(UserError, match="file: cannot be written"):
        _stop_in_the_middle(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    write_text(tmp_path / "file", "new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _stop_in_the_middle(path: Path) -> None:
    with written(path) as place:
        place.write_text("half")
        raise OSError(28, "No space left on device")


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """One temporary name for both would be renamed away under the slower one."""
    with written(tmp_path / "file") as one, written(tmp_path / "file") as other:
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"


@pytest.mark.parametrize("name", ["", ".", "missing/file", "a\0b"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    """Each would else be a traceback of its own kind."""
    with pytest.raises(UserError, match="cannot be written"):
        write_text(Path(os.path.join(tmp_path, name)), "text")


def test_only_regular_files_of_bounded_size_are_read(tmp_path: Path) -> None:
    """A device never ends, a pipe may never begin."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"12345")
    refused = {Path("/dev/zero"): "not a regular file", tmp_path / "pipe": "not a regular file", tmp_path: "directory"}
    for path, complaint in refused.items():
        with pytest.raises(UserError, match=complaint):
            read_text(path)
    assert read_text(tmp_path / "file", 5) == "12345"
    with pytest.raises(UserError, match="larger than"):
        read_text(tmp_path / "file", 4)


def test_a_packed_file_is_bounded_by_what_was_packed(tmp_path: Path) -> None:
    """A few bytes of gzip stand for gigabytes, and one cut short for nothing."""
    path, packed = tmp_path / "file.gz", gzip.compress(bytes(10))
    path.write_bytes(packed)
    assert read_packed(path, 99) == bytes(10)
    with pytest.raises(UserError, match="larger than"):
        read_packed(path, 9)
    path.write_bytes(packed[:-4])
    with pytest.raises(UserError, match="cannot be read"):
        read_packed(path)
    path.write_bytes(b"plain")
    assert read_packed(path) == b"plain"


def test_a_small_file_cannot_stand_for_a_huge_program() -> None:
    """An op that is said to run 10^12 times in a row would be a list of so many."""
    part = {"name": "p", "phase": "forward", "repeat": 1, "host": {}, "ops": [[0, 10**12]]}
    with pytest.raises(ValueError, match="more than 10,000,000 ops"):
        files.decoded_value({"first": [part], "later": [], "specs": [], "ops": [], "live": {}})


def test_a_few_aliases_do_not_stand_for_millions_of_values(tmp_path: Path) -> None:
    """They cost nothing to read, and minutes and gigabytes to print in a complaint."""
    (tmp_path / "bomb.yml").write_text(f"{BOMB}base_model: *a8\n")
    with pytest.raises(UserError, match="more than 100,000 values"):
        imports.read(tmp_path / "bomb.yml")


@pytest.mark.parametrize("key", ["evil\x1b[31m", "two\nlines", "bell\a"])
def test_a_key_cannot_write_to_the_terminal(tmp_path: Path, key: str) -> None:
    """What a stranger's file calls its keys is repeated in notes: an escape sequence there could rewrite the screen."""
    file = tmp_path / "config.yml"
    file.write_text(yaml.safe_dump({"base_model": "gpt2", "micro_batch_size": 1, "sequence_len": 64, key: 3}))
    done = CliRunner().invoke(main, ["predict", "--config", str(file), "--device", "l40s"])
    assert done.exit_code == 0
    assert ascii(key)[1:-1] in done.output
    assert all(line.isprintable() for line in done.output.splitlines())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("words", [("--version",), ("models",), ("methods", "lora", "--json")])
def test_an_answer_that_cannot_be_written_is_one_line(words: tuple[str, ...]) -> None:
    """A full disk behind a redirection is no fault of the program's."""
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "perfmodel", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "perfmodel: No space left on device\n")
