"""How GEMM measurements are read: what ran before them, and who stands for a device that is left out."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from perfmodel.devices import profile
from perfmodel.devices.pointwise import PointwiseParameters

pd = pytest.importorskip("pandas")
campaigns = pytest.importorskip("validate.fitting.campaigns", exc_type=ImportError)
sgemm = pytest.importorskip("validate.fitting.sgemm", exc_type=ImportError)
gemm = pytest.importorskip("validate.fitting.gemm", exc_type=ImportError)
wider = pytest.importorskip("validate.microbench.wider", exc_type=ImportError)

T4_MEMORY, T4_BANDWIDTH = 16 * 2**30, 320e9


def test_a_campaign_is_in_the_order_of_its_program() -> None:
    """The replay is only as good as the order; these are the first lines of NeuSight's own list, and their number."""
    assert campaigns.order("bmm")[:3] == [(20480, 2048, 64, 2048), (1280, 2048, 2048, 256), (3072, 4096, 4096, 128)]
    assert [len(campaigns.order(name)) for name in ("bmm", "linear", "collected")] == [3108, 1040, 6480]
    assert all(max(shape) <= 65537 and min(shape) >= 1 for shape in campaigns.order("collected"))


def test_rows_of_another_order_are_not_replayed() -> None:
    """A board that ran the shapes in another order had another history: nothing is known of it."""
    some = campaigns.order("linear")[5:9]
    assert campaigns.entries("linear", some) == [5, 6, 7, 8]
    assert campaigns.entries("linear", some[::-1]) == [-1] * 4
    for unknown in ([*some, (7, 7, 7, 7)], [(7, 7, 7, 7), *some]):
        assert campaigns.entries("linear", unknown) == [-1] * 5


def test_what_does_not_fit_gives_the_board_a_pause() -> None:
    """344 GB of products fail on 16 GB, and leave the clock high for what follows; seconds of load leave it low."""
    run = campaigns.board_campaign("bmm", T4_MEMORY, T4_BANDWIDTH)
    assert run.fails[:4].all()
    assert not run.fails[4:7].any()
    rested = campaigns.boosts(run, np.full(len(run.m), 1e-4), 0.6, 0.1)
    assert rested[4] > 0.9
    loaded = campaigns.boosts(run, np.full(len(run.m), 0.2), 0.6, 0.1)
    assert loaded[5] < 0.1 < rested[5]
    assert (loaded[~run.fails] <= rested[~run.fails] + 1e-12).all()


def test_a_slow_control_leaves_the_clock_high_for_longer() -> None:
    """The five fastest of 25 runs are the first ones while the clock falls."""
    run = campaigns.board_campaign("bmm", T4_MEMORY, T4_BANDWIDTH)
    seconds = np.full(len(run.m), 5e-3)
    fast, slow = (campaigns.boosts(run, seconds, 0.6, reaction) for reaction in (0.05, 0.5))
    assert (fast >= 0.0).all()
    assert (slow <= 1.0).all()
    assert fast.mean() < slow.mean()


@pytest.mark.parametrize(("dtype", "slugs"), [("bf16", gemm.BF16_FILES), ("fp32", sgemm.GPUS)])
def test_a_device_never_stands_for_itself(dtype: str, slugs: dict[str, str]) -> None:
    """Leaving a device out must leave it out; the shares of the others make a whole."""
    for slug in slugs:
        shares = gemm.donors(slug, dtype)
        assert slug not in shares
        assert sum(shares.values()) == pytest.approx(1.0)
    assert gemm.donors("l40s", "bf16")["a100-80gb-sxm"] > 0.5  # the same instructions, mma.sync and cp.async


@pytest.mark.parametrize("slug", sgemm.STARTS)
def test_a_fit_starts_from_tiles_that_a_kernel_can_have(slug: str) -> None:
    """Threads come in warps of 32 and tiles in powers of two; no fit moves a tile, so the bundled file has them too."""
    start = sgemm.STARTS[slug]
    sides = {side for tile in (*start.tiles, *(start.batched_tiles or ())) for side in tile}
    assert all(side >= 32 and side & (side - 1) == 0 for side in sides)
    assert profile.load(slug).gemm["fp32"].tiles == start.tiles


def test_rows_are_priced_between_the_two_clocks_of_a_board() -> None:
    """A row after a pause costs what the chip would at its highest clock, one amid load what the power leaves."""
    common = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
    pandas = pytest.importorskip("pandas")
    batch, m, k, n = np.array(campaigns.order("linear")[5:205]).T
    rows = pandas.DataFrame({"m": m, "n": n, "k": k, "b": 1.0, "a_copies": 1.0, "b_copies": 1.0, "dtype": "fp32"})
    rows = rows.assign(campaign="linear", entry=np.arange(5, 205), device="t4")[batch == 1].reset_index(drop=True)
    hw, p = common.hardware("t4"), sgemm.STARTS["t4"]
    board = sgemm.Board(rows, hw, p)
    low, high = (board.predict(hw, p, 1.0, np.full(len(rows), x)) for x in (1.0, 0.0))
    replayed = board.predict(hw, p, 1.0, board.boosts(campaigns.REACTION))
    assert (low <= high * (1 + 1e-12)).all()
    assert (low[m > 2000] < 0.9 * high[m > 2000]).any()
    assert ((low <= replayed * (1 + 1e-12)) & (replayed <= high * (1 + 1e-12))).all()


