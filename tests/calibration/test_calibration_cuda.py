"""A GPU's calibration, on made-up timings: no GPU is needed to see whether the fit finds what made them."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("peft")

from perfmodel.devices import price, profile
from perfmodel.devices.attention import attention_backward_time, attention_forward_time
from perfmodel.devices.gemm import gemm_time
from perfmodel.devices.profile import DeviceProfile
from perfmodel.errors import UserError
from perfmodel.prediction.predict import predict
from validate.calibration import calibrate
from validate.fitting.cpu_ops import op
from validate.microbench import designs

A100 = {
    "name": "NVIDIA A100-SXM4-80GB", "major": 8, "minor": 0, "multi_processor_count": 108, "total_memory": 80e9,
    "L2_cache_size": 40e6, "clocks.max.sm": "1410 MHz", "cuda": "12.8",
}  # fmt: skip


def seconds_of(case: designs.MicroCase, on: DeviceProfile) -> float:
    """What a case takes on a card, by the price models."""
    s, hw = dict(case.sizes), on.hardware
    if case.block == "gemm":
        sizes, layout = (s["m"], s["n"], s["k"]), case.layout
        parameters = on.gemm[case.dtype]
        return float(gemm_time(*sizes, hardware=hw, parameters=parameters, dtype=case.dtype, layout=layout))  # type: ignore[arg-type]
    if case.block == "attention":
        model = attention_backward_time if case.backward else attention_forward_time
        sizes = (s["batch"], s["seq"], s["seq"], s["heads"], s["kv_heads"])
        return float(model(*sizes, s["head_dim"], causal=True, hardware=hw, parameters=on.attention))
    if case.block == "pointwise":
        return float(price.durations([op(case.op, case.dtype, s["rows"], s["columns"])], on)[0])
    return 3e-6


def made_up(on: DeviceProfile, gpu: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of a card, with 2 % of noise."""
    noise = np.random.default_rng(0)
    head = {"kind": "environment", "id": "e", "device": "cuda", "gpu": gpu, "host": {}, "software": {"torch": "2"}}
    found: list[dict[str, Any]] = [head]
    for cases in designs.design("cuda", ("fp32", "bf16")).values():
        for case in cases[:240]:
            took = seconds_of(case, on) * float(np.exp(noise.normal(0.0, 0.02)))
            seconds = {"least": took, "quartile": took, "median": took}
            found.append({"kind": "microbench", "environment": "e", "case": case.as_dict(), "seconds": seconds})
    return found


def test_a_slower_card_of_a_known_kind_is_found_slower() -> None:
    """The bundled profile is where the fit starts, not where it ends: a card under a power cap must show it."""
    known = profile.load("a100-80gb-sxm")
    capped = {d: replace(p, math_efficiency=0.6 * p.math_efficiency) for d, p in known.gemm.items()}
    text, fits = calibrate.device_file(made_up(replace(known, gemm=capped), A100), "mine")
    assert {block: f.errors.mean < 0.1 for block, f in fits.items()} == dict.fromkeys(fits, True)
    mine = calibrate.profile_of_text(text, "mine")
    step = [predict("llama-3.2-1b", "full", device=d, batch=8, seq=1024, host="default") for d in (mine, known)]
    assert step[0].time.phases["forward"] > 1.1 * step[1].time.phases["forward"]


def test_a_card_that_is_not_bundled_takes_the_drivers_figures() -> None:
    """New cards come out faster than data files."""
    gpu = {**A100, "name": "NVIDIA A123"}
    text, _ = calibrate.device_file(made_up(profile.load("a100-80gb-sxm"), gpu), "mine")
    mine = calibrate.profile_of_text(text, "mine")
    assert (mine.name, mine.architecture, mine.hardware.sm_count) == ("NVIDIA A123", "ampere", 108)
    assert 150e12 < mine.hardware.peak("bf16") < 350e12
    assert 1e12 < mine.hardware.memory_bandwidth < 3e12


@pytest.mark.parametrize("clock", ["[N/A]", "[Not Supported]", ""])
def test_a_driver_that_tells_no_clock_is_no_obstacle(clock: str) -> None:
    """Virtual GPUs and WSL: it was known only after all was measured."""
    gpu = {**A100, "name": "NVIDIA A123", "clocks.max.sm": clock}
    _, fits = calibrate.device_file(made_up(profile.load("a100-80gb-sxm"), gpu), "mine")
    assert "gemm.bf16" in fits


def test_a_card_without_units_for_bf16_keeps_its_class_for_16_bits() -> None:
    """What PyTorch emulates says nothing of fp16, in which such a card trains."""
    gpu = {**A100, "name": "NVIDIA T123", "major": 7, "minor": 5}
    text, fits = calibrate.device_file(made_up(profile.load("a100-80gb-sxm"), gpu), "mine")
    assert set(fits) == {"gemm.fp32", "pointwise"}
    mine = calibrate.profile_of_text(text, "mine")
    assert mine.fitted["gemm.bf16"] == "class"


def test_what_a_calibration_did_not_measure_keeps_the_cards_figure_and_is_named() -> None:
    """A calibration that was cut short before the backward layouts, on a card whose bundled profile knows them."""
    known = profile.load("a100-80gb-sxm")
    found = [r for r in made_up(known, A100) if r.get("case", {}).get("layout") != "nt"]
    found = [r for r in found if not (r.get("case", {}).get("block") == "attention" and r["case"]["backward"])]
    text, fits = calibrate.device_file(found, "mine")
    mine, table = calibrate.profile_of_text(text, "mine"), tomllib.loads(text)["fitted"]
    assert "nt_slowdown" in fits["gemm.bf16"].caveats.kept
    assert mine.gemm["bf16"].nt_slowdown == pytest.approx(known.gemm["bf16"].nt_slowdown, rel=1e-3)
    assert mine.attention.backward_efficiency == pytest.approx(known.attention.backward_efficiency, rel=1e-3)
    assert {"backward_efficiency", "backward_cta_overhead"} <= set(table["attention"]["kept"])
    for block, written in (("gemm.bf16", table["gemm"]["bf16"]), ("pointwise", table["pointwise"])):
        caveats = fits[block].caveats
        assert (written.get("kept", []), written.get("at_bound", [])) == (list(caveats.kept), list(caveats.at_bound))


def test_a_card_beyond_what_a_fit_may_find_is_named() -> None:
    """A layout as fast as the forward one is as low as it may go; products at a tenth of the peak are beyond it."""
    known = profile.load("a100-80gb-sxm")
    strange = replace(known.gemm["bf16"], math_efficiency=0.1, nn_slowdown=0.9)
    _, fits = calibrate.device_file(made_up(replace(known, gemm={**known.gemm, "bf16": strange}), A100), "mine")
    assert {"math_efficiency", "nn_slowdown"} <= set(fits["gemm.bf16"].caveats.at_bound)


def test_a_gpu_without_enough_rows_is_refused(tmp_path: Path) -> None:
    """A calibration that was cut short says so."""
    found = [r for r in made_up(profile.load("a100-80gb-sxm"), A100) if r.get("case", {}).get("block") != "pointwise"]
    with pytest.raises(UserError, match="pointwise"):
        calibrate.device_file(found, "mine")
