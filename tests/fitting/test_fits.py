"""Fits to published kernel times: they find what made the times, judge themselves on rows they did not see, and read
what each source means. The rows are few (`fixtures/kernels`); what a fit of so few finds is no price of a device.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perfmodel.commands import validate as commands
from perfmodel.devices import profile
from perfmodel.devices.gemm_parameters import EarlyGemmParameters
from perfmodel.errors import UserError

pd = pytest.importorskip("pandas")
common = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
attention = pytest.importorskip("validate.fitting.attention.fit", exc_type=ImportError)
gemm = pytest.importorskip("validate.fitting.gemm", exc_type=ImportError)
early = pytest.importorskip("validate.fitting.early", exc_type=ImportError)
layouts = pytest.importorskip("validate.fitting.layouts", exc_type=ImportError)
pointwise = pytest.importorskip("validate.fitting.pointwise", exc_type=ImportError)
serving = pytest.importorskip("validate.fitting.attention.serving", exc_type=ImportError)


@pytest.mark.parametrize(("device", "dtype"), [("h100-sxm", "bf16"), ("a100-80gb-pcie", "fp32")])
def test_a_gemm_fit_finds_the_times_that_known_parameters_make(kernels: Path, device: str, dtype: str) -> None:
    """Twenty rows cannot tell seventeen parameters apart, but their times must come out, and those of like shapes."""
    rows, hw = gemm.gemm_rows(kernels, device, dtype), common.hardware(device)
    begin = replace(gemm.starting_point(device, dtype), power_share=0.0, load_energy=0.0)
    known = replace(begin, math_efficiency=0.6, memory_efficiency=0.7, launch_clocks=9e3)
    made = rows.assign(seconds=gemm.priced_products(rows, hw, gemm.Found(known)))
    found = gemm.fit_gemm({device: made}, dtype, begin)
    seen, unseen = made[~made.left_out], made[made.left_out]
    for some, off in ((seen, 0.02), (unseen, 0.08)):
        some = some.reset_index(drop=True)
        before, after = (gemm.priced_products(some, hw, f) / some.seconds - 1 for f in (gemm.Found(begin), found))
        assert np.abs(after).mean() < off < np.abs(before).mean() / 2


def test_a_gemm_fit_says_what_it_saw_and_judges_itself_on_the_rest(kernels: Path) -> None:
    """What stands in a device file: source, software, rows, errors by slice."""
    rows = gemm.gemm_rows(kernels, "l40s", "bf16")
    fit = gemm.fit_device(kernels, "l40s", "bf16")
    assert (fit.rows_fitted, fit.rows_left_out) == (int((~rows.left_out).sum()), int(rows.left_out.sum()))
    assert fit.errors.rows == fit.rows_left_out
    assert {"m_from_64", "adapter_shapes", "sglang", "trtllm"} <= set(fit.slices)
    assert fit.slices["sglang"].rows + fit.slices["trtllm"].rows == fit.errors.rows
    assert fit.errors.mean < fit.errors.roofline_mean / 2
    assert "aiconfigurator" in fit.source
    assert fit.software == (
        "sglang 0.5.10, sglang 0.5.12, sglang 0.5.14, sglang 0.5.9, trtllm 1.0.0, trtllm 1.3.0rc15, trtllm 1.3.0rc20; "
        "short bursts in CUDA graphs"
    )


def test_a_row_is_the_median_of_versions_and_knows_what_lay_in_the_cache(kernels: Path) -> None:
    """SGLang cycles through six copies, TensorRT-LLM keeps one A and as many B as fill L2, at most five."""
    measured = pd.read_parquet(kernels / "gemm_bf16_h100_sxm.parquet")
    rows = gemm.gemm_rows(kernels, "h100-sxm", "bf16")
    first = measured.iloc[0]
    for group in ("sglang", "trtllm"):
        seconds = np.median([v for name, v in first.items() if str(name).startswith(group)])
        row = rows[(rows.group == group) & (rows.m == first.m) & (rows.n == first.n) & (rows.k == first.k)].iloc[0]
        assert row.seconds == pytest.approx(seconds * 1e-3, rel=2e-3)
    assert set(rows[rows.group == "sglang"].a_copies) == set(rows[rows.group == "sglang"].b_copies) == {6.0}
    l2 = common.hardware("h100-sxm").l2_bytes
    for row in rows[rows.group == "trtllm"].itertuples():
        assert row.a_copies == 1.0
        assert row.b_copies == min(5, max(1, -(-l2 // (2 * row.n * row.k))))


@pytest.mark.parametrize(
    ("device", "dtype", "shares"),
    [
        ("a100-80gb-sxm", "bf16", {"l40s": 2 / 3, "h100-sxm": 1 / 6, "b200": 1 / 6}),
        ("l40s", "bf16", {"a100-80gb-sxm": 2 / 3, "h100-sxm": 1 / 6, "b200": 1 / 6}),
        ("h100-sxm", "bf16", dict.fromkeys(("b200", "b300", "gb200", "gb300"), 1 / 4)),
        ("l4", "fp32", dict.fromkeys(("a100-40gb-pcie", "a100-80gb-pcie"), 1 / 2)),
        ("h100-sxm", "fp32", dict.fromkeys(("a100-40gb-pcie", "a100-80gb-pcie", "l4"), 1 / 3)),
    ],
)
def test_whoever_stands_for_a_device_is_never_that_device(device: str, dtype: str, shares: dict[str, float]) -> None:
    """A class default judged on a device that helped to make it would be judged on what it knows."""
    assert gemm.donors(device, dtype) == pytest.approx(shares)


def test_a_boards_slowdowns_come_out_of_its_layouts(tmp_path: Path) -> None:
    """SimuMax's rows made with a known sustained rate and known slowdowns of both backward layouts."""
    hw, base = common.hardware("b200"), replace(profile.load("b200").gemm["bf16"], power_share=0.0)
    known = replace(base, sustained=0.8, nn_slowdown=1.1, nt_slowdown=1.25)
    sizes = [(m, n, k) for m in (512, 2048, 8192) for n in (1024, 4096) for k in (1024, 6144)]
    rows = pd.DataFrame(
        [
            {"op": "matmul", "gpu": layouts.BOARDS["b200"], "m": m, "n": n, "k": k, "layout": layout,
             "out_dtype": "fp32" if layout == "NT" else "bf16", "accumulate": layout == "NT"}
            for m, n, k in sizes for layout in ("TN", "NN", "NT")
        ]
    )  # fmt: skip
    rows.assign(implied_ms=layouts.priced_layouts(rows, hw, known) * 1e3).to_csv(tmp_path / "gemm_layouts_simumax.csv")
    fit = layouts.fit_board(tmp_path, "b200", replace(base, sustained=1.0, nn_slowdown=1.0, nt_slowdown=1.0))
    p = fit.parameters
    assert (p.sustained, p.nn_slowdown, p.nt_slowdown) == pytest.approx((0.8, 1.1, 1.25), rel=0.01)
    assert fit.errors.mean < 0.01 < fit.errors.roofline_mean
    assert fit.rows_fitted + fit.rows_left_out == len(rows)
    assert set(fit.slices) == {"tn", "nn", "nt"}


