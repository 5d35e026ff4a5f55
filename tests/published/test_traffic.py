"""LoRAFusion's measurements: DRAM traffic of one linear layer, and times of whole layers. Nothing is fitted to them."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from perfmodel import cli
from perfmodel.devices import profile
from perfmodel.devices.traffic import dram_bytes, gemm_reads
from perfmodel.program.op import Op, Spec
from validate.published import layers, savings
from validate.published.reasons import FAR, reasons
from validate.published.savings import Saving

H100 = profile.load("h100-sxm").hardware


@pytest.mark.parametrize("layer", savings.published_savings(), ids=lambda layer: str(layer.width))
def test_savings_in_dram_traffic_are_lorafusions(layer: Saving) -> None:
    """37, 34 and 24 %: within 3 points; the totals that they are the ratio of, within 7 %."""
    assert layer.share == pytest.approx({4096: 0.37, 5120: 0.34, 8192: 0.24}[layer.width], abs=0.005)
    assert layer.predicted(fused=False) == pytest.approx(layer.torch, rel=0.07)
    assert layer.predicted(fused=True) == pytest.approx(layer.fused, rel=0.07)
    assert layer.predicted_share == pytest.approx(layer.share, abs=0.03)


def test_a_product_that_fits_the_cache_is_read_once() -> None:
    """And a larger one never less than that; one row of tiles has no second wave over A's rows."""
    assert gemm_reads(1024, 1024, 1024, 2, H100) == 2 * 1024 * 1024 * 2
    assert gemm_reads(8192, 16, 4096, 2, H100) == (8192 + 16) * 4096 * 2
    for m, n, k in ((512, 65536, 4096), (8192, 8192, 8192), (16384, 2048, 8192)):
        once = (m + n) * k * 2
        assert once <= gemm_reads(m, n, k, 2, H100) <= gemm_reads(m, n, k, 2, H100, groups=(8,))


def test_only_a_call_of_one_product_reads_its_operands_again() -> None:
    """Of several, say both gradients of a convolution, nobody knows the walk: their bytes are those of the tensors."""
    x, filters = Spec("bf16", (64, 1024, 32, 32)), Spec("bf16", (1024, 1024, 1, 1))
    calls = {
        name: Op(name, read, written, sum(s.nbytes for s in read), sum(s.nbytes for s in written))
        for name, read, written in (
            ("convolution", (x, filters), (x,)), ("convolution_backward", (x, x, filters), (x, filters)),
        )
    }  # fmt: skip
    own = {name: op.bytes_read + op.bytes_written for name, op in calls.items()}
    moved = {name: dram_bytes(op, H100) for name, op in calls.items()}
    assert moved["convolution"] > own["convolution"]
    assert moved["convolution_backward"] == own["convolution_backward"]


def test_layer_times_are_lorafusions() -> None:
    """60 figures of Llama-3.1-8B and -70B layers and heads on an H100: mean |error| at most 12 %."""
    published = layers.published_layers()
    assert len(published) == 60
    found = layers.summarise_layers(published)
    assert found["all"] <= 0.12
    assert found["layer_fwd_bwd"] <= 0.08
    assert {row.id for row in published if abs(row.error) > FAR} <= set(reasons("lorafusion_layers"))


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.2, 1)])
def test_the_command_ends_with_1_when_a_limit_is_missed(
    monkeypatch: pytest.MonkeyPatch, factor: float, code: int
) -> None:
    """A harness that cannot fail checks nothing: savings that are measured 4 points apart exceed the limit."""
    rows = savings.published_savings()
    monkeypatch.setattr(savings, "published_savings", lambda: [replace(row, fused=factor * row.fused) for row in rows])
    result = CliRunner().invoke(cli.main, ["validate", "layers", "--json"])
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    assert found["holds"] == (code == 0)
    assert len(found["savings"]) == 3
