"""The fit of products by expert: loads as the source draws them, and rows that its tuning spoilt."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pandas")
pytest.importorskip("scipy")
pytest.importorskip("pyarrow")

import pandas as pd

from validate.fitting import grouped


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 256), (128, 1, 300), (512, 10, 4096)])
@pytest.mark.parametrize("exponent", [1.01, 1.2])
def test_drawn_loads_hold_all_rows(experts: int, top_k: int, tokens: int, exponent: float) -> None:
    """A wrong load would be fitted as if the kernel were slow: every row is somewhere, no expert has a token twice."""
    groups = grouped.PowerLawRouting(experts, top_k, exponent).groups(np.array([tokens * top_k]))
    counts = np.array([int(n[0]) for n, _ in groups])
    assert (len(counts), counts.sum()) == (experts, tokens * top_k)
    assert 0 <= counts.min() < tokens * top_k / experts < counts.max() <= tokens


def test_what_is_searched_starts_within_its_limits() -> None:
    """An empty range would be searched for nothing."""
    assert all(low < high for low, high in grouped.BOUNDS.values())
    assert grouped.BOUNDS["stream"][0] < grouped.STREAM < grouped.BOUNDS["stream"][1]
    assert grouped.BOUNDS["fixed"][0] < grouped.FIXED < grouped.BOUNDS["fixed"][1]


@pytest.mark.parametrize("tokens", [1, 100_000])
def test_a_layers_roofline_is_its_products_or_its_bytes(tokens: int) -> None:
    """Three matrices of every expert that has a token, what goes in and out of a token's experts, two bytes each."""
    hw, hidden, width, topk, experts = grouped.hardware("h100-sxm"), 4096, 1024, 2, 8
    sizes = {"hidden_size": hidden, "inter_size": 2 * width, "moe_tp_size": 2, "num_tokens": tokens, "topk": topk}
    (seconds,) = grouped._roofline(pd.DataFrame([{**sizes, "num_experts": experts}]), hw)
    read = 2 * 3 * hidden * width * min(experts, topk * tokens) + 2 * 2 * topk * tokens * (hidden + width)
    flops = 2 * 3 * hidden * width * topk * tokens
    assert seconds == pytest.approx(max(read / hw.memory_bandwidth, flops / hw.peak("bf16")))


def test_a_row_slower_than_more_work_is_mistuned(tmp_path: Path) -> None:
    """Of 512 tokens one load takes ten times what 1,024 tokens take: the kernel, not the load, is bad there."""
    loads = ["balanced", "power_law_1.01"]
    told = [(n, load, 1e-3 * n / 256) for n in (256, 512, 1024) for load in loads]
    rows = pd.DataFrame(told, columns=["num_tokens", "distribution", "latency_s"])
    rows.loc[3, "latency_s"] = 40e-3
    gpu, source = grouped.ROWS_OF["h100-sxm"]
    shape = {"hidden_size": 512, "inter_size": 256, "topk": 2, "num_experts": 8, "moe_tp_size": 1, "moe_ep_size": 1}
    rows.assign(gpu=gpu, kernel_source=source, version="1", **shape).to_parquet(tmp_path / grouped.FILE)
    found = grouped.layer_rows(tmp_path, "h100-sxm")
    spoilt = found[found.mistuned]
    assert spoilt[["num_tokens", "distribution"]].to_numpy().tolist() == [[512, "power_law_1.01"]]
