"""Device files: an own one works from its datasheet, bad ones end in one clear line, rewriting keeps the rest."""

import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
from helpers import OWN_DEVICE

from perfmodel.devices import engine, profile
from perfmodel.devices import host as hosts
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.gemm_parameters import TENSOR_CORE_TILES, Tiles
from perfmodel.devices.hardware import Hardware
from perfmodel.errors import UserError


def test_an_own_device_file_works_from_its_datasheet(tmp_path: Path) -> None:
    """Class defaults make any GPU usable."""
    path = tmp_path / "mine.toml"
    path.write_text(OWN_DEVICE)
    device = profile.load(path)
    assert device.slug == "mine"
    assert set(device.fitted.values()) == {"class"}
    assert device.hardware == Hardware(28, 1.78e9, 12884901888, 360e9, 2359296, 12.7e12, 12.7e12, 25.5e12, 25.5e12)
    assert gemm_time(4096, 4096, 4096, hardware=device.hardware, parameters=device.gemm["bf16"]) > 4096**3 * 2 / 25.5e12


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sm_count = 28\n", "", "sm_count is missing"),
        ("sm_count = 28", "sm_count = 28.5", "sm_count must be a whole number above 0, got 28.5"),
        ("360e9", '"360 GB/s"', "memory_bandwidth must be a number above 0, got '360 GB/s'"),
        ("1.78e9", "-1.78e9", "clock_hz must be a number above 0, got -1780000000.0"),
        ("1.78e9", "nan", "clock_hz must be a number above 0"),
        ("12.7e12\ntf32", "true\ntf32", "fp32_flops must be a number above 0, got True"),
        ("l2_bytes", "l2_byte", "unknown key 'l2_byte': did you mean 'l2_bytes'"),
        ('"cuda"', '"cudo"', "kind 'cudo' is unknown: did you mean 'cuda'"),
        ('"ampere"\ncompute_capability = "8.6"', '"ampère"\ncompute_capability = "99"', "did you mean 'ampere'"),
        ('name = "My GPU"', "", "name is missing"),
        ("[datasheet]", "[datasheets]", "the table 'datasheet' is missing"),
        ("sm_count = 28", "sm_count = = 28", "not valid TOML"),
        ("bf16_flops = 25.5e12", "bf16_flops = 25.5e12\n[fitted]\nattention = 3", "must be a table"),
        (
            "bf16_flops = 25.5e12",
            "bf16_flops = 25.5e12\n[fitted.attention.parameters]\nalone = 1.0",
            "launch_floor is missing",
        ),
    ],
)
def test_a_bad_device_file_ends_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    """The line names the file, the key and what would be right."""
    path = tmp_path / "bad.toml"
    assert old in OWN_DEVICE
    path.write_text(OWN_DEVICE.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)) as error:
        profile.load(path)
    assert "bad.toml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100-sxn", "did you mean 'h100-sxm'"),
        ("A100-SXN", "did you mean 'a100-sxm'"),
        ("tpu", "unknown device 'tpu': TPUs are not modelled"),
        ("mi300x", "AMD cards are not modelled"),
        ("AMD Radeon RX 7900 XTX", "AMD cards are not modelled"),
        ("GeForce GTX 1080", "GeForce GTX cards are not modelled"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "Laptop GPUs are not modelled"),
        ("rtx 4080 xt", "did you mean 'rtx-4080'"),
        ("", "unknown device ''"),
        ("missing/gpu.toml", "no such device file"),
        ("classes", "unknown device 'classes'"),
        ("x" * 5000, "unknown device"),
    ],
)
def test_an_unknown_device_names_the_nearest(name: str, message: str) -> None:
    """One line, and what the user probably meant."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        profile.load(name)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """Binary files and folders too."""
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        profile.load(path)
    with pytest.raises(UserError, match="unknown device"):
        profile.load(tmp_path)


def test_rewriting_keeps_what_the_author_wrote(tmp_path: Path) -> None:
    """The fit replaces [fitted…] only: comments, order and spacing of the datasheet stay byte for byte."""
    common = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
    write = pytest.importorskip("validate.fitting.write", exc_type=ImportError)
    path = tmp_path / "mine.toml"
    path.write_text("# a comment\n" + OWN_DEVICE + "# differs: nothing\n")
    attention = profile.load("a100").attention
    errors = common.FitErrors(10, 0.1, 0.08, 0.2, 0.5)
    fit = common.Fit(attention, 'a "quoted" source', "software", 20, 10, errors, {"short": errors, "m >= 64": errors})
    write.write_blocks(path, {"attention": fit}, "2026-01-01")
    once = path.read_text()
    write.write_blocks(path, {"attention": fit}, "2026-01-01")
    assert path.read_text() == once
    assert once.startswith("# a comment\n" + OWN_DEVICE + "# differs: nothing\n")
    device = profile.load(path)
    assert device.attention == attention
    assert device.fitted["attention"] == "fitted"
    assert device.provenance["attention"]["source"] == 'a "quoted" source'
    assert device.residuals["attention"] == {"mean": 0.1, "median": 0.08, "p90": 0.2}
    assert [p.name for p in tmp_path.iterdir()] == ["mine.toml"]


def test_one_block_is_replaced_between_what_stands_around_it(tmp_path: Path) -> None:
    """What is said of the next block is the author's, too."""
    common = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
    write = pytest.importorskip("validate.fitting.write", exc_type=ImportError)
    path = tmp_path / "mine.toml"
    attention = profile.load("a100").attention
    fit = common.Fit(attention, "s", "software", 20, 10, common.FitErrors(10, 0.1, 0.08, 0.2, 0.5), {})
    path.write_text(OWN_DEVICE)
    write.write_one(path, "attention", fit, "2026-01-01")
    path.write_text(path.read_text() + "\n# of the next one\n# in two lines\n[other]\nx = 1\n")
    before = path.read_text()
    write.write_one(path, "attention", fit, "2026-01-01")
    assert path.read_text() == before


