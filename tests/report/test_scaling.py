"""A sweep over GPUs says how the rate grows: in a table, in a sentence, in a picture, all from the same predictions."""

import re
from pathlib import Path

import pytest

from perfmodel import predict, sweep
from perfmodel.questions.sweeps import Sweep
from perfmodel.report import scaling, sweeps
from perfmodel.report.sweeps import FinishedSweep, run_sweep

MODEL, DEVICE = "smollm2-135m", "a100-80gb-sxm"
METHODS = ("full", "lora:r=8")


def swept(*gpus: int, batch: int = 1, seq: int = 512) -> tuple[Sweep, FinishedSweep]:
    grid = sweep(MODEL, METHODS, device=DEVICE, batch=batch, seq=seq, gpus=gpus, parallel="fsdp2")
    return grid, run_sweep(grid, output=None, keep_rows=False, keep_speedups=True)


def rate(method: str, gpus: int) -> float:
    """Tokens a second of a prediction by itself."""
    step = predict(MODEL, method, device=DEVICE, batch=1, seq=512, gpus=gpus, parallel="fsdp2")
    return float(512 * gpus / step.time.phases["total"])


def test_the_table_holds_rates_and_what_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """The rate of each number of GPUs, and its share of as many times the first."""
    sweeps.show_summary(*swept(2, 8))
    printed = capsys.readouterr().out
    for gpus in (2, 8):
        cells = [f"{rate(m, gpus):,.0f} {100 * rate(m, gpus) * 2 / gpus / rate(m, 2):.0f}" for m in METHODS]
        (line,) = (line for line in printed.splitlines() if line.split()[:1] == [str(gpus)] and "," in line)
        found = " ".join(line.replace("%", " ").split())
        assert found == " ".join([str(gpus), *cells])


def test_a_second_node_is_told_where_one_and_two_were_tried(capsys: pytest.CaptureFixture[str]) -> None:
    """A node of A100s holds eight: the sentence compares 16 with 8, and is silent where either was not tried."""
    sweeps.show_summary(*swept(8, 16))
    printed = " ".join(capsys.readouterr().out.split())
    for method in METHODS:
        gain = rate(method, 16) / rate(method, 8)
        verdict = "worth it" if gain > sweeps.WORTH else "hardly worth it" if gain > 1 else "not worth it"
        assert (
            f"{method} fits on all of these; a second node, 16 GPUs for 8: {gain:.2f} x the rate, {verdict}." in printed
        )
    for gpus in ((4, 8), (4, 16)):
        sweeps.show_summary(*swept(*gpus))
        assert "second node" not in capsys.readouterr().out


def test_what_fits_on_one_gpu_alone_is_not_said_to_fit_on_all(capsys: pytest.CaptureFixture[str]) -> None:
    """DDP's buckets hold the gradients once more: what just fits on one GPU does not on two."""
    grid = sweep("llama-3.1-8b", METHODS, device="h100-sxm", batch=1, seq=512, gpus=(1, 2, 4))
    sweeps.show_summary(grid, run_sweep(grid, output=None, keep_rows=False, keep_speedups=True))
    printed = " ".join(capsys.readouterr().out.split())
    assert "full fits on 1 of these." in printed
    assert "lora:r=8 fits on all of these." in printed


def test_where_it_begins_to_fit_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Full shards need several GPUs before their states are small enough; nothing is said of rates that are not."""
    grid = sweep("llama-3.1-70b", METHODS, device=DEVICE, batch=1, seq=512, gpus=(8, 16, 64), parallel="fsdp2")
    sweeps.show_summary(grid, run_sweep(grid, output=None, keep_rows=False, keep_speedups=True))
    printed = " ".join(capsys.readouterr().out.split())
    assert "full fits from 16 GPUs on" in printed
    assert "lora:r=8 fits on all of these; a second node" in printed
    sweeps.show_summary(*swept(2, 4, batch=2048))
    assert "full fits on none of these numbers of GPUs." in " ".join(capsys.readouterr().out.split())


def test_the_picture_draws_the_rate_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line a method, dashed beside it what scales without loss: the first rate throughout."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(scaling, "save", lambda figure, path: figures.append(figure))
    scaling.draw_scaling(*swept(2, 8), tmp_path / "scaling.svg")
    (axes,) = figures[0].axes
    lines = axes.get_lines()
    for method, line, dashed in zip(METHODS, lines[::2], lines[1::2], strict=True):
        each = [rate(method, gpus) / gpus for gpus in (2, 8)]
        assert list(line.get_xdata()) == [2, 8]
        assert list(line.get_ydata()) == pytest.approx(each)
        assert list(dashed.get_ydata()) == pytest.approx([each[0]] * 2)
        assert line.get_label() == f"{method} ({100 * each[1] / each[0]:.0f} % at 8)"
    assert axes.get_ylim()[0] == 0


def test_the_legend_tells_of_what_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DDP's buckets leave full fine-tuning one GPU: its share at the last number was nan %, of no line at all."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(scaling, "save", lambda figure, path: figures.append(figure))
    for gpus, labels in [((1, 2, 4), ["full", "lora:r=8"]), ((2, 4), ["lora:r=8"])]:
        grid = sweep("llama-3.1-8b", METHODS, device="h100-sxm", batch=1, seq=512, gpus=gpus)
        scaling.draw_scaling(
            grid, run_sweep(grid, output=None, keep_rows=False, keep_speedups=True), tmp_path / "s.svg"
        )
        (axes,) = figures[-1].axes
        told = [text.get_text() for text in axes.get_legend().get_texts()]
        assert [label.split(" (")[0] for label in told] == labels
        assert not any("nan" in label for label in told)
    assert told[0].endswith("% at 4)")
    scaling.draw_scaling(*swept(2, 4, batch=2048), tmp_path / "none.svg")
    assert figures[-1].axes[0].get_legend() is None


def test_one_ratio_is_no_range_and_no_star_is_explained_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    sweeps.show_summary(*swept(2))
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("lora:r=8"))
    assert re.search(r"% +\d+\.\d\d ", line)
    assert "does not fit" not in printed
    sweeps.show_summary(*swept(2, batch=2048))
    assert "(* does not fit)" in capsys.readouterr().out
