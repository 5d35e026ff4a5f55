"""A sweep is nothing but many predictions: the same numbers, in blocks, with the baseline's ratio beside them."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fuzzing import NO_SHRINK
from hypothesis import given, settings
from hypothesis import strategies as st

from perfmodel import Setup, compare, predict, sweep
from perfmodel.cli import main
from perfmodel.errors import UserError
from perfmodel.report.files import records, rows_to

MODEL, DEVICE = "smollm2-135m", "l40s"
METHODS = ("full", "lora:r=4", "top_k:k=2", "dora", "vera:r=16")


@settings(max_examples=12, phases=NO_SHRINK)
@given(
    method=st.sampled_from(METHODS[1:]), batch=st.sets(st.integers(1, 9), min_size=1, max_size=3),
    seq=st.sets(st.integers(2, 700), min_size=1, max_size=3), rank=st.sets(st.integers(1, 64), max_size=2),
    dtype=st.sampled_from(("bf16", "fp32")),
)  # fmt: skip
def test_every_row_equals_its_own_prediction(
    method: str, batch: set[int], seq: set[int], rank: set[int], dtype: str
) -> None:
    """What a sweep says of a setup is what `predict` and `compare` say of it alone."""
    ranks = rank if method != "top_k:k=2" else ()
    grid = sweep(MODEL, ["full", method], device=DEVICE, batch=batch, seq=seq, rank=ranks, dtype=dtype)
    rows = list(records(grid.table()))
    assert len(rows) == len(grid)
    for row in rows[:: max(1, len(rows) // 5)]:
        here = {"device": DEVICE, "batch": row["batch"], "seq": row["seq"], "dtype": dtype}
        alone = predict(MODEL, row["method"], **here)
        assert row["step_s"] == pytest.approx(alone.time.phases["total"], rel=1e-9)
        assert row["peak_bytes"] == alone.memory.peak
        assert (row["flops"], row["kernels"]) == (alone.flops["total"], alone.kernels["total"])
        assert row["trainable_params"] == alone.trainable_params
        both = compare(MODEL, ["full", row["method"]], **here).speedups[0]
        if row["method"] != "full":
            assert (row["speedup"], row["speedup_low"]) == pytest.approx((both.ratio, both.low), rel=1e-9)
            assert row["verdict"] == both.verdict


def test_a_sweep_without_axes_is_the_usual_step() -> None:
    """One cell, the one that `predict` answers without a setup."""
    grid, usual = sweep(MODEL, ["full"], device=DEVICE), Setup()
    assert (list(grid.batch), list(grid.seq)) == ([usual.batch], [usual.seq])


def test_an_axis_that_is_not_given_is_the_setups() -> None:
    """A setup of batch 8 that were swept at batch 1 would answer another question in silence."""
    rows = list(records(sweep(MODEL, setup=Setup(batch=8, seq=128)).table()))
    assert {(row["batch"], row["seq"]) for row in rows} == {(8, 128)}
    assert {row["seq"] for row in records(sweep(MODEL, setup=Setup(batch=8), seq=[64, 96]).table())} == {64, 96}


def test_block_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks bound memory; they must not show in the result."""
    import importlib

    engine = importlib.import_module("perfmodel.questions.sweeps")
    grid = sweep(MODEL, ["full", "lora"], device=DEVICE, batch=range(1, 6), seq=range(16, 160, 16), rank=(2, 8))
    whole = grid.table()
    monkeypatch.setattr(engine, "BLOCK", 7)
    pieces = grid.table()
    assert list(whole) == list(pieces)
    for name in whole:
        if np.issubdtype(whole[name].dtype, np.floating):
            np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-12)
        else:
            np.testing.assert_array_equal(pieces[name], whole[name])


@pytest.mark.parametrize(
    ("methods", "options"),
    [
        (("full", "dora"), {"batch": (1, 2), "seq": (64, 96)}),
        (("lora", "qlora"), {"batch": 1, "seq": 64}),
        (("full", "lora"), {"cuda_graphs": True, "batch": 3, "dtype": "fp16"}),
        (("full", "runlora"), {"batch": (1, 2)}),
        (("full", "lora"), {"optimizer": "paged-adamw-8bit", "seq": (32, 64)}),
        (("full", "lora"), {"lengths": "50:120", "batch": (1, 2)}),
        (("full", "lora"), {"gpus": 2}),
        (("full", "lora"), {"gpus": (1, 2)}),
    ],
)  # fmt: skip
def test_a_device_has_the_same_rows_beside_others_as_alone(methods: tuple[str, ...], options: dict[str, Any]) -> None:
    """Devices that run one program are answered together, a worker answers for one: their rows are the same to the last
    bit, whatever is shared and whatever keeps devices apart."""
    several = not np.any(np.greater(options.get("gpus", 1), 1))
    gpus = ["l40s", "t4", "h100-sxm", "l4", "a100-80gb-sxm"]
    grid = sweep(MODEL, methods, device=[*gpus, *(["cpu-epyc-genoa-2c"] if several else [])], **options)
    parts = [part() for part in grid.parts()]
    for columns, (part, block) in zip(grid.blocks(), grid.order(), strict=True):
        alone = parts[part][block]
        assert {name: (x.dtype, x.tolist()) for name, x in columns.items()} == {
            name: (x.dtype, x.tolist()) for name, x in alone.items()
        }


