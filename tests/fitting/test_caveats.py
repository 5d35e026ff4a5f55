"""A fit that cannot lie: what its rows do not tell keeps the usual figure, and is named as is what is at a bound."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel.devices import profile

pd = pytest.importorskip("pandas")
judging = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
attention = pytest.importorskip("validate.fitting.attention.fit", exc_type=ImportError)
flash_papers = pytest.importorskip("validate.fitting.attention.flash_papers", exc_type=ImportError)
fit = pytest.importorskip("validate.fitting.fit", exc_type=ImportError)
gemm = pytest.importorskip("validate.fitting.gemm", exc_type=ImportError)
layouts = pytest.importorskip("validate.fitting.layouts", exc_type=ImportError)
pointwise = pytest.importorskip("validate.fitting.pointwise", exc_type=ImportError)
show = pytest.importorskip("validate.fitting.show", exc_type=ImportError)

H100 = "h100-sxm"


def test_what_no_row_tells_goes_back_and_what_reached_its_end_is_named() -> None:
    """A search may leave an untold figure anywhere on its way; one that only just stays free of its end is no doubt."""
    limits = np.full(4, -2.0), np.full(4, 2.0)
    end = np.array([0.7, 1.99, 0.7, 1.9])
    found, caveats = judging.settled("abcd", end, np.zeros(4), limits, lambda z: np.exp(z[[0, 1, 3]]))
    assert found.tolist() == [0.7, 1.99, 0.0, 1.9]
    assert caveats == judging.FitCaveats(kept=("c",), at_bound=("b",))


def test_what_rows_tell_elsewhere_is_not_put_back() -> None:
    """A split of k that never pays any more because of its price is told by the rows, though its price moves none."""
    found, caveats = judging.settled(
        "a", np.array([1.5]), np.zeros(1), (np.array([-2.0]), np.array([2.0])), lambda z: np.minimum(np.exp(z), 2.0)
    )
    assert (found.tolist(), caveats) == ([1.5], judging.FitCaveats())


@pytest.mark.parametrize("told", [lambda z: np.minimum(np.exp(z), 1.0), lambda z: np.maximum(np.exp(z), 1.0)])
def test_what_rows_tell_on_one_side_of_the_usual_is_told(told: Any) -> None:
    """A cost that shows only above what is usual, or only below, was measured: it is not named as left alone."""
    limits = np.array([-2.0]), np.array([2.0])
    assert judging.settled("a", np.zeros(1), np.zeros(1), limits, told) == (np.zeros(1), judging.FitCaveats())


def test_a_gemm_fit_names_what_it_cannot_reach_and_what_it_does_not_search(kernels: Path) -> None:
    """Products at a twentieth of the peak, where a fifth is the least that a fit may find."""
    rows, hw, begin = gemm.gemm_rows(kernels, H100, "bf16"), judging.hardware(H100), gemm.starting_point(H100, "bf16")
    slow = replace(begin, math_efficiency=0.05)
    made = rows.assign(seconds=gemm.priced_products(rows, hw, gemm.Found(slow)))
    found = gemm.fit_gemm({H100: made}, "bf16", begin)
    assert "math_efficiency" in found.caveats.at_bound
    assert found.parameters.math_efficiency == pytest.approx(gemm.BOUNDS["math_efficiency"][0], rel=0.01)
    unsearched = {"sustained", "power_share", "load_energy", "long_row", "page_reach", "nn_slowdown", "nt_slowdown"}
    assert unsearched <= set(found.caveats.kept)
    assert all(getattr(found.parameters, name) == getattr(begin, name) for name in found.caveats.kept)


def published(p: Any, **only: Any) -> Any:
    """Rows as papers publish them, of a kernel with known parameters."""
    cases = [
        {"batch": 16384 // seq, "seq": seq, "heads": 16, "kv_heads": 16, "head_dim": size, "causal": causal,
         "direction": direction}
        for seq in (512, 2048, 8192) for size in (64, 128) for causal in (False, True)
        for direction in ("forward", "backward")
    ]  # fmt: skip
    rows = pd.DataFrame([c for c in cases if all(c[key] == value for key, value in only.items())])
    return rows.assign(seconds=flash_papers.published_time(rows, judging.hardware(H100), p), left_out=False)


def test_attention_without_backward_rows_keeps_the_usual_backward() -> None:
    """Nothing pulls a figure that no row tells but the start of the search, which knows nothing of the card."""
    base = replace(profile.load(H100).attention, backward_efficiency=0.5, backward_cta_overhead=4321.0)
    told = attention.fit_published(published(base, direction="forward"), judging.hardware(H100), base)
    assert {"backward_efficiency", "backward_cta_overhead", "alone", "l2_ratio"} <= set(told.caveats.kept)
    assert told.parameters.backward_efficiency == pytest.approx(0.5)
    assert told.parameters.backward_cta_overhead == pytest.approx(4321.0)
    whole = attention.fit_published(published(base), judging.hardware(H100), base)
    assert not {"backward_efficiency", "efficiency.64", "efficiency.128"} & {
        *whole.caveats.kept,
        *whole.caveats.at_bound,
    }


def test_attention_says_which_head_sizes_are_a_like_cards() -> None:
    """A head size without a row is priced by another card's ratio: the file must not pass it off as measured."""
    base = profile.load(H100).attention
    told = attention.fit_published(published(base, head_dim=64), judging.hardware(H100), base)
    assert "efficiency.128" in attention.filled(told, base).caveats.kept
    assert "efficiency.64" not in attention.filled(told, base).caveats.kept