def test_what_older_products_of_hopper_have_comes_out_of_linear_layers(tmp_path: Path) -> None:
    """vidur's rows made with a known cost of a step of k and a known idle share of the last wave."""
    hw, base = common.hardware("h100-sxm"), profile.load("h100-sxm").gemm["bf16"]
    known = EarlyGemmParameters(k_bubble=3.0, wave_tail=0.6)
    given = {"gpu": "h100", "tp": 1, "n_head": 32, "n_kv_head": 8, "vocab": 32000}
    rows = pd.DataFrame(
        [
            {**given, "model": model, "gated": gated, "num_tokens": m, "n_embd": width, "n_ffn": 4 * width}
            for model, gated in ((early.LEFT_OUT[0], True), ("microsoft/phi-2", False))
            for m in range(64, 4097, 64) for width in (1024, 4096)
        ]
    )  # fmt: skip
    ffn = rows.n_ffn * np.where(rows.gated, 2, 1)
    sides = {
        "attn_pre_proj": (1.5 * rows.n_embd, rows.n_embd), "attn_post_proj": (rows.n_embd, rows.n_embd),
        "mlp_up_proj": (ffn, rows.n_embd), "mlp_down_proj": (rows.n_embd, rows.n_ffn),
    }  # fmt: skip
    for name, (n, k) in sides.items():
        layer = pd.DataFrame({"m": rows.num_tokens, "n": n, "k": k})
        rows[f"{name}_ms"] = early.priced_linears(layer, hw, known.on(base)) * 1e3
    rows.to_parquet(tmp_path / "kernels_vidur.parquet")
    fit = early.fit_linears(tmp_path, base)
    assert (fit.parameters.k_bubble, fit.parameters.wave_tail) == pytest.approx((3.0, 0.6), rel=0.01)
    assert fit.errors.mean < 0.01 < fit.slices["as_current"].mean
    assert fit.rows_left_out == (early.linear_rows(tmp_path).model == early.LEFT_OUT[0]).sum()