def test_k_and_rank_are_axes_of_the_methods_that_have_them() -> None:
    """Full fine-tuning has neither, so it is swept once."""
    grid = sweep(MODEL, ["full", "lora", "top_k"], device=[DEVICE, "h100-sxm"], batch=2, seq=64, rank=(2, 4), k=(1, 3))
    table = grid.table()
    assert table["method"].tolist() == ["full", "lora:r=2", "lora:r=4", "top_k:k=1", "top_k:k=3"] * 2
    assert table["device"].tolist() == [DEVICE] * 5 + ["h100-sxm"] * 5


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_files_hold_every_row(tmp_path: Path, suffix: str) -> None:
    """All three formats carry the same table; CSV rounds to six digits."""
    parquet = pytest.importorskip("pyarrow.parquet") if suffix == ".parquet" else None
    grid = sweep(MODEL, ["full", "lora"], device=DEVICE, batch=(1, 2), seq=(32, 64))
    path = tmp_path / f"rows{suffix}"
    with rows_to(path) as write:
        for block in grid.blocks():
            write(block)
    if suffix == ".csv":
        rows = list(csv.DictReader(path.open()))
    elif suffix == ".json":
        rows = json.loads(path.read_text())
    else:
        rows = parquet.read_table(path).to_pylist()
    expected = list(records(grid.table()))
    assert [r["method"] for r in rows] == [r["method"] for r in expected]
    for row, other in zip(rows, expected, strict=True):
        assert float(row["step_s"]) == pytest.approx(other["step_s"], rel=1e-5)
        assert int(row["flops"]) == other["flops"]


def test_a_failing_sweep_leaves_no_file(tmp_path: Path) -> None:
    """Half a table would look like a whole one."""
    path = tmp_path / "rows.csv"
    with pytest.raises(UserError, match="exceeds the width"), rows_to(path) as write:  # noqa: PT012
        for block in sweep(MODEL, ["full", "lora"], device=DEVICE, rank=10**6).blocks():
            write(block)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"methods": ["full"], "rank": 4}, "needs a method with a rank"),
        ({"methods": ["top_k"], "k": 999}, "exceeds the 30 blocks"),
        ({"methods": []}, "at least one method"),
        ({"methods": ["full"], "batch": 0}, "batch must be from 1"),
        ({"methods": ["full"], "batch": [1.5]}, "must hold integers"),
    ],
)
def test_bad_axes_are_refused(arguments: dict[str, object], words: str) -> None:
    """One line that names the fault, before anything runs."""
    with pytest.raises(UserError, match=words):
        sweep(MODEL, device=DEVICE, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "seq", "words"),
    [("1-10000000", "64", "more than 1,000,000 values"), ("1-100000", "1-100000", "rows would take about 27.8 hours")],
)
def test_work_without_bound_is_not_begun(batch: str, seq: str, words: str) -> None:
    """A typing error in a range must neither fill the memory nor run for days."""
    words_typed = ["sweep", "--methods", "full", "--model", "gpt2", "--device", "l40s", "--batch", batch, "--seq", seq]
    done = CliRunner().invoke(main, words_typed)
    assert done.exit_code == 2
    assert words in done.output


def test_the_command_writes_table_and_picture(tmp_path: Path) -> None:
    """The way a user asks for a grid, and what is left on disk."""
    pytest.importorskip("matplotlib")
    files = [tmp_path / "rows.csv", tmp_path / "heat.svg"]
    command = ["sweep", "--model", MODEL, "--device", DEVICE, "--methods", "full", "lora", "--batch", "1-8*2"]
    result = CliRunner().invoke(main, [*command, "--seq", "64-256:64", "-o", str(files[0]), "--plot", str(files[1])])
    assert result.exit_code == 0, result.output
    assert "32 setups" in result.output
    assert sorted(tmp_path.iterdir()) == sorted([files[1], files[0]])
    printed = CliRunner().invoke(main, [*command, "--json"])
    answer = json.loads(printed.stdout)
    assert len(answer["rows"]) == 8
    for told in answer["summary"]:
        rows = [r for r in answer["rows"] if r["method"] == told["method"]]
        assert {w: told[w] for w in ("faster", "same", "slower")} == {
            w: sum(r["verdict"] == w for r in rows) for w in ("faster", "same", "slower")
        }
        assert told["fits"] == sum(r["fits"] for r in rows)
        assert told["rows"] == len(rows)


