"""A pass through a reference under ZeRO-3 against DeepSpeed itself, prepared as TRL does it; skipped without it.

What DeepSpeed asks ranks to compare of their traces of modules, a few numbers at a time, is left out of the tape.
"""

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("deepspeed")

from reference_objectives import LOSSES
from reference_own_losses import OWN_LOSSES
from reference_zero import judged_zero3

from validate.oracle.parallel import PEAK_TOLERANCE

OWN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dpo", "llama", {"checkpoint": "block-reentrant"}),
    ("kto", "llama", {"checkpoint": "block-reentrant", "grad_accum": 2}),
    ("kto", "llama", {"small": 3000}),
    ("kto", "gpt2", {"checkpoint": "block"}),
    ("grpo", "llama", {"reference": "model", "prompt": 5, "gpus": 3, "small": 1000}),
    ("asft", "llama", {"checkpoint": "block-reentrant"}),
)
OFF: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("dpo", "lora:r=4,targets=all-linear", {"checkpoint": "block-reentrant"}),
    ("kto", "lora:r=4", {}),
    ("grpo", "lora:r=4", {"reference": "adapter-off", "grad_accum": 2}),
)
SMALL = 2 * 64 + 512 + 384  # elements of norms and adapters of the first block
FIRST = SMALL + 4096 + 2 * 2048  # with its q, k and v


@pytest.mark.parametrize(("objective", "name", "options"), OWN)
def test_a_reference_of_its_own_is_an_engine_that_gathers(objective: str, name: str, options: dict[str, Any]) -> None:
    """Its small weights stay by DeepSpeed's default, or as the config says. KTO's two passes break the model's trace.

    Gathered ahead by default are 5e7 elements of it, which is all of such tiny ones at once: no question of memory.
    """
    found = judged_zero3(
        name, "full", {**LOSSES, **OWN_LOSSES}, objective=objective, **{"gpus": 2, "dtype": "bf16", **options}
    )
    assert found.differences == []
    assert found.tape == found.real
    assert found.thrown == 0
    if "small" not in options:
        assert found.peak_ratio == pytest.approx(1, abs=PEAK_TOLERANCE)


@pytest.mark.parametrize(("objective", "spec", "options"), OFF)
def test_a_model_without_its_adapters_breaks_the_trace(objective: str, spec: str, options: dict[str, Any]) -> None:
    """All is gathered again, small weights as well. Beside it DeepSpeed has gathered ahead what it then throws away,
    and in the first block leaves out what needs no gradient, or is there from before it lost its trace.
    """
    options = {"gpus": 2, "dtype": "bf16", **options}
    found = judged_zero3("llama", f"{spec},adapter_dtype=bf16", LOSSES, objective=objective, **options)
    assert found.differences == []
    more = {key: n - found.real.get(key, 0) for key, n in found.tape.items()}
    forward, backward = (more.pop((phase, "bf16", 2)) for phase in ("forward", "backward"))
    assert not any(more.values())
    times = options.get("grad_accum", 1)
    assert found.thrown > 0
    assert 0 <= forward + found.thrown <= SMALL * times
    assert 0 <= backward <= FIRST * times