@pytest.mark.parametrize("slug", ["a100-40gb-pcie", "a100-80gb-pcie", "h100-sxm"])
def test_published_rows_stand_in_the_order_of_their_campaign(kernels: Path, slug: str) -> None:
    """The program's own lists hold every shape that was published, in the file's order: the oracle of the replay."""
    rows = sgemm.sgemm_rows(kernels, slug)
    assert set(rows.campaign) == {"bmm", "linear"}
    for name, part in rows.groupby("campaign"):
        shapes = campaigns.order(name)
        assert (part.entry >= 0).all()
        assert part.entry.is_monotonic_increasing
        assert [shapes[i] for i in part.entry] == list(zip(part.b, part.m, part.k, part.n, strict=True))


@pytest.mark.parametrize(
    ("slug", "dtype"), [*((s, "fp32") for s in sgemm.STARTS), *((s, "bf16") for s in gemm.BF16_FILES)]
)
def test_what_no_fit_moves_is_in_a_device_file_as_its_library_has_it(slug: str, dtype: str) -> None:
    """Tiles are read off kernels' names; with another tile or another way to split k it would be another library."""
    device, library = profile.load(slug), gemm.starting_point(slug, dtype)
    found = {*gemm.searched_bounds(dtype), *gemm.POWER, "sustained", "nn_slowdown", "nt_slowdown"}
    for f in fields(library):
        if f.name not in found:
            known = getattr(library, f.name)
            expected = pytest.approx(known, rel=1e-3) if isinstance(known, float) else known  # files have four digits
            assert getattr(device.gemm[dtype], f.name) == expected, f.name


@pytest.mark.parametrize(("lender", "slug", "dtype"), [("t4", "l4", "fp32"), ("a100-80gb-sxm", "h100-sxm", "bf16")])
def test_what_a_device_borrows_is_what_the_fit_found(lender: str, slug: str, dtype: str) -> None:
    """The power limit too, which a fit leaves out that starts without one: the tiles stay those of its library."""
    start, library = gemm.starting_point(lender, dtype), gemm.starting_point(slug, dtype)
    limits = gemm.searched_bounds(dtype)
    lent = replace(start, **{name: 1.25 * getattr(start, name) for name in limits})
    parameters = gemm.on_device(gemm.Found(lent), slug, dtype).parameters
    for f in fields(library):
        assert getattr(parameters, f.name) == getattr(lent if f.name in limits else library, f.name), f.name


def test_defaults_lie_where_cards_were_found() -> None:
    """A default stands for what no card's rows tell, and a fit begins there: beside all cards it would be a guess."""
    pointwise = pytest.importorskip("validate.fitting.pointwise", exc_type=ImportError)
    cards = [profile.load(name) for name in profile.names()]
    fitted = [d.pointwise for d in cards if d.kind == "cuda" and d.fitted["pointwise"] == "fitted"]
    for name in pointwise.BOUNDS:
        seen, default = [getattr(p, name) for p in fitted], getattr(PointwiseParameters(), name)
        assert min(seen) / 1.6 <= default <= 1.6 * max(seen), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_designs_measure_what_models_have(device: str) -> None:
    """Sides of whole vectors, as models have them (others run other kernels), but where those others are the matter."""
    for name, cases in wider.campaign_blocks(device, ("fp32", "bf16")).items():
        for case in cases if "unaligned" not in name else ():
            sides = [size for side, size in case.sizes if side not in ("heads", "kv_heads")]
            assert all(size == 1 or size % 4 == 0 for size in sides), case


def test_a_roofline_by_hand() -> None:
    """What every fit is compared with: FLOPs at the peak or bytes at the bandwidth, whichever is longer."""
    hw = profile.load("a100-80gb-sxm").hardware
    rows = pd.DataFrame({"m": [8192, 1], "n": [8192, 4096], "k": [8192, 4096], "b": [1.0, 3.0], "dtype": "bf16"})
    math, moved = 2 * 8192**3 / 312e12, 2 * 3 * (4096 + 4096**2 + 4096) / hw.memory_bandwidth
    assert gemm.roofline_seconds(rows, hw) == pytest.approx([math, moved])
    assert gemm.roofline_seconds(rows[:1], hw) == pytest.approx([math])
    moved_fp32 = gemm.roofline_seconds(rows.assign(dtype="fp32"), hw)[1]
    assert moved_fp32 == pytest.approx(2 * moved)