@pytest.mark.parametrize("tiles", [((32, 32),), ((256, 256), (128, 64)), TENSOR_CORE_TILES])
def test_a_library_of_other_tiles_is_written_down(tmp_path: Path, tiles: Tiles) -> None:
    """Read back without them, its products would be priced by tiles that it does not have; the usual ones go unsaid."""
    common = pytest.importorskip("validate.fitting.judging", exc_type=ImportError)
    write = pytest.importorskip("validate.fitting.write", exc_type=ImportError)
    path = tmp_path / "mine.toml"
    path.write_text(OWN_DEVICE)
    fitted = replace(profile.load("a100").gemm["bf16"], tiles=tiles)
    errors = common.FitErrors(10, 0.1, 0.08, 0.2, 0.5)
    write.write_blocks(path, {"gemm.bf16": common.Fit(fitted, "s", "s", 20, 10, errors, {})}, "2026-01-01")
    assert profile.load(path).gemm["bf16"].tiles == tiles
    assert ("tiles" in path.read_text()) == (tiles != TENSOR_CORE_TILES)


def test_fitting_without_measurements_ends_in_one_line(tmp_path: Path) -> None:
    """The measurements are the user's: a wrong folder is the commonest mistake."""
    fit = pytest.importorskip("validate.fitting.fit", exc_type=ImportError)
    with pytest.raises(UserError, match="no such folder"):
        fit.fit_kernels(tmp_path / "nowhere", write=False)
    with pytest.raises(UserError, match=r"has no gemm_bf16_a100_sxm\.parquet"):
        fit.fit_kernels(tmp_path, write=False)


@pytest.mark.parametrize("name", hosts.names())
def test_every_bundled_host_loads(name: str) -> None:
    """A cost that is new has to be in each file, or `--host NAME` ends in a complaint about our own data."""
    assert hosts.load(name).source


@pytest.mark.parametrize("value", ["-0.1", "1e9", "inf", "true", '"3"'])
def test_a_cost_of_an_engine_that_is_no_number_of_modules_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """An engine file in seconds or of a typing error would add hours to every step."""
    text = (engine.FOLDER / "deepspeed-zero3.toml").read_text()
    key = engine.COSTS[0]
    (tmp_path / "mine.toml").write_text(re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE))
    monkeypatch.setattr(engine, "FOLDER", tmp_path)
    engine.ratios.cache_clear()
    with pytest.raises(UserError, match=f"{key} must be a number of modules"):
        engine.ratios("mine")