def test_only_cells_that_do_not_fit_are_hatched() -> None:
    """The hatching is where a user reads what fits: one cell of it too many hides a setup that works."""
    pytest.importorskip("matplotlib")
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    from perfmodel.report import heatmap

    grid = sweep(MODEL, ["full", "lora"], device=DEVICE, batch=(1, 2, 4, 64), seq=(128, 256, 8192))
    fits = np.array([[True] * 3, [True] * 3, [True, True, False], [True, False, False]])
    axes = Figure().subplots()
    _, drawn = heatmap._panel(axes, grid, np.full(fits.shape, 1.2), fits)
    assert drawn == {heatmap.HATCHING}
    hatched = next(c for c in axes.collections if isinstance(c, PolyCollection) and c.get_hatch())
    cells = [path.get_extents() for path in hatched.get_paths()]
    inside = [any(cell.contains(seq, batch) for cell in cells) for batch in grid.batch for seq in grid.seq]
    assert inside == [not fit for fit in fits.flat]


@pytest.mark.parametrize(("low", "high", "crosses"), [(0.8, 1.2, True), (1.1, 1.4, False), (0.6, 0.9, False)])
def test_a_line_is_drawn_where_the_verdict_turns_and_nowhere_else(low: float, high: float, crosses: bool) -> None:
    """It is what the picture is looked at for; matplotlib warns of a contour that is not there."""
    pytest.importorskip("matplotlib")
    from matplotlib.contour import ContourSet
    from matplotlib.figure import Figure

    from perfmodel.report import heatmap

    grid = sweep(MODEL, ["full", "lora"], device=DEVICE, batch=(1, 2), seq=(128, 256, 512))
    axes = Figure().subplots()
    mesh, told = heatmap._panel(axes, grid, np.linspace(low, high, 6).reshape(2, 3), np.ones((2, 3)))
    assert any(isinstance(drawn, ContourSet) for drawn in axes.get_children()) == crosses
    assert told == ({heatmap.LINE} if crosses else set())
    colours = mesh.to_rgba(np.log2(np.linspace(low, high, 6)))
    grounds = [text.get_bbox_patch().get_facecolor() for text in axes.texts]  # type: ignore[union-attr]
    assert grounds == pytest.approx(colours), "line and hatching end beside a number"


def test_axes_are_named_once_and_hatching_moves_no_border(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two devices below each other: lengths are named at the bottom, batches at the left, for all panels."""
    pytest.importorskip("matplotlib")
    from perfmodel.report import heatmap
    from perfmodel.report.sweeps import run_sweep

    devices = (DEVICE, "l4")
    grid = sweep(MODEL, ["full", "lora:r=8", "ia3"], device=devices, batch=(1, 2, 512), seq=(128, 256, 512))
    figures = []
    monkeypatch.setattr(heatmap, "save", lambda figure, path: figures.append(figure))
    result = run_sweep(grid, output=None, keep_rows=False, keep_speedups=True)
    heatmap.draw_heatmap(grid, result.speedups, tmp_path / "heat.svg")
    panels = [axes for axes in figures[0].axes if axes.get_title()]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["as fast as full", "does not fit"]
    assert [axes.get_title() for axes in panels] == [f"{m}\non {d}" for d in devices for m in ("lora:r=8", "ia3")]
    assert [axes.get_xlabel() for axes in panels] == ["", "", *["tokens per sample"] * 2]
    assert [axes.get_ylabel() for axes in panels] == ["batch", ""] * 2
    (bar,) = (axes for axes in figures[0].axes if axes.get_ylabel().startswith("speed-up"))
    ticks = 2 ** bar.get_yticks()
    assert ticks * ticks[::-1] == pytest.approx(np.ones(len(ticks)), abs=0.01), "as far up as down"
    named = [float(label.get_text().strip("≤≥ ")) for label in bar.get_yticklabels()]
    assert named == pytest.approx(ticks)
    for axes in panels:
        mesh = axes.collections[0].get_coordinates()
        assert axes.get_xlim() == pytest.approx((mesh[..., 0].min(), mesh[..., 0].max()))
        assert axes.get_ylim() == pytest.approx((mesh[..., 1].min(), mesh[..., 1].max()))


def test_numbers_of_gpus_that_do_not_go_are_left_out_and_said(tmp_path: Path) -> None:
    """A range of GPUs holds numbers that a cut does not divide, and more than a node without network cards has."""
    grid = sweep("llama-3.2-1b", ["full", "lora"], device="rtx-4090", gpus=range(1, 17), tp=4, nodes=None)
    assert grid.gpus.tolist() == [4, 8]
    assert set(grid.refused) == {*range(1, 17)} - {4, 8}
    assert "no network cards" in str(grid.refused[16])
    with pytest.raises(UserError, match="tp 4 does not divide the 1 GPU of the job"):
        sweep("llama-3.2-1b", ["full", "lora"], device="h100-sxm", gpus=(1, 2), tp=4)
    asked = ["sweep", "--model", "llama-3.2-1b", "--device", "h100-sxm", "--tp", "2", "--gpus", "1-4*2", "--seq", "64"]
    told = CliRunner().invoke(main, [*asked, "--output", str(tmp_path / "rows.csv")])
    assert "note: left out: 1 GPU: tp 2 does not divide the 1 GPU of the job" in told.stdout
    plain = json.loads(CliRunner().invoke(main, [*asked, "--json"]).stdout)
    assert {row["gpus"] for row in plain["rows"]} == {2, 4}
    assert plain["left_out"] == [{"gpus": 1, "why": "tp 2 does not divide the 1 GPU of the job"}]
