"""Devices: every figure has a source, peaks follow from units and clocks, names are unique."""

import tomllib
from typing import Any

import pytest

from perfmodel.devices import profile
from perfmodel.devices.profile import BLOCKS, DEVICES

NAMES = profile.names()
CUDA = [n for n in NAMES if profile.load(n).kind == "cuda"]
# Dense FLOPs a clock and SM: (fp32 units, tensor cores on 16-bit operands with fp32 accumulation; TF32 is half).
# NVIDIA's architecture white papers and the compute-capability table of the CUDA programming guide.
FLOPS_PER_CLOCK: dict[str, tuple[int, int | None]] = {
    "6.0": (128, None), "6.1": (256, None), "7.0": (128, 1024), "7.5": (128, 1024), "8.0": (128, 2048),
    "8.6": (256, 1024), "8.9": (256, 1024), "9.0": (256, 4096), "10.0": (256, 8192), "10.3": (256, 8192),
    "12.0": (256, 1024), "12.1": (256, 1024),
}  # fmt: skip
# Of int8 where it is not twice that: Blackwell Ultra has few integer units left (aiconfigurator's b300_sxm.yaml).
INT8_PER_CLOCK = {"10.3": 512}


def table(name: str) -> dict[str, Any]:
    return tomllib.loads((DEVICES / f"{name}.toml").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_every_datasheet_figure_has_a_source(name: str) -> None:
    """A number without a source cannot be checked by anybody."""
    values = table(name)
    assert set(values["datasheet"]) == set(values["source"])
    if values["kind"] == "cuda":
        assert all(url.startswith("http") for url in values["source"].values())


@pytest.mark.parametrize("name", CUDA)
def test_peaks_follow_from_units_and_clock(name: str) -> None:
    """Datasheets quote sparse peaks and other clocks; a peak 3 % off needs a `# differs:` comment that names it."""
    hw, values = profile.load(name).hardware, table(name)
    simt, tensor = FLOPS_PER_CLOCK[values["compute_capability"]]
    rates = {"fp32_flops": simt}
    if tensor is not None:
        rates["int8_flops"] = INT8_PER_CLOCK.get(values["compute_capability"], 2 * tensor)  # at whole rate everywhere
        tensor //= 2 if hw.half_rate else 1
        rates |= {"fp16_flops": tensor, "bf16_flops": tensor, "tf32_flops": tensor // 2, "fp8_flops": 2 * tensor}
    lines = (DEVICES / f"{name}.toml").read_text().splitlines()
    explained = {key for line in lines if line.startswith("# differs:") for key in line.split(":")[1].split()}
    peaks = [key for key in values["datasheet"] if key.endswith("_flops")]
    assert peaks
    for key in peaks:
        off = values["datasheet"][key] / (hw.sm_count * hw.clock_hz * rates[key]) - 1
        assert abs(off) < (0.30 if key in explained else 0.03), f"{key} is {off:+.1%} off"


def test_names_and_aliases_are_unique_and_resolve_in_any_case() -> None:
    """Users type A100, a100-sxm or the file's name and must get one and the same device."""
    seen = list(NAMES)
    for name in NAMES:
        for alias in table(name)["aliases"]:
            seen.append(alias.lower())
            assert profile.load(alias.upper()).slug == name
        assert name not in CUDA or profile.load(table(name)["name"]).slug == name  # what `devices` calls it
    assert len(seen) == len(set(seen))
    assert "classes" not in NAMES
    assert profile.load("h100") is profile.load("H100-SXM")


@pytest.mark.parametrize(
    ("typed", "slug"),
    [
        ("RTX 4090", "rtx-4090"), ("rtx4090", "rtx-4090"), ("4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("a6000", "rtx-a6000"), ("NVIDIA RTX A6000", "rtx-a6000"), ("RTX 6000 Ada", "rtx-6000-ada"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"), ("3080 Ti", "rtx-3080-ti"), ("RTX 3080Ti", "rtx-3080-ti"),
        ("H100 80GB HBM3", "h100-sxm"), ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"), ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("a800", "a100-80gb-sxm"),
        ("RTX 4070 Super", "rtx-4070-super"), ("3060ti", "rtx-3060-ti"), ("NVIDIA H800 PCIe", "h100-pcie"),
        ("RTX 4070Ti SUPER", "rtx-4070-ti-super"), ("NVIDIA A30", "a30"),
        ("NVIDIA RTX A2000 12GB", "rtx-a2000"), ("NVIDIA GeForce RTX 5060 Ti", "rtx-5060-ti"),
        ("NVIDIA A10", "a10"), ("NVIDIA A10G", "a10g"), ("Tesla T4", "t4"), ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GH200 480GB", "gh200"), ("DGX Spark", "gb10"), ("Quadro RTX 8000", "quadro-rtx-8000"),
        ("NVIDIA GeForce RTX 2080 Ti", "rtx-2080-ti"), ("NVIDIA TITAN RTX", "titan-rtx"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000-server"),
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", "cpu-xeon-2.5ghz-1t"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", ""), ("RTX 4090 D", ""), ("RTX", ""), ("NVIDIA", ""),
    ],
)  # fmt: skip
def test_a_device_is_found_by_what_people_and_drivers_call_it(typed: str, slug: str) -> None:
    """Shop names, torch's and nvidia-smi's are one device; a slice or another edition is none of them."""
    assert profile.bundled(typed) == slug


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_where_it_comes_from(name: str) -> None:
    """A prediction's interval and its notes rest on provenance and residuals."""
    device = profile.load(name)
    for block in BLOCKS:
        assert device.provenance[block]["source"]
        assert 0 < device.residuals[block]["median"] <= device.residuals[block]["p90"] < 1.5
        assert device.fitted[block] in ("fitted", "sibling", "class")
        if device.fitted[block] == "fitted":
            assert device.provenance[block]["rows_fitted"] > 0
    assert set(device.gemm) == {"bf16", "fp16", "tf32", "fp32"}


def test_a_device_without_own_rows_is_less_certain() -> None:
    """Class defaults must widen the interval, not narrow it."""
    for block in ("gemm.bf16", "gemm.fp32", "pointwise"):
        a100 = profile.load("a100-80gb-pcie").residuals[block]
        assert profile.load("rtx-3090").residuals[block]["p90"] > a100["p90"]


def test_dtypes_without_tensor_cores_fall_back_to_the_fp32_units() -> None:
    """A V100 has no bf16 tensor cores; its fp16 ones exist."""
    v100, p100 = profile.load("v100"), profile.load("p100")
    assert v100.hardware.peak("bf16") == v100.hardware.fp32_flops < v100.hardware.peak("fp16")
    assert v100.gemm["bf16"] == v100.gemm["fp32"] != v100.gemm["fp16"]
    assert p100.hardware.peak("fp16") == p100.hardware.fp32_flops
    a100 = profile.load("a100").hardware
    assert a100.peak("bf16", tensor_cores=False) == a100.fp32_flops