@pytest.mark.parametrize("key", ["source", "date"])
def test_fitted_figures_say_where_they_came_from_in_words(tmp_path: Path, key: str) -> None:
    """A source that is a number tells nobody anything."""
    text = (profile.DEVICES / "l40s.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(re.sub(rf'^{key} = ".*"$', f"{key} = 3", text, count=1, flags=re.MULTILINE))
    assert path.read_text() != text
    with pytest.raises(UserError, match=key):
        profile.load(path)


@pytest.mark.parametrize(
    "line", ["call = 1", "call = 1.0", "call = 3e3", "call = -1e-9", "call = true", 'call = "fast"', ""]
)
def test_a_bad_host_file_ends_in_one_line(tmp_path: Path, line: str) -> None:
    """A cost in milliseconds or microseconds, taken for seconds, would make every step a matter of hours."""
    path = tmp_path / "mine.toml"
    path.write_text(own_host().replace("\ncall = 1e-6", f"\n{line}"))
    with pytest.raises(UserError, match=r"\] call must be a number of seconds from 0 to below 1") as error:
        hosts.load(str(path))
    assert "mine.toml" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_host_file_leaves_out_costs_nothing_or_what_was_measured_elsewhere(tmp_path: Path) -> None:
    """Older files know no costs of an engine or a compiled program: they must stay usable, without whole seconds."""
    path = tmp_path / "mine.toml"
    path.write_text(own_host())
    found = hosts.load(str(path))
    assert found.call == 1e-6
    optional = [f.name for f in fields(found) if f.default is not MISSING and f.type in (float, "float")]
    assert {"fetch", "release", "reduce", "settle"} <= set(optional)
    assert all(getattr(found, name) < 1e-4 for name in optional)


def test_a_host_may_be_another_one_slowed_down(tmp_path: Path) -> None:
    """CPUs differ by their clock and instructions a clock: every cost is so many times as long."""
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nlike = "epyc-genoa"\nslower = 1.5\n')
    usual, found = hosts.load("epyc-genoa"), hosts.load(str(path))
    costs = [f.name for f in fields(found) if f.type in (float, "float")]
    assert [getattr(found, name) for name in costs] == [1.5 * getattr(usual, name) for name in costs]
    assert (found.name, found.source) == ("mine", "")


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('like = "epyc-gena"\nslower = 2', "bundled host, got 'epyc-gena': did you mean 'epyc-genoa'"),
        *((f'like = "epyc-genoa"\n{line}', "slower must be a number of times above 0") for line in (
            "", "slower = 0", "slower = -1", "slower = true", "slower = nan", "slower = 1e9", 'slower = "much"',
        )),
    ],
)  # fmt: skip
def test_a_host_like_another_says_which_and_how_much(tmp_path: Path, line: str, fault: str) -> None:
    """A slip there would make every step free or endless."""
    path = tmp_path / "mine.toml"
    path.write_text(f"{line}\n")
    with pytest.raises(UserError, match=fault):
        hosts.load(str(path))


def test_a_device_goes_with_the_host_of_its_years() -> None:
    """The CPU of a DGX A100 beside an A100, of Amazon's G6e beside an L40S, a newer one else, unless one is named."""
    expected = {"a100": "epyc-rome", "l40s": "epyc-milan", "h100-sxm": "epyc-genoa"}
    for device, name in expected.items():
        on = profile.load(device)
        assert hosts.host_of("default", on) == hosts.load(name)
        assert hosts.host_of("half-speed", on) == hosts.load("half-speed")


def own_host() -> str:
    """A host file with the costs that every one has to name."""
    needed = [f.name for f in fields(hosts.Host) if f.default is MISSING and f.type in (float, "float")]
    return 'name = "mine"\n[seconds]\n' + "".join(f"{name} = 1e-6\n" for name in needed)