def test_attention_fits_find_serving_times_and_borrow_what_has_no_rows(kernels: Path) -> None:
    """A third of the rows judges; head sizes and backward passes without rows come from a like device."""
    results = attention.fit_attention(kernels)
    assert set(results.fits) == {"a100-80gb-sxm", "l40s", "h100-sxm", "rtx-4090", "b200", "rtx-a5000"}
    assert set(results.classes) == {"sync_mma", "half_rate", "wgmma", "tcgen05"}
    for slug, fit in results.fits.items():
        assert fit.errors.mean < fit.errors.roofline_mean, slug
        assert fit.source.startswith("https://")
    a100, hopper = (results.fits[slug].parameters for slug in ("a100-80gb-sxm", "h100-sxm"))
    assert {size for size, _ in hopper.efficiency} <= {size for size, _ in a100.efficiency}
    assert a100.backward_cta_overhead == hopper.backward_cta_overhead
    assert results.classes["wgmma"].parameters == hopper
    assert set(results.cudnn) == {"h100-sxm", "b200"}
    for slug, fit in {"l40s": results.fits["l40s"], **results.cudnn}.items():
        rows = [serving.attention_rows(kernels, c) for c in (serving.FLASH | serving.CUDNN)[slug]]
        assert fit.rows_left_out == sum(int(d.left_out.sum()) for d in rows)
        assert fit.rows_fitted == sum(int((~d.left_out).sum()) for d in rows)
    for slug, fit in results.cudnn.items():
        assert {"sglang", "vllm", "backward", "below_512_tokens"} >= set(fit.slices) >= {"sglang", "vllm"}
        assert fit.errors.rows == fit.slices["sglang"].rows + fit.slices["vllm"].rows
        assert fit.parameters.row_tiles == (2 if slug == "b200" else 1)
        assert "own figures" in fit.notes


def test_serving_times_are_the_kernel_and_a_copy_to_the_cache() -> None:
    """Keys and values are copied at the rate that all four operands together have: in L2 or out of it."""
    hw, p = common.hardware("a100-80gb-sxm"), profile.load("a100-80gb-sxm").attention
    b, s, h, kv, dim = 3, 512, 16, 4, 128
    rows = pd.DataFrame([dict(zip(serving.SHAPE, (b, s, h, kv, dim), strict=True))])
    times = [float(serving.priced_serving(rows, hw, serving.ServingFit(p, append))[0]) for append in (0.0, 1.5)]
    kernel = serving.attention_forward_time(b, s, s, h, kv, dim, hardware=hw, parameters=p)
    assert times[0] == pytest.approx(float(kernel))
    copied, others = 2 * b * s * kv * dim * 2, 2 * b * s * h * dim * 2
    per_byte = serving.seconds_per_byte(np.array([float(copied + others)]), hw, p.l2_ratio)
    assert times[1] - times[0] == pytest.approx(float(1.5 * copied * per_byte[0]))


def test_a_roofline_of_serving_moves_every_operand_once() -> None:
    """Queries and outputs of all heads, keys and values of theirs, of two bytes each: the plain figure's time."""
    hw, p = common.hardware("a100-80gb-sxm"), profile.load("a100-80gb-sxm").attention
    b, s, h, kv, dim = 1, 16, 16, 4, 128  # so short that its bytes decide
    moved = 2 * (2 * b * s * h * dim + 2 * b * s * kv * dim) / hw.memory_bandwidth
    rows = pd.DataFrame([dict(zip([*serving.SHAPE, "seconds"], (b, s, h, kv, dim, moved), strict=True))])
    (errors,) = serving.serving_errors([(rows, serving.ServingFit(p, 0.0))], hw).values()
    assert errors.roofline_mean == pytest.approx(0.0, abs=1e-12)


def test_campaigns_share_a_kernel_and_have_their_own_framework(kernels: Path) -> None:
    """Two frameworks run one kernel: what each does beside it must not become the kernel's."""
    hw, p = common.hardware("h100-sxm"), replace(profile.load("h100-sxm").cudnn_attention, row_tiles=1)
    made, beside = [], ((8e-6, 3.0), (1.6e-5, 0.5))
    for campaign, (floor, append) in zip(serving.CUDNN["h100-sxm"], beside, strict=True):
        rows = serving.attention_rows(kernels, campaign)
        served = serving.ServingFit(replace(p, launch_floor=floor), append)
        made.append((hw, rows.assign(seconds=serving.priced_serving(rows, hw, served))))
    found = serving.fit_served(made)
    for served, (floor, append), (_, rows) in zip(found, beside, made, strict=True):
        assert served.parameters.launch_floor == pytest.approx(floor, rel=0.1)
        assert served.append == pytest.approx(append, rel=0.2)
        assert np.abs(serving.priced_serving(rows, hw, served) / rows.seconds - 1).max() < 0.03
    assert found[0].training().parameters == found[1].training().parameters


