"""`perfmodel models`, `devices` and `nodes` with a part of a name."""

from collections.abc import Sequence

import pytest
from click.testing import CliRunner

from perfmodel.cli import main


def said(*args: str) -> str:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize(
    ("asked", "listed", "left_out"),
    [
        (("models", "gemma-2"), ("gemma-2-2b", "gemma-2-27b"), ("llama-3.2-3b", "gemma-3-27b")),
        (("models", "Apertus"), ("apertus-8b", "traced when"), ("gemma-2-2b", "width")),
        (("devices", "NVIDIA RTX 4090"), ("rtx-4090",), ("rtx-4080", "l40s")),
        (("devices", "a100 80gb"), ("a100-80gb-pcie", "a100-80gb-sxm"), ("a100-40gb-sxm",)),
        (("nodes", "h100"), ("dgx-h100", "aws-p5"), ("dgx-a100",)),
    ],
)
def test_a_part_of_a_name_lists_what_has_it(
    asked: Sequence[str], listed: Sequence[str], left_out: Sequence[str]
) -> None:
    """Who looks for one of 250 models need not scroll; short and full names both count, however they are typed."""
    text = said(*asked)
    assert all(name in text for name in listed)
    assert not any(name in text for name in left_out)


@pytest.mark.parametrize(
    ("command", "part", "hint"), [("models", "lama-3.2-3bb", "did you mean"), ("devices", "xyz", "perfmodel devices")]
)
def test_a_name_that_nothing_has_is_one_line(command: str, part: str, hint: str) -> None:
    result = CliRunner().invoke(main, [command, part])
    assert (result.exit_code, result.stdout) == (2, "")
    assert hint in result.output
    assert len(result.output.splitlines()) == 1
