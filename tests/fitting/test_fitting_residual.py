"""The learned factor of 16-bit products: what its fit finds and never sees, and on which prices it stands."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from perfmodel.cli import main
from perfmodel.devices import profile
from perfmodel.devices import residual as learned
from perfmodel.devices.gemm import gemm_time
from perfmodel.resources import read_toml, stems

pd = pytest.importorskip("pandas")
fit = pytest.importorskip("validate.fitting.fit", exc_type=ImportError)
fitting = pytest.importorskip("validate.fitting.residual", exc_type=ImportError)
gemm = pytest.importorskip("validate.fitting.gemm", exc_type=ImportError)
judging = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
write = pytest.importorskip("validate.fitting.write", exc_type=ImportError)

FILES = stems(learned.FOLDER, ".toml")
BURST = profile.load("l40s").gemm["bf16"].in_bursts()


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A folder of made-up measurements: the physical price times a factor by k, between 0.85 and 1.2."""
    sides = np.exp2(np.arange(5.0, 16.0)).round()
    shapes = np.stack(np.meshgrid(np.exp2(np.arange(0.0, 15.0, 2.0)), sides, sides), axis=-1).reshape(-1, 3)
    m, n, k = shapes.T
    price = gemm_time(m, n, k, hardware=judging.hardware("l40s"), parameters=BURST, a_copies=6.0, b_copies=6.0)
    rows = pd.DataFrame({"m": m, "n": n, "k": k, "sglang_1_ms": price * np.exp(0.17 * np.sin(np.log2(k) / 2)) * 1e3})
    rows.to_parquet(tmp_path / gemm.BF16_FILES["l40s"])
    return tmp_path


def test_a_factor_is_found_where_it_was_not_measured_too(measured: Path) -> None:
    """Among the shapes of the fit, and at values of n and k that it never saw, the former better."""
    found = fitting.fit_residual(measured, "l40s", BURST)
    assert found.before["all"].mean > 0.08
    assert found.after["all"].median < 0.005
    assert found.after["all"].mean < 0.02  # the bounds cut the top and the bottom off
    assert found.after["other_n"].mean < 0.02
    assert found.after["other_k"].mean < found.before["other_k"].mean / 2
    assert found.rows_left_out == found.before["all"].rows
    low, high = found.residual.bounds
    assert -0.171 < low < -0.1
    assert 0.1 < high < 0.171


def test_shapes_that_are_left_out_are_not_in_the_fit(measured: Path) -> None:
    """Their errors would say nothing."""
    once = fitting.fit_residual(measured, "l40s", BURST)
    rows = gemm.gemm_rows(measured, "l40s", "bf16")
    file = measured / gemm.BF16_FILES["l40s"]
    table = pd.read_parquet(file)
    table["sglang_1_ms"] *= np.where(rows.left_out, 3.0, 1.0)
    table.to_parquet(file)
    twice = fitting.fit_residual(measured, "l40s", BURST)
    assert twice.after["all"].mean > 0.5
    assert (once.residual.shapes == twice.residual.shapes).all()
    assert all((once.residual.waves[tile] == table).all() for tile, table in twice.residual.waves.items())
    assert once.residual.bounds == twice.residual.bounds


def test_a_file_holds_what_was_fitted(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables go through bytes: what is priced has to be what was judged."""
    found = fitting.fit_residual(measured, "l40s", BURST)
    monkeypatch.setattr(learned, "FOLDER", tmp_path)
    write.write_residual(tmp_path / "mine.toml", found, "2026-01-01")
    read = learned.load_residual("mine")
    assert read.shapes == pytest.approx(found.residual.shapes, abs=1e-12)
    assert list(read.waves) == list(found.residual.waves)
    for tile, table in found.residual.waves.items():
        assert read.waves[tile] == pytest.approx(table, abs=1e-12)
    assert read.bounds == found.residual.bounds
    table = read_toml(tmp_path / "mine.toml")
    assert table["source"] == gemm.AICONFIGURATOR
    assert table["with_residual"]["all"]["rows"] == found.rows_left_out
    learned.load_residual.cache_clear()


def test_the_command_fits_residuals_alone(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of the physics the whole fit takes ten minutes; this part is on top of prices that files have."""
    monkeypatch.setattr(gemm, "BF16_FILES", {"l40s": gemm.BF16_FILES["l40s"]})
    monkeypatch.setattr(fit, "RESIDUALS", tmp_path)
    words = ["validate", "fit", "--kernels", str(measured), "--part", "residual", "--json"]
    dry = CliRunner().invoke(main, [*words, "--dry-run"], catch_exceptions=False)
    assert dry.exit_code == 0
    mean = {row["slice"]: row["mean"] for row in json.loads(dry.stdout)}
    assert mean["all"] < mean["all, physics alone"] / 4
    assert not (tmp_path / "l40s.toml").exists()
    assert CliRunner().invoke(main, words, catch_exceptions=False).stdout == dry.stdout
    assert read_toml(tmp_path / "l40s.toml")["with_residual"]["all"]["mean"] == mean["all"]


@pytest.mark.parametrize("name", FILES)
def test_a_residual_belongs_to_the_prices_of_today(name: str) -> None:
    """On top of other physics it is worth nothing: after a change there, perfmodel validate fit --part residual."""
    table, on = read_toml(learned.FOLDER / f"{name}.toml"), profile.load(name)
    assert fitting.mean_price(on.hardware, on.gemm["bf16"]) == pytest.approx(table["physics"], rel=1e-3)
    assert table["rows_fitted"] > table["rows_left_out"] > 10_000
    assert (learned.FOLDER / f"{name}.toml").stat().st_size < 10_000


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rows", ["all", "m_from_64", "m_below_64", "adapter_shapes", "other_n", "other_k"])
def test_a_residual_makes_prices_better(name: str, rows: str) -> None:
    """Of shapes that no fit saw: among those that were measured, and at other values of n or k."""
    table = read_toml(learned.FOLDER / f"{name}.toml")
    assert table["with_residual"][rows]["mean"] < table["physics_alone"][rows]["mean"]
