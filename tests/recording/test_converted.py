"""What torchao's 8-bit layers, of floats or integers, have in common: what goes with them, and that grids hold."""

from typing import Any

import numpy as np
import pytest

from perfmodel.errors import UserError
from perfmodel.prediction.predict import predict

CONVERTED = [{"fp8": "tensorwise"}, {"int8": "mixed"}]


@pytest.mark.parametrize("converted", CONVERTED)
@pytest.mark.parametrize(
    ("model", "method", "options", "line"),
    [
        ("gpt2", "full", {}, "has Conv1D layers"),
        ("bert-base", "full", {}, "is no causal model"),
        ("falcon-7b", "full", {}, "in place"),
        ("tinyllama-1.1b", "dora", {}, "use one of full"),
        ("tinyllama-1.1b", "qlora", {}, "use one of full"),
        ("tinyllama-1.1b", "lora:implementation=unsloth", {}, "use one of full"),
        ("tinyllama-1.1b", "lora:targets=lm_head", {}, "leave lm_head out"),
        ("tinyllama-1.1b", "full", {"compile": "default"}, "with compile default"),
        ("tinyllama-1.1b", "full", {"engine": "deepspeed-zero3"}, "with engine deepspeed-zero3"),
    ],
)
def test_what_is_not_modelled_is_refused(
    converted: dict[str, Any], model: str, method: str, options: dict[str, Any], line: str
) -> None:
    """A step that would be another program, or none, ends in one line that names what to leave out."""
    with pytest.raises(UserError, match=line):
        predict(model, method, device="h100-sxm", batch=1, seq=512, **converted, **options)


@pytest.mark.parametrize("converted", [{"fp8": "padded"}, {"int8": "mixed"}])
def test_a_grid_is_its_points(converted: dict[str, Any]) -> None:
    """Tokens that are multiples of 16 and others do not share a program with padding."""
    seq = np.array([64, 72, 96, 100])
    grid = predict("tinyllama-1.1b", device="h100-sxm", batch=1, seq=seq, **converted)
    alone = [predict("tinyllama-1.1b", device="h100-sxm", batch=1, seq=int(s), **converted) for s in seq]
    assert grid.time.phases["total"] == pytest.approx([p.time.phases["total"] for p in alone])