def test_pointwise_fits_find_the_times_that_known_parameters_make(kernels: Path) -> None:
    """The streams of an A100 out of its rows, from a start that is a third off."""
    rows = pointwise.pointwise_rows(kernels)
    rows = rows[(rows.gpu == "a100-80gb-pcie") & ~rows.host_bound].reset_index(drop=True)
    hw, known = common.hardware("a100-80gb-pcie"), profile.load("a100-80gb-pcie").pointwise
    made = rows.assign(seconds=pointwise.Batch(rows).price(hw, known))
    begin = replace(known, stream=0.65 * known.stream, norm_stream=0.65 * known.norm_stream)
    found = pointwise.fit_pointwise(made, hw, begin).parameters
    before, after = (pointwise.Batch(made).price(hw, p) / made.seconds - 1 for p in (begin, found))
    assert np.abs(after).mean() < 0.02 < np.abs(before).mean() / 5
    assert found.stream == pytest.approx(known.stream, rel=0.03)


def test_pointwise_fits_fill_gaps_from_a_like_device(kernels: Path) -> None:
    """Parameters that a device's rows say nothing about are the A100's on an A100, else the class's."""
    told: list[str] = []
    rows = pointwise.pointwise_rows(kernels)
    results = pointwise.fit_pointwise_blocks(kernels, told.append)
    assert sorted(results.fits) == sorted({label.split()[1] for label in told}) == sorted(set(rows.gpu))
    for slug, fit in results.fits.items():
        own = rows[(rows.gpu == slug) & ~rows.host_bound]
        assert fit.rows_fitted + fit.rows_left_out == len(own)
        donor = results.fits["a100-80gb-sxm"].parameters if slug.startswith("a100") else results.default.parameters
        for name in set(pointwise.BOUNDS) - set(pointwise.informed(own)):
            assert getattr(fit.parameters, name) == getattr(donor, name), (slug, name)
    timed = rows[~rows.host_bound]  # a device that borrows everything is judged on all its own rows, and no others
    assert [pair.rows for pair in results.pairs] == [sum(timed.gpu == slug) for slug, _ in pointwise.PAIRS]
    assert results.default.rows_fitted == sum(f.rows_fitted for f in results.fits.values())


def test_a_class_is_the_median_of_the_devices_whose_rows_speak() -> None:
    """What a device kept from its start was not measured: it must not vote, and where nobody does the default stays."""
    begin = pointwise.PointwiseParameters()
    found = {name: replace(begin, stream=stream) for name, stream in (("a", 0.5), ("b", 0.6), ("c", 0.9), ("d", 0.1))}
    known = {"a": ["stream"], "b": ["stream"], "c": ["stream"], "d": ["cast_rate"]}
    found["d"] = replace(found["d"], cast_rate=3.0)
    assert pointwise.class_default(found, known) == replace(begin, stream=0.6, cast_rate=3.0)


def test_rows_of_serving_move_what_their_layers_do(kernels: Path) -> None:
    """Vidur times the residual additions of a layer (two where it is not gated) and the embedding, in 16 bits."""
    rows = pointwise.pointwise_rows(kernels)
    vidur = rows[rows.source == "vidur"]
    assert set(vidur.family) == {"add", "embedding"}
    for family, of_row in zip(vidur.family, vidur.kernels, strict=True):
        assert len(of_row) in ((1, 2) if family == "add" else (1,))
        assert all(k.read == (2 if family == "add" else 1) * k.written for k in of_row)


@pytest.mark.parametrize(("boards", "low", "high"), [(1, 0.3, 0.5), (2, 0.7, 0.9)])
def test_what_dram_gives_one_board_does_not_carry_over(kernels: Path, boards: int, low: float, high: float) -> None:
    """Of rows made with two fifths of the datasheet's bandwidth: one board's fit finds it, a shared one does not."""
    slugs = ("a100-80gb-pcie", "a100-40gb-pcie")[:boards]
    made = {}
    for slug in slugs:
        begin = replace(gemm.starting_point(slug, "fp32"), power_share=0.0, load_energy=0.0)
        rows, known = gemm.gemm_rows(kernels, slug, "fp32"), gemm.Found(replace(begin, memory_efficiency=0.4))
        made[slug] = rows.assign(seconds=gemm.priced_products(rows, common.hardware(slug), known))
    assert low < gemm.fit_gemm(made, "fp32", begin).parameters.memory_efficiency < high


