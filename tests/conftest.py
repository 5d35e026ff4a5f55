"""What every test starts from."""

import pytest


@pytest.fixture(autouse=True)
def _no_calibration_of_this_machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody calibrated here is theirs: no test may see it or write beside it."""
    monkeypatch.setenv("PERFMODEL_HOME", str(tmp_path_factory.getbasetemp() / "home"))