def test_an_attention_slower_than_any_is_at_a_bound() -> None:
    """Backward at a twentieth of forward's rate, where a fifth is the least."""
    base = profile.load(H100).attention
    slow = replace(base, backward_efficiency=0.05)
    told = attention.fit_published(published(slow), judging.hardware(H100), base)
    assert "backward_efficiency" in told.caveats.at_bound


def test_a_backward_pass_of_wide_heads_has_a_rate_of_its_own() -> None:
    """cuDNN's backward of heads of 256 runs at half the rate of 128 on a Hopper; without such rows nothing says so."""
    base = replace(profile.load(H100).attention, backward_wide=0.5)
    rows = published(base, direction="backward")
    wide = rows.assign(head_dim=rows.head_dim * 2)
    wide = wide.assign(seconds=flash_papers.published_time(wide, judging.hardware(H100), base))
    told = attention.fit_backward(wide, judging.hardware(H100), replace(base, backward_wide=1.0))
    assert told.parameters.backward_wide == pytest.approx(0.5, rel=0.02)
    assert "backward_wide" not in told.caveats.kept
    assert "backward_wide" in attention.fit_backward(rows, judging.hardware(H100), base).caveats.kept


def test_pointwise_names_the_kinds_that_have_no_row_and_a_stream_out_of_reach(kernels: Path) -> None:
    """Softmax and norms of a card whose rows are additions are another card's; half the bandwidth is the least."""
    rows = pointwise.pointwise_rows(kernels)
    rows = rows[(rows.gpu == "a100-80gb-pcie") & (rows.family == "fp32 pointwise")].reset_index(drop=True)
    hw, begin = judging.hardware("a100-80gb-pcie"), profile.load("a100-80gb-pcie").pointwise
    made = rows.assign(seconds=pointwise.Batch(rows).price(hw, replace(begin, stream=0.2)))
    told = pointwise.fit_pointwise(made, hw, begin)
    assert "stream" in told.caveats.at_bound
    assert {"softmax_stream", "norm_stream", "cast_rate", "kernel_gap"} <= set(told.caveats.kept)
    assert all(getattr(told.parameters, name) == getattr(begin, name) for name in told.caveats.kept)


def test_a_boards_layouts_are_named_where_they_are_at_a_bound(tmp_path: Path) -> None:
    """Weight gradients twice as slow, where half again is the most that a fit may find."""
    hw, base = judging.hardware("b200"), replace(profile.load("b200").gemm["bf16"], power_share=0.0)
    sizes = [(m, n, k) for m in (2048, 8192) for n in (1024, 4096) for k in (1024, 6144)]
    rows = pd.DataFrame(
        [
            {"op": "matmul", "gpu": layouts.BOARDS["b200"], "m": m, "n": n, "k": k, "layout": layout,
             "out_dtype": "bf16", "accumulate": False}
            for m, n, k in sizes for layout in ("TN", "NN", "NT")
        ]
    )  # fmt: skip
    slow = replace(base, nn_slowdown=1.0, nt_slowdown=2.0, sustained=1.0)
    rows.assign(implied_ms=layouts.priced_layouts(rows, hw, slow) * 1e3).to_csv(tmp_path / "gemm_layouts_simumax.csv")
    found = layouts.fit_board(tmp_path, "b200", replace(slow, nt_slowdown=1.0))
    assert "nt_slowdown" in found.caveats.at_bound
    assert "math_efficiency" in found.caveats.kept
    assert not set(layouts.OF_A_BOARD) & set(found.caveats.kept)


def test_the_printed_table_names_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever fits reads the screen, not the file."""
    row = {"block": "attention", "device": "l40s", "slice": "left-out rows", "rows": 9, "mean": 0.1, "median": 0.1}
    rows = [{**row, "p90": 0.2, "roofline_mean": 0.5, "kept": ("alone",), "at_bound": ("p",)}]
    monkeypatch.setattr(fit, "fit_kernels", lambda *words, **options: rows)
    show.show_fit("folder", leave_one_device_out=False, write=False, as_json=False)
    printed = capsys.readouterr().out
    assert "attention l40s, not measured, so the default's: alone" in printed
    assert "attention l40s, at a bound: p" in printed
