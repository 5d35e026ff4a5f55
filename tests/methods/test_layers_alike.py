"""Blocks that a method calls alike are recorded once: whatever its targets, each on its own must give the same step."""

from dataclasses import fields

import numpy as np
import pytest

from perfmodel.methods import registered
from perfmodel.prediction.predict import predict
from perfmodel.prediction.remembered import Steps

MODEL = "tinyllama-1.1b"
PATTERNS = (
    "/model.layers.[0-9].self_attn.q_proj/",
    "/.*layers.(3.self_attn.q_proj|[4-9].mlp.up_proj|1[0-9].self_attn.(q|v)_proj)/",
)
WITHOUT = ("apollo", "fedgalore", "galore", "top_k")  # of whole weights: no regex names them
TARGETED = [
    name for name, cls in registered().items() if name not in WITHOUT and "targets" in {f.name for f in fields(cls)}
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("method", TARGETED)
def test_blocks_with_other_targets_are_not_alike(method: str, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResLoRA and XGBLoRA told blocks apart by whether they have any target, and counted up to twice what trains."""
    spec = f"{method}:targets={pattern}"
    p = predict(MODEL, spec, seq=64, steps=Steps())
    monkeypatch.setattr(registered()[method], "layer_key", lambda self, layer: layer)
    apart = predict(MODEL, spec, seq=64, steps=Steps())
    assert p.trainable_params == apart.trainable_params
    assert p.kernels["total"] == apart.kernels["total"]
    assert p.memory.peak == apart.memory.peak
    assert np.isclose(p.flops["total"], apart.flops["total"], rtol=1e-12)
