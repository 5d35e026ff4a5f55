"""A user's own device files: found where they lie, and none of them, broken or missing, hides the rest."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import OWN_DEVICE

from perfmodel.cli import main
from perfmodel.devices import own, profile
from perfmodel.errors import UserError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path))
    (tmp_path / "devices").mkdir()
    return tmp_path / "devices"


def test_a_broken_file_hides_no_other_device(folder: Path) -> None:
    """One half-edited file must not take away the list, or the profile that records were measured with."""
    (folder / "broken.toml").write_text('name = "')
    (folder / "whole.toml").write_text(OWN_DEVICE)
    shown = CliRunner().invoke(main, ["devices"])
    assert shown.exit_code == 0
    assert "whole" in shown.stdout
    assert "h100-sxm" in shown.stdout
    assert "left out" in shown.stderr
    assert "broken.toml: not valid TOML" in shown.stderr
    mine = profile.by_makers_name(profile.load("whole").name)
    assert mine is not None
    assert mine.slug == "whole"


def test_a_link_that_leads_nowhere_is_named(folder: Path) -> None:
    """Else the answer is that 'mine' is unknown, and whether 'mine' was meant."""
    (folder / "mine.toml").symlink_to(folder / "gone")
    with pytest.raises(UserError, match=r"mine\.toml: cannot be read"):
        profile.load("mine")


@pytest.mark.parametrize("home", ["~nobody-of-this-name/x", None])
def test_without_a_home_folder_bundled_devices_are_there(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run under a number that has neither a name nor a home."""
    monkeypatch.delenv("PERFMODEL_HOME")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    if home:
        monkeypatch.setenv("PERFMODEL_HOME", home)
    else:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert own.calibrated() == []
    assert profile.load("h100-sxm").slug == "h100-sxm"
    with pytest.raises(UserError, match="unknown device 'nonesuch'"):
        profile.load("nonesuch")
    with pytest.raises(UserError, match="set PERFMODEL_HOME"):
        own.path("mine")
