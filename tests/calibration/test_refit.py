"""`perfmodel validate fit --records`: host costs from measured steps, judged on groups that the fit did not see."""

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("torch")

from click.testing import CliRunner
from records_by_hand import DEVICE, TINY, environment, visit

from perfmodel.cli import main
from perfmodel.devices import host as hosts
from perfmodel.errors import UserError
from perfmodel.setup import Setup
from validate.calibration import refit
from validate.measuring import records
from validate.measuring.cells import Cell

TRUTH = {"forward": 0.7, "backward": 1.4, "optimizer": 2.5}
SIZES = ((1, 8), (2, 16), (4, 8))


def written(path: Path, sizes: tuple[tuple[int, int], ...] = SIZES) -> Path:
    """Steps of a machine whose host costs are known multiples of the default host's."""
    slow = refit.scaled(hosts.load(), TRUTH)
    records.append_records(path, environment())
    for batch, seq in sizes:
        for method in ("full", "lora:r=4,targets=all-linear", "ia3"):
            records.append_records(
                path, visit(Cell(TINY, method, Setup(batch=batch, seq=seq, dtype="fp32")), host=slow)
            )
    return path


def test_known_host_costs_come_back_and_errors_are_on_groups_left_out(tmp_path: Path) -> None:
    """Measured steps differ from predicted ones by the host alone: the fit must find by how much, and say so."""
    path, output = written(tmp_path / "r.jsonl"), tmp_path / "host.toml"
    words = ["validate", "fit", "--records", str(path), "--device", DEVICE["cpu"], "--output", str(output)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    table = tomllib.loads(output.read_text())
    fit = table["fit"]
    assert {name: fit[f"factor_{name}"] for name in TRUTH} == pytest.approx(TRUTH, rel=0.1)
    assert (fit["cells_fitted"], fit["cells_left_out"]) == (6, 3)
    assert fit["step_mean"] < 0.03
    assert hosts.load(str(output)).call == pytest.approx(hosts.load().call * fit["factor_forward"], rel=0.01)
    assert "refitted" in table["source"]


def test_groups_are_never_split(tmp_path: Path) -> None:
    """A group shares its base products: half of it in the fit would flatter the half that is left out."""
    found = refit.check_records([written(tmp_path / "r.jsonl")], device=DEVICE["cpu"]).outcomes
    fit, held = (
        {o.measured.cell.group for o in part} for part in refit.split_by_groups(found)
    )  # fmt: skip
    assert (fit, held) == tuple({o.measured.cell.group for o in part} for part in refit.split_by_groups(found[::-1]))
    assert len(fit) == 2
    assert len(held) == 1
    assert not fit & held


def test_one_group_is_too_few(tmp_path: Path) -> None:
    """Without anything left out nobody could say how good the fit is."""
    with pytest.raises(UserError, match="at least two models or setups"):
        refit.refit([written(tmp_path / "r.jsonl", SIZES[:1])], device=DEVICE["cpu"], host=None)


@pytest.mark.parametrize("words", [[], ["--kernels", ".", "--records", __file__]])
def test_kernels_or_records(words: list[str]) -> None:
    """The two fits make different files: which one is meant must be said."""
    done = CliRunner().invoke(main, ["validate", "fit", *words])
    assert done.exit_code == 2
    assert "either --kernels" in done.output