def test_a_fit_without_its_file_is_told_in_a_line(tmp_path: Path) -> None:
    """Whoever gives the wrong folder reads which file is missing."""
    with pytest.raises(UserError, match=r"has no gemm_bf16_l40s\.parquet") as caught:
        gemm.gemm_rows(tmp_path, "l40s", "bf16")
    assert "\n" not in str(caught.value)


def test_every_device_gets_the_fit_of_its_own_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run for minutes, for workers that answer in any order: one that is asked for wrongly is another's."""
    fit = pytest.importorskip("validate.fitting.fit", exc_type=ImportError)

    def answered(tasks: Iterable[tuple[int, Any]], workers: Any) -> Iterator[tuple[int, Any]]:
        for number, task in reversed(list(tasks)):
            yield number, (task.func.__name__, signature(task.func).bind(*task.args).arguments)

    fitted = fit._Fitted()
    monkeypatch.setattr(fit, "answered", answered)
    monkeypatch.setattr(fit, "_gemm_class", lambda fitted, members, dtype, name, bound: (name, bound))
    monkeypatch.setattr(fit, "_mma_sync", lambda folder, fitted: None)
    monkeypatch.setattr(fit, "_derived_classes", lambda fitted: None)
    fit._gemms(tmp_path, fitted, fit._Steps(None, 0), fit.ALONE)
    for dtype, slug in fit.GEMMS:
        asked = {"folder": tmp_path, "slug": slug, "dtype": dtype}
        assert fitted.devices[f"gemm.{dtype}"][slug] == ("fit_device", asked)
        assert fitted.left_out[f"gemm.{dtype}"][slug] == ("leave_out", asked)
    for (dtype, family), (members, _, begin) in fit.GEMM_CLASSES.items():
        asked = {"folder": tmp_path, "members": members, "dtype": dtype, "begin": begin}
        assert fitted.classes[f"gemm.{dtype}"][family] == ("fit_class", asked)


def test_products_of_a_step_have_the_launches_of_a_step() -> None:
    """Published fp32 floors were timed with the host in them: a step would pay for its host twice."""
    fit = pytest.importorskip("validate.fitting.fit", exc_type=ImportError)
    fitted, slug = fit._Fitted(), "a100-80gb-pcie"
    device, errors = profile.load(slug), common.FitErrors(10, 0.1, 0.08, 0.2, 0.5)
    measured = replace(device.gemm["fp32"], launch_clocks=13.50001e-6 * common.hardware(slug).clock_hz)
    for dtype, p in (("bf16", device.gemm["bf16"]), ("fp32", measured)):
        fitted.devices[f"gemm.{dtype}"][slug] = common.Fit(p, "source", "software", 20, 10, errors, notes="As said.")
    fit._fp32_in_steps(fitted)
    found = fitted.devices["gemm.fp32"][slug]
    assert found.parameters.launch_clocks == device.gemm["bf16"].launch_clocks
    assert "launch_clocks" in found.caveats.kept
    assert found.notes == "launch_clocks as in bf16: the measured floor of 14 us contains the host. As said."


def test_wide_sms_reach_the_rates_that_were_published() -> None:
    """Boards of 128 units an SM have no fp32 rows of their own: the shipped blocks must be what their rates tell."""
    fit = pytest.importorskip("validate.fitting.fit", exc_type=ImportError)
    any_board = replace(profile.load("rtx-3090").gemm["fp32"], math_efficiency=1.0)  # as the class is before
    errors = common.FitErrors(10, 0.1, 0.08, 0.2, 0.5)
    known = common.Fit(any_board, "source", "software", 20, 10, errors)
    wide, l40s = fit.squares.wide(known).parameters, fit.squares.of_l40s(known).parameters
    assert wide.math_efficiency == pytest.approx(profile.load("a40").gemm["fp32"].math_efficiency, rel=1e-3)
    assert wide.math_efficiency == pytest.approx(profile.load("rtx-4090").gemm["fp32"].math_efficiency, rel=1e-3)
    assert l40s.math_efficiency == pytest.approx(profile.load("l40s").gemm["fp32"].math_efficiency, rel=1e-3)
    assert fit.squares._best("l40s", l40s) == pytest.approx(fit.squares.L40S, rel=1e-3)


def test_the_command_offers_every_part_that_is_fitted_alone() -> None:
    """It names them without loading the fits."""
    show = pytest.importorskip("validate.fitting.show", exc_type=ImportError)
    offered = next(option.type for option in commands.fit.params if option.name == "part")
    assert set(offered.choices) == set(show.PARTS)
